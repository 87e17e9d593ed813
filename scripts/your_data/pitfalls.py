"""What goes wrong when a fine-tuned model is used or judged in another way: measured on a run of measure.py.

    python scripts/your_data/pitfalls.py runs/your_data/icons --folder runs/icons --model s3 \\
        --results results/your_data/pitfalls.json

On the run's own test split: the verdict had there been fewer queries; the score with another instruction; with fewer
dimensions and smaller codes than were trained. And what a split by row, not by document, would have leaked. What the
results have of other sets stays.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import table_of

from q3vl_mini.compression import pack_binary, truncate, unpack_binary
from q3vl_mini.embedder import Embedder
from q3vl_mini.evaluate import evaluate_embedder, score_quadruple
from q3vl_mini.likeness import Likeness
from q3vl_mini.media import MediaBudget
from q3vl_mini.metrics import paired_bootstrap
from q3vl_mini.records import Quadruple
from q3vl_mini.report import write_json
from q3vl_mini.survey import survey
from q3vl_mini.verdict import word

OTHER = "Answer the question about the picture."


def fewer_queries(better: np.ndarray, base: np.ndarray) -> list[dict]:
    """The paired difference, had the test only so many of its queries, drawn once."""
    order = np.random.default_rng(0).permutation(len(base))
    found = []
    for n in sorted({25, 50, 100, 200, len(base)}):
        d = paired_bootstrap(better[order[:n]], base[order[:n]])
        found.append({"queries": min(n, len(base)), **d._asdict(), "word": word(d)})
    return found


def leaked(splits: dict[str, Quadruple]) -> dict[str, float]:
    """The share of test queries one of whose documents, or a near duplicate, is in training: by document and by row."""
    likeness, queries = Likeness(MediaBudget()), []
    for document in (d for quadruple in splits.values() for d in quadruple.corpus):
        likeness.see(document)
    for side, quadruple in splits.items():
        for labels in quadruple.relevance:
            queries.append((side, {likeness.near(quadruple.corpus[i]) for i in labels.positives}))
    drawn = [side for side, _ in queries]
    random.Random(0).shuffle(drawn)

    def share(sides: list[str]) -> float:
        seen = {key for side, (_, keys) in zip(sides, queries, strict=True) if side == "train" for key in keys}
        test = [keys for side, (_, keys) in zip(sides, queries, strict=True) if side == "test"]
        return sum(bool(keys & seen) for keys in test) / len(test)

    return {"by document": share([side for side, _ in queries]), "by row": share(drawn)}


def smaller(embedder: Embedder, test: Quadruple) -> dict[str, float]:
    """The score with fewer dimensions, and with one byte or one bit a dimension."""
    queries, corpus = embedder.encode(test.queries, instruction=test.instruction), embedder.encode(test.corpus)
    scores = {}
    for dim in (embedder.dim, 64, 32, 16):
        scores[f"{dim} dimensions"] = score_quadruple(truncate(queries, dim), truncate(corpus, dim), test).score
    signs = [unpack_binary(pack_binary(x)) for x in (queries, corpus)]
    return scores | {f"{embedder.dim} dimensions, one bit each": score_quadruple(*signs, test).score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="s3")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    splits = survey(table_of(options.data), progress=False).splits
    test = splits["test"]
    base, tuned = Embedder(options.model), Embedder(options.folder / "merged" / "model")
    results = {name: evaluate_embedder(model, [test])[test.task] for name, model in (("base", base), ("merged", tuned))}
    values = {name: column.datasets[0].values for name, column in results.items()}
    other = evaluate_embedder(tuned, [replace(test, instruction=OTHER)])[test.task]
    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    found[options.data.name] = {
        "fewer queries": fewer_queries(values["merged"], values["base"]),
        "instruction": {"its own": results["merged"].score, OTHER: other.score},
        "smaller vectors": smaller(tuned, test),
        "leaked": leaked(splits),
    }
    write_json(options.results, found, indent=1)


if __name__ == "__main__":
    main()
