"""One setting of the fine-tuning changed at a time, on given data sets: what the defaults are chosen by.

    python scripts/your_data/sweep.py runs/your_data/icons runs/your_data/translations/pairs.csv --model s3 \\
        --folder runs/sweep --results results/your_data/sweep.jsonl [--steps 200]

A line a run: the data, the change, the best score on the validation split, and the score there before. The test split
is not looked at. A run whose line is there is not made again.
"""

import argparse
import json
import time
from pathlib import Path

from q3vl_mini.finetune import Budget, Job, finetune_preset, mine, train_embedder
from q3vl_mini.stages import Run
from q3vl_mini.survey import survey

GRID = {
    "temperature": (0.02, 0.03, 0.05, 0.1),
    "lr": (2e-4, 5e-4, 1e-3, 2e-3),
    "batch_size": (16, 32, 64, 128),
    "n_negatives": (0, 1, 2, 4),
}


def best_of(data: str, model: str, folder: Path, changes: list[str], steps: int | None, epochs: float) -> dict:
    """Train the embedder once with a setting: the looks at the validation split, and the seconds."""
    run = Run(finetune_preset(model, changes=changes), folder, progress=False, tracker="none")
    base, began = run.model("raw"), time.monotonic()
    splits = survey(data, media=folder / "media", budget=run.budget, seed=run.preset.seed, progress=False).splits
    train = mine(run, base, splits["train"])
    job = Job(run, train, splits["validation"], Budget(steps=steps), epochs, 8, 3, 1, began, 0.0)
    train_embedder(job)
    metrics = run.metrics("embedder")
    best, seconds = metrics["best"], round(time.monotonic() - began, 1)
    return {"before": metrics["checks"][0]["score"], "best": best["score"], "step": best["step"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--model", default="s3")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of every run (default: what the epochs take)")
    parser.add_argument("--epochs", type=float, nargs="+", default=[8.0], help="also a setting: the first is the usual")
    options = parser.parse_args()
    done = set()
    if options.results.is_file():
        lines = map(json.loads, options.results.read_text().splitlines())
        done = {(line["data"], line["change"]) for line in lines}
    settings = [("as it is", [], options.epochs[0])]
    settings += [(f"epochs={e:g}", [], e) for e in options.epochs[1:]]
    for name, values in GRID.items():
        settings += [(f"{name}={x:g}", [f"stages.embedder.{name}={x}"], options.epochs[0]) for x in values]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(options.data):
        for change, changes, epochs in settings:
            if (Path(data).name, change) in done:
                continue
            folder = options.folder / f"{number}-{change.replace(' ', '-')}"
            row = best_of(data, options.model, folder, changes, options.steps, epochs)
            with open(options.results, "a") as file:
                file.write(json.dumps({"data": Path(data).name, "change": change, **row}) + "\n")
            print(Path(data).name, change, row, flush=True)


if __name__ == "__main__":
    main()
