"""Fine-tune on one of the outside data sets, measure the plain baselines on the same held-out queries, keep both.

    python scripts/your_data/measure.py runs/your_data/icons --model s3 --folder runs/icons --budget 10m \\
        --results results/your_data/icons.json [--set stages.embedder.lr=5e-4]

The data set is what one of the builders beside this file wrote. The results are the verdict, the baselines, the
survey's counts, the settings that were chosen (lambda, the looks at the validation split), the source of the data, this
command, and what it ran on.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from q3vl_mini.baselines import Bm25, Pictures, ThroughTraining, colour_histogram, pixels, score_with
from q3vl_mini.evaluate import DatasetResult
from q3vl_mini.finetune import finetune, finetune_preset
from q3vl_mini.machine import fast_cpu_dtype
from q3vl_mini.pages import PdfPage, open_pdf
from q3vl_mini.records import Quadruple
from q3vl_mini.report import write_json

SETTINGS = ("lr", "batch_size", "n_negatives", "temperature")
SOURCES = ("metadata.jsonl", "pairs.jsonl", "pairs.csv")


def text_of(page: PdfPage) -> str:
    """The words that the PDF file has for a page, which a model has to read off the picture."""
    with open_pdf(page.path) as document:
        return document[page.number - 1].get_textpage().get_text_range()


def plain(train: Quadruple, test: Quadruple) -> dict[str, DatasetResult]:
    """The baselines that can be asked these queries: BM25 for texts, pictures compared directly or through training.

    BM25 also reads the words of PDF pages, though the model is not given them.
    """
    results = {}
    query, document = test.queries[0], test.corpus[0]
    if isinstance(document.get("image"), PdfPage):
        pages = [{"text": text_of(page["image"])} for page in test.corpus]
        results["BM25 on the file's own words"] = score_with(Bm25(pages), test)
    if "text" in query and "text" in document:
        results["BM25"] = score_with(Bm25(test.corpus), test)
    if "image" in document:
        for name, feature in (("colour histogram", colour_histogram), ("pixels", pixels)):
            direct = "image" in query
            scorer = Pictures(test.corpus, feature) if direct else ThroughTraining(train, test.corpus, feature)
            results[name if direct else f"BM25 to training queries, then {name}"] = score_with(scorer, test)
    return results


def table_of(folder: Path) -> Path:
    """What finetune() takes of a builder's folder: its table, or the folder if the pictures have a metadata.jsonl."""
    [table] = [folder / name for name in SOURCES if (folder / name).is_file()]
    return folder if table.name == "metadata.jsonl" else table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="s3")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--budget")
    parser.add_argument("--looks", type=int, default=8, help="at the validation split (default 8)")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    spent = {"budget": options.budget, "looks": options.looks}
    made = finetune(table_of(options.data), options.model, options.folder, **spent, changes=options.set)
    baselines = {
        name: {"score": result.score, "ci": list(result.ci), "metric": result.metric}
        for name, result in plain(made.splits["train"], made.splits["test"]).items()
    }
    folder, settings = options.folder, finetune_preset(options.model, changes=options.set).stages["embedder"]
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "source": json.loads((options.data / "source.json").read_text()),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        | {"threads": torch.get_num_threads(), "bfloat16": fast_cpu_dtype() is torch.bfloat16},
        "survey": {name: x for name, x in json.loads((folder / "survey.json").read_text()).items() if name != "faults"},
        "dropped": len(json.loads((folder / "mined.json").read_text())["dropped"]),
        "lambda": json.loads((folder / "merged" / "metrics.json").read_text())["lambda"],
        "training": json.loads((folder / "embedder" / "metrics.json").read_text()),
        "baselines": baselines,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
    }
    write_json(options.results, made.verdict | facts, indent=1)
    for name, result in baselines.items():
        print(f"{name}: {result['metric']} {result['score']:.3f} {result['ci'][0]:.3f} to {result['ci'][1]:.3f}")


if __name__ == "__main__":
    main()
