"""Make everything again that the project trains and ships: the backbone, the run, the adapters, README's table.

    python scripts/remake_artifacts.py --folder runs/remake

Hours. Each part is resumable: called again with the same folder, it goes on where it was interrupted.
"""

import argparse
import shutil
from pathlib import Path

import ship_models
import update_performance
import update_readme

from q3vl_mini import pipeline
from q3vl_mini.config import load_preset
from q3vl_mini.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
BACKBONE, CURVES = ROOT / "data_samples" / "q3vl-tiny", ROOT / "results" / "pretraining"


def install_backbone(made: Path) -> None:
    """Replace the shipped backbone and the curves of its training, a folder a round."""
    shutil.copytree(made, BACKBONE, dirs_exist_ok=True)
    for curve in made.parents[1].glob("*/*.jsonl"):
        (CURVES / curve.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(curve, CURVES / curve.parent.name)
    for file in (*BACKBONE.iterdir(), *CURVES.glob("*/*")):
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "remake")
    parser.add_argument("--parts", nargs="*", default=["backbone", "run"], choices=["backbone", "run"])
    options = parser.parse_args()
    if "backbone" in options.parts:
        install_backbone(pretrain(options.folder / "pretrain"))
    if "run" in options.parts:
        pipeline.run(load_preset("tiny"), options.folder / "tiny", results=ROOT / "results" / "tiny.json")
        ship_models.ship(options.folder / "tiny")
        ship_models.ship_gallery()
        update_readme.write()
        update_performance.write()


if __name__ == "__main__":
    main()
