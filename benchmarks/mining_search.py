"""Mining's search for the nearest documents against faiss's flat search alone.

    python benchmarks/mining_search.py

Ours gives the exact order of float64 with ties by row, within a bound of memory; faiss gives float32's, with all
vectors in its index. The index is made before the clock starts.
"""

import argparse

import faiss
import numpy as np
from side_by_side import ratio, seconds_of, write

from q3vl_mini.mining import top_k


def unit(rng: np.random.Generator, n: int, dim: int, centres: np.ndarray) -> np.ndarray:
    x = centres[rng.integers(len(centres), size=n)] + rng.standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dim, k, memory_mb = 256, 100, 64
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    documents, queries = unit(rng, options.documents, dim, centres), unit(rng, options.queries, dim, centres)
    index = faiss.IndexFlatIP(dim)
    index.add(documents)
    found, _ = top_k(queries, documents, k, memory_mb=memory_mb)
    their_scores, theirs = index.search(queries, k)
    agree = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), theirs.tolist(), strict=True)]))
    ways = {
        "ours": lambda: top_k(queries, documents, k, memory_mb=memory_mb),
        "faiss": lambda: index.search(queries, k),
    }
    seconds = seconds_of(ways, options.rounds)
    write(
        "mining_search",
        f"{options.documents:,} documents and {options.queries:,} queries of {dim} dimensions, top {k}; "
        f"ours within {memory_mb} MB",
        [ratio("top_k over faiss's flat search, time", seconds["ours"], seconds["faiss"], "at most", 1.3)],
        agreement=round(agree, 5),
    )


if __name__ == "__main__":
    main()
