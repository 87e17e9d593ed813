"""Embedder.encode against sentence-transformers' encode and the official way, on texts and pictures of many sizes.

    python benchmarks/encode.py --items 2000

All three have the weights of one exported model, the same items (pictures already decoded, none of them seen before)
and batches of 32. The largest difference of their vectors is among the results.
"""

import argparse
import tempfile

import numpy as np
from mixed_items import mixed_items
from official_way import OfficialEmbedder
from sentence_transformers import SentenceTransformer
from side_by_side import ratio, seconds_of, write

from q3vl_mini.embedder import Embedder
from q3vl_mini.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    items = mixed_items(options.items)
    with tempfile.TemporaryDirectory() as folder:
        export("s3", f"{folder}/model")
        ours, official = Embedder(f"{folder}/model"), OfficialEmbedder(f"{folder}/model")
        theirs = SentenceTransformer(f"{folder}/model", device="cpu")
    ways = {
        "ours": lambda: ours.encode(items),
        "sentence-transformers": lambda: theirs.encode(items, batch_size=32, show_progress_bar=False),
        "the official way": lambda: official.encode(items),
    }
    few = items[:24]
    vectors = ours.encode(few)
    peers = theirs.encode(few, show_progress_bar=False), official.encode(few)
    difference = max(float(np.abs(vectors - peer).max()) for peer in peers)
    seconds = seconds_of(ways, options.rounds)
    write(
        "encode",
        f"{options.items:,} items: half texts, the others pictures, with or without a text; batches of 32",
        [
            ratio(f"{peer} over Embedder.encode, time", seconds[peer], seconds["ours"], "at least", bar)
            for peer, bar in (("sentence-transformers", 1.5), ("the official way", 2.0))
        ],
        largest_difference=difference,
        items=options.items,
    )


if __name__ == "__main__":
    main()
