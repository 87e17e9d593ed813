"""What int8 and binary codes cost in recall and save in time and memory, by number of vectors and dimensions.

    python benchmarks/index_sizes.py --sizes 10000 100000   # these sizes anew, the others as they are in the results
    python benchmarks/index_sizes.py --sizes                # nothing anew

Writes results/index_sizes.json and the table of docs/index.md.

Vectors: 100 around each of N / 100 random centres, normalise(centre + noise), with centre and noise normally
distributed and of equal length, so two of one cluster have a cosine near 1/2 and its hundred members differ by little.
Queries are drawn in the same way around the same centres. Recall@10 is the share of float32's ten that are found.

Time is that of one query at a time, over that of float32 in the same round, both being measured in turn; the median of
ROUNDS rounds. A size whose float32 vectors take more than LARGEST_GB is left out, so that 8 GB of memory are enough:
three indexes, each with its float vectors, and what they take while they grow.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import faiss
import numpy as np

from q3vl_mini.index import Index

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results" / "index_sizes.json", ROOT / "docs" / "index.md"
MARKED = re.compile(r"(<!-- index-sizes:begin -->\n).*?(<!-- index-sizes:end -->)", re.DOTALL)

DIMS = (64, 256, 1024)
SEARCHES = [("float32", 0), ("int8", 0), ("int8", 4), ("binary", 0), ("binary", 4), ("binary", 16)]  # with rescore
K, QUERIES, TIMED, ROUNDS = 10, 200, 10, 7
CLUSTER, CHUNK, LARGEST_GB = 100, 50_000, 2


def vectors(centres: np.ndarray, numbers: np.ndarray, seed: list[int]) -> np.ndarray:
    """Unit vectors around the centres of these numbers."""
    noise = np.random.default_rng(seed).standard_normal((len(numbers), centres.shape[1]), dtype=np.float32)
    x = centres[numbers % len(centres)] + noise
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def indexes(n: int, centres: np.ndarray) -> dict[str, Index]:
    """An index of the same n vectors in each precision."""
    made = {precision: Index(centres.shape[1], precision) for precision in ("float32", "int8", "binary")}
    for start in range(0, n, CHUNK):
        numbers = np.arange(start, min(start + CHUNK, n))
        x = vectors(centres, numbers, [1, start])
        for index in made.values():
            index.add([str(i) for i in numbers], x)
    return made


def recall(index: Index, rescore: int, queries: np.ndarray, exact: list[set[str]]) -> float:
    """The mean share of the exact K that are found."""
    found = index.search(queries, K, rescore)
    return statistics.mean(len({hit.id for hit in hits} & best) / K for hits, best in zip(found, exact, strict=True))


def relative_times(made: dict[str, Index], queries: np.ndarray) -> dict[tuple[str, int], float]:
    """The time of each search over that of float32."""
    rounds = []
    for _ in range(1 + ROUNDS):  # the first is not counted
        seconds = {}
        for precision, rescore in SEARCHES:
            start = time.perf_counter()
            for query in queries:
                made[precision].search(query[None], K, rescore)
            seconds[precision, rescore] = time.perf_counter() - start
        rounds.append({search: s / seconds["float32", 0] for search, s in seconds.items()})
    return {search: statistics.median(r[search] for r in rounds[1:]) for search in SEARCHES}


def measure(n: int, dim: int) -> list[dict]:
    """The rows of the results for one size: a row a search."""
    centres = np.random.default_rng([0, dim]).standard_normal((n // CLUSTER, dim), dtype=np.float32)
    made = indexes(n, centres)
    queries = vectors(centres, np.random.default_rng(2).integers(0, n, QUERIES), [3])
    exact = [{hit.id for hit in hits} for hits in made["float32"].search(queries, K)]
    times = relative_times(made, queries[:TIMED])
    rows = []
    for precision, rescore in SEARCHES:
        size = made[precision].nbytes
        rows.append(
            {
                "vectors": n,
                "dim": dim,
                "precision": precision,
                "rescore": rescore,
                "recall": round(recall(made[precision], rescore, queries, exact), 3),
                "time": round(times[precision, rescore], 3),
                "scanned_bytes": size["codes"] or size["vectors"],
                "kept_bytes": size["vectors"] if size["codes"] and rescore else 0,
            }
        )
    return rows


def table(results: dict) -> str:
    """Markdown: a row a search, the sizes side by side."""
    sizes = sorted({row["vectors"] for row in results["rows"]})
    by_search = {}
    for row in results["rows"]:
        by_search.setdefault((row["dim"], row["precision"], row["rescore"]), {})[row["vectors"]] = row
    head = ["dim", "precision", "rescore", "scanned, bytes a vector"]
    head += [f"{what}, {n:,}" for n in sizes for what in ("recall@10", "time")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (dim, precision, rescore), rows in sorted(by_search.items(), key=lambda item: item[0][0]):
        row = next(iter(rows.values()))
        cells = [dim, precision, rescore, row["scanned_bytes"] // row["vectors"]]
        for n in sizes:
            cells += [f"{rows[n]['recall']:.3f}", f"{rows[n]['time']:.2f}"] if n in rows else ["", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    results |= {"k": K, "queries": QUERIES, "rounds": ROUNDS, "note": "time is over that of float32 in the same round"}
    for n in options.sizes:
        for dim in options.dims:
            if n * dim * 4 > LARGEST_GB * 1e9:
                print(f"{n:,} vectors of {dim} dimensions are left out: more than {LARGEST_GB} GB")
                continue
            others = [row for row in results["rows"] if (row["vectors"], row["dim"]) != (n, dim)]
            measured = [row | {"threads": faiss.omp_get_max_threads()} for row in measure(n, dim)]
            results["rows"] = sorted(others + measured, key=lambda row: (row["vectors"], row["dim"]))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    shown = table(results)
    PAGE.write_text(MARKED.sub(lambda m: m[1] + shown + m[2], PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
