"""int8 and binary search with rescoring against float32 flat search, among a million vectors.

    python benchmarks/index_search.py --vectors 1000000

Vectors lie in clusters of a hundred, as in index_sizes.py. One query at a time, three indexes in turn. The indexes are
saved and opened memory-mapped; float vectors for rescoring are read from there.
"""

import argparse
import tempfile

import numpy as np
from index_sizes import CHUNK, CLUSTER, recall, vectors
from side_by_side import number, ratio, seconds_of, write

from q3vl_mini.index import Index

K = 10
RESCORE = {"float32": 0, "int8": 4, "binary": 32}


def saved(n: int, precision: str, centres: np.ndarray, folder: str) -> Index:
    """An index of n vectors, opened from its folder."""
    index = Index(centres.shape[1], precision)
    for start in range(0, n, CHUNK):
        numbers = np.arange(start, min(start + CHUNK, n))
        index.add([str(i) for i in numbers], vectors(centres, numbers, [1, start]))
    index.save(folder)
    del index
    return Index.open(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    n, dim = options.vectors, options.dim
    centres = np.random.default_rng([0, dim]).standard_normal((n // CLUSTER, dim), dtype=np.float32)
    queries = vectors(centres, np.random.default_rng(2).integers(0, n, options.queries), [3])
    with tempfile.TemporaryDirectory() as folder:
        indexes = {name: saved(n, name, centres, f"{folder}/{name}") for name in RESCORE}
        exact = [{hit.id for hit in hits} for hits in indexes["float32"].search(queries, K)]
        found = {name: recall(index, RESCORE[name], queries, exact) for name, index in indexes.items()}

        def search(name: str):
            for query in queries[:10]:
                indexes[name].search(query[None], K, RESCORE[name])

        for name in RESCORE:
            search(name)
        seconds = seconds_of({name: lambda name=name: search(name) for name in RESCORE}, options.rounds)
        sizes = {name: (index.nbytes["codes"] or index.nbytes["vectors"]) // n for name, index in indexes.items()}
        for index in indexes.values():
            index.close()
    rows = []
    for name, faster, least in (("int8", 3, 0.99), ("binary", 10, 0.95)):
        way = f"{name} with rescore {RESCORE[name]}"
        rows.append(ratio(f"float32 over {way}, time", seconds["float32"], seconds[name], "at least", faster))
        rows.append(number(f"recall@{K} of {way}", found[name], "at least", least))
    write(
        "index_search",
        f"{n:,} vectors of {dim} dimensions in clusters of {CLUSTER}",
        rows,
        scanned_bytes_a_vector=sizes,
    )


if __name__ == "__main__":
    main()
