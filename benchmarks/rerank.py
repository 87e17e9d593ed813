"""Reranker.rank of one query with 100 documents against the official way, one pair at a time.

    python benchmarks/rerank.py
"""

import argparse
import tempfile

import numpy as np
from mixed_items import mixed_items
from official_way import OfficialReranker
from side_by_side import ratio, seconds_of, write

from q3vl_mini.export import export
from q3vl_mini.reranker import Reranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    documents = mixed_items(options.documents)
    query = {"text": "a picture of a red cat on the left of a green apple"}
    with tempfile.TemporaryDirectory() as folder:
        export("reranker", f"{folder}/model")
        ours, official = Reranker(f"{folder}/model"), OfficialReranker(f"{folder}/model")
    ways = {"ours": lambda: ours.rank(query, documents), "official": lambda: official.score(query, documents)}
    few = documents[:24]
    difference = float(np.abs(ours.score(query, few) - official.score(query, few)).max())
    seconds = seconds_of(ways, options.rounds)
    write(
        "rerank",
        f"one query, {options.documents} documents: half texts, the others pictures, with or without a text",
        [ratio("the official way over Reranker.rank, time", seconds["official"], seconds["ours"], "at least", 3)],
        largest_difference=difference,
    )


if __name__ == "__main__":
    main()
