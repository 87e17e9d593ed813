"""What int8 and binary codes cost in recall and save in time and memory, by number of vectors and dimensions.

    python benchmarks/index_sizes.py --sizes 10000 100000   # these sizes anew, the others as they are in the results
    python benchmarks/index_sizes.py --sizes                # nothing anew

Writes results/index_sizes.json and the tables of docs/index.md.

Vectors: 100 around each of N / 100 random centres, normalise(centre + noise), with centre and noise normally
distributed and of equal length, so two of one cluster have a cosine near 1/2 and its hundred members differ by little.
Queries are drawn in the same way around the same centres. Recall@10 is the share of float32's ten that are found.

Time is that of one query at a time, in milliseconds and over that of float32 in the same round, both being measured in
turn; the medians of ROUNDS rounds. A size whose float32 vectors take more than --gb (default 2) is left out, so that
8 GB of memory are enough: three indexes, each with its float vectors, and what they take while they grow.
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

DIMS = (64, 128, 256, 512, 1024)
SEARCHES = [("float32", 0), ("int8", 0), ("int8", 4), ("binary", 0), ("binary", 4), ("binary", 16)]  # with rescore
HEAD = ["dim", "precision", "rescore", "recall@10", "ms a query", "of float32's", "scanned, MB", "kept to rescore, MB"]
K, QUERIES, TIMED, ROUNDS = 10, 200, 10, 7
CLUSTER, CHUNK = 100, 50_000


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


def times(made: dict[str, Index], queries: np.ndarray) -> dict[tuple[str, int], tuple[float, float]]:
    """The milliseconds a query of each search, and their ratio to float32's."""
    rounds = []
    for _ in range(1 + ROUNDS):  # the first is not counted
        taken = {}
        for precision, rescore in SEARCHES:
            start = time.perf_counter()
            for query in queries:
                made[precision].search(query[None], K, rescore)
            taken[precision, rescore] = 1000 * (time.perf_counter() - start) / len(queries)
        rounds.append(taken)
    counted = rounds[1:]
    ratios = {search: statistics.median(r[search] / r["float32", 0] for r in counted) for search in SEARCHES}
    return {search: (statistics.median(r[search] for r in counted), ratios[search]) for search in SEARCHES}


def measure(n: int, dim: int) -> list[dict]:
    """The rows of the results for one size: a row a search."""
    centres = np.random.default_rng([0, dim]).standard_normal((n // CLUSTER, dim), dtype=np.float32)
    made = indexes(n, centres)
    queries = vectors(centres, np.random.default_rng(2).integers(0, n, QUERIES), [3])
    exact = [{hit.id for hit in hits} for hits in made["float32"].search(queries, K)]
    taken = times(made, queries[:TIMED])
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
                "ms": round(taken[precision, rescore][0], 3),
                "time": round(taken[precision, rescore][1], 3),
                "scanned_bytes": size["codes"] or size["vectors"],
                "kept_bytes": size["vectors"] if size["codes"] and rescore else 0,
            }
        )
    return rows


def tables(results: dict) -> str:
    """Markdown: a table a number of vectors, a row a search."""
    lines = []
    for n in sorted({row["vectors"] for row in results["rows"]}):
        lines += [f"{n:,} vectors:", "", f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
        of_size = [row for row in results["rows"] if row["vectors"] == n]
        for row in sorted(of_size, key=lambda row: (row["dim"], SEARCHES.index((row["precision"], row["rescore"])))):
            scanned, kept = (row[name] / 1e6 for name in ("scanned_bytes", "kept_bytes"))
            cells = [row["dim"], row["precision"], row["rescore"] or "", f"{row['recall']:.3f}", f"{row['ms']:.2f}"]
            cells += [f"{row['time']:.2f}", f"{scanned:.1f}", f"{kept:.1f}" if kept else ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for dim in sorted(set(DIMS) - {row["dim"] for row in of_size}):
            lines += ["", f"{dim} dimensions are left out: their float vectors alone are {n * dim * 4 / 1e9:.1f} GB."]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--gb", type=float, default=2, help="of float32 vectors, at most (default 2)")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    results |= {"k": K, "queries": QUERIES, "rounds": ROUNDS, "note": "time is over that of float32 in the same round"}
    for n in options.sizes:
        for dim in options.dims:
            if n * dim * 4 > options.gb * 1e9:
                print(f"{n:,} vectors of {dim} dimensions are left out: more than {options.gb:g} GB")
                continue
            others = [row for row in results["rows"] if (row["vectors"], row["dim"]) != (n, dim)]
            measured = [row | {"threads": faiss.omp_get_max_threads()} for row in measure(n, dim)]
            results["rows"] = sorted(others + measured, key=lambda row: (row["vectors"], row["dim"]))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    shown = tables(results)
    PAGE.write_text(MARKED.sub(lambda m: m[1] + shown + m[2], PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
