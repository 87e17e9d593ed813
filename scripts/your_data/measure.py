"""Fine-tune on one of the outside data sets, measure the plain baselines on the same held-out queries, keep both.

    python scripts/your_data/measure.py runs/your_data/icons --model s3 --folder runs/icons --budget 10m \\
        --results results/your_data/icons.json [--set stages.embedder.lr=5e-4]

The data set is what one of the builders beside this file wrote.
"""

import argparse
from pathlib import Path

from q3vl_mini.baselines import Bm25, Pictures, ThroughTraining, colour_histogram, pixels, score_with
from q3vl_mini.evaluate import DatasetResult
from q3vl_mini.finetune import finetune
from q3vl_mini.records import Quadruple
from q3vl_mini.report import write_json

SOURCES = ("metadata.jsonl", "pairs.jsonl", "pairs.csv")


def plain(train: Quadruple, test: Quadruple) -> dict[str, DatasetResult]:
    """The baselines that can be asked these queries: BM25 for texts, pictures compared directly or through training."""
    results = {}
    query, document = test.queries[0], test.corpus[0]
    if "text" in query and "text" in document:
        results["BM25"] = score_with(Bm25(test.corpus), test)
    if "image" in document:
        for name, feature in (("colour histogram", colour_histogram), ("pixels", pixels)):
            direct = "image" in query
            scorer = Pictures(test.corpus, feature) if direct else ThroughTraining(train, test.corpus, feature)
            results[name if direct else f"BM25 to training queries, then {name}"] = score_with(scorer, test)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="s3")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--budget")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    [table] = [options.data / name for name in SOURCES if (options.data / name).is_file()]
    data = options.data if table.name == "metadata.jsonl" else table
    made = finetune(data, options.model, options.folder, budget=options.budget, changes=options.set)
    baselines = {
        name: {"score": result.score, "ci": list(result.ci), "metric": result.metric}
        for name, result in plain(made.splits["train"], made.splits["test"]).items()
    }
    write_json(options.results, made.verdict | {"baselines": baselines, "budget": options.budget}, indent=1)
    for name, result in baselines.items():
        print(f"{name}: {result['metric']} {result['score']:.3f} {result['ci'][0]:.3f} to {result['ci'][1]:.3f}")


if __name__ == "__main__":
    main()
