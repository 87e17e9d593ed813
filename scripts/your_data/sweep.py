"""One setting of the fine-tuning changed at a time, on given data sets: what the defaults are chosen by.

    python scripts/your_data/sweep.py runs/your_data/icons runs/your_data/translations/pairs.csv --model s3 \\
        --folder runs/sweep --results results/your_data/sweep.json [--rows 256] [--epochs 1]

For each data set and setting: the score on the validation split (MRR@10) before and after. Every run sees as
many queries, so a batch of half the size has twice the steps; only where the epochs are changed do the queries change.
The test split is not looked at. A run that is in the results is not made again.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from q3vl_mini.finetune import Budget, Job, finetune_preset, mine, train_embedder
from q3vl_mini.records import Quadruple
from q3vl_mini.report import write_json
from q3vl_mini.stages import Run
from q3vl_mini.survey import survey

GRID = {
    "temperature": (0.01, 0.03, 0.1),
    "lr": (1e-3, 3e-3, 1e-2),
    "batch_size": (16, 32),
    "n_negatives": (0, 1, 2),
    "epochs": (1.0, 2.0, 4.0, 8.0),
}


def settings(usual: dict[str, float]) -> list[dict[str, float]]:
    """The usual setting, and those that differ from it in one value."""
    return [usual] + [usual | {name: x} for name, values in GRID.items() for x in values if x != usual[name]]


class Sweep:
    """A data set that is surveyed and mined once, and a training for each setting."""

    def __init__(self, data: str, model: str, folder: Path, rows: int, validation_rows: int):
        self.model, self.folder = model, folder
        self.first = Run(finetune_preset(model), folder / "mining", progress=False, tracker="none")
        splits = survey(data, media=folder / "media", seed=self.first.preset.seed, progress=False).splits
        self.train = mine(self.first, self.first.model("raw"), drawn(splits["train"], rows))
        self.validation = drawn(splits["validation"], validation_rows)

    def score(self, setting: dict[str, float]) -> dict[str, Any]:
        """Train with a setting: the validation split's score before and after, and the seconds."""
        changes = [f"stages.embedder.{name}={x}" for name, x in setting.items() if name != "epochs"]
        name = "-".join(f"{name}={x:g}" for name, x in setting.items())
        run = Run(finetune_preset(self.model, changes=changes), self.folder / name, progress=False, tracker="none")
        run.store, began = self.first.store, time.monotonic()  # the vision tower is frozen: features are made once
        once = {"looks": 1, "patience": 1, "trainings": 1, "started": began, "measuring": 0.0, "forget": 0.0}
        job = Job(run, self.train, self.validation, Budget(), setting["epochs"], **once)
        train_embedder(job)
        before, after = (check["score"] for check in run.metrics("embedder")["checks"])
        return {"before": before, "after": after, "seconds": round(time.monotonic() - began)}


def drawn(quadruple: Quadruple, rows: int) -> Quadruple:
    """At most `rows` of the queries, the same ones each time, and the whole corpus."""
    return quadruple.select(sorted(random.Random(0).sample(range(len(quadruple)), min(rows, len(quadruple)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--model", default="s3")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256, help="training queries (default 256)")
    parser.add_argument("--validation-rows", type=int, default=60, help="validation queries (default 60)")
    parser.add_argument("--epochs", type=float, default=1.0, help="of every run (default 1)")
    options = parser.parse_args()
    about = {"model": options.model, "rows": options.rows, "validation_rows": options.validation_rows}
    found = {"about": about, "runs": []}
    if options.results.is_file():
        found = json.loads(options.results.read_text())
    stage = finetune_preset(options.model).stages["embedder"]
    usual = {name: getattr(stage, name, options.epochs) for name in GRID}
    for data in options.data:
        name = Path(data).stem if Path(data).is_dir() else Path(data).parent.name
        done = [run["setting"] for run in found["runs"] if run["data"] == name]
        left = [setting for setting in settings(usual) if setting not in done]
        if left:
            sweep = Sweep(data, options.model, options.folder / name, options.rows, options.validation_rows)
        for setting in left:
            run = {"data": name, "setting": setting, **sweep.score(setting)}
            found["runs"].append(run)
            write_json(options.results, found, indent=1)
            print(name, setting, run["before"], run["after"], run["seconds"], flush=True)


if __name__ == "__main__":
    main()
