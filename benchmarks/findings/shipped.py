"""The folder of the run whose models are shipped, without training: what the other findings read of seed 0.

    python benchmarks/findings/shipped.py runs/seed-0

Copies the adapters of data_samples/, and makes what a run keeps beside them: the vectors of the test split, what s0, s1
and s2 mined, the reranker's margins for s2. The adapters were rounded to float16 when they were shipped.
"""

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path

from q3vl_mini.config import data_dir, load_preset
from q3vl_mini.pipeline import evaluate_all
from q3vl_mini.report import write_json
from q3vl_mini.stages import Run, kept_teacher, mined_data

SHIPPED = ("s0", "s1", "reranker", "s2", "s3")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the run, new or begun by this script")
    run = Run(load_preset("tiny"), parser.parse_args().folder, tracker="none")
    with run.at_work():
        for stage in SHIPPED:
            model = run.folder / stage / "model"
            shutil.copytree(data_dir() / "adapters" / stage, model, dirs_exist_ok=True)
            card = json.loads((model / "q3vl_mini.json").read_text(encoding="utf-8"))
            write_json(run.folder / stage / "metrics.json", {"validation": card["validation"]})
        evaluate_all(run)
        data = {stage: mined_data(run, stage) for stage in ("s0", "s1", "s2")}
        kept_teacher(run, "s2", data["s2"])


if __name__ == "__main__":
    main()
