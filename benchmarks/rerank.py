"""Reranker.rank of one query with 100 documents against the official way, one pair at a time.

    python benchmarks/rerank.py
"""

import argparse
import tempfile

import numpy as np
from mixed_items import mixed_items
from official_way import OfficialReranker
from side_by_side import ratio, seconds_of, write

from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.export import export
from q3vl_mini.reranker import Reranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    n = options.documents
    query = {"text": "a picture of a red cat on the left of a green apple"}
    drawn, told = (build(task, "train", n // 2, 0) for task in ("text_to_image", "image_to_text"))
    pictures = [{"image": document["image"].render()} for document in drawn.corpus[: n // 2]]
    works = {
        "pictures of 64 pixels and captions": pictures + list(told.corpus[: n - len(pictures)]),
        "texts of up to 150 words and pictures of up to 256 pixels": mixed_items(n),
    }
    with tempfile.TemporaryDirectory() as folder:
        export("reranker", f"{folder}/model")
        ours, official = Reranker(f"{folder}/model"), OfficialReranker(f"{folder}/model")
    rows, differences = [], []
    for kind, documents in works.items():
        few = documents[::5]
        differences.append(float(np.abs(ours.score(query, few) - official.score(query, few)).max()))
        ways = {
            "ours": lambda documents=documents: ours.rank(query, documents),
            "official": lambda documents=documents: official.score(query, documents),
        }
        seconds = seconds_of(ways, options.rounds)
        label = f"the official way over Reranker.rank, {kind}, time"
        rows.append(ratio(label, seconds["official"], seconds["ours"], "at least", 3))
    write("rerank", f"One query, {n} documents", rows, largest_difference=max(differences))


if __name__ == "__main__":
    main()
