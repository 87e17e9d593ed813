"""Copy the adapters of a run to data_samples/adapters, in half precision, and make what the demo ships of them.

    python scripts/ship_models.py runs/tiny
    python scripts/ship_models.py              the adapters are there already: the demo's vectors alone

The processor is not copied: a shipped adapter takes that of its base, data_samples/q3vl-tiny.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from q3vl_mini.backbone import cast_file
from q3vl_mini.demo.gallery import make_gallery
from q3vl_mini.demo.models import Models
from q3vl_mini.demo.shelf import Shelf

DATA = Path(__file__).resolve().parents[1] / "data_samples"
ADAPTERS, GALLERY = DATA / "adapters", DATA / "gallery"
SHIPPED = ("s0", "s1", "reranker", "s2", "s3")
FILES = ("adapter_config.json", "adapter_model.safetensors", "q3vl_mini.json", "quantizers.safetensors", "README.md")


def ship(run: Path, adapters: Path = ADAPTERS) -> None:
    """Replace `adapters` by the models of a finished run."""
    missing = [stage for stage in SHIPPED if not (run / stage / "metrics.json").is_file()]
    if missing:
        raise SystemExit(f"{run} has not finished {', '.join(missing)}; run q3vl-mini run --folder {run} first")
    shutil.rmtree(adapters, ignore_errors=True)
    for stage in SHIPPED:
        folder = adapters / stage
        folder.mkdir(parents=True)
        for name in FILES:
            if (run / stage / "model" / name).is_file():
                shutil.copyfile(run / stage / "model" / name, folder / name)
        cast_file(folder / "adapter_model.safetensors", torch.float16)
        for file in folder.iterdir():
            file.chmod(0o644)


def ship_gallery(folder: Path = GALLERY, models: Models | None = None) -> Path:
    """Replace `folder` by the gallery's vectors of the model that the demo begins with, the last one."""
    models = models or Models()
    shutil.rmtree(folder, ignore_errors=True)
    with TemporaryDirectory() as scratch:
        file = Shelf("Gallery", make_gallery(), scratch).ship(models, models.names[-1], folder)
    file.chmod(0o644)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a finished run")
    options = parser.parse_args()
    if options.run:
        ship(options.run)
    print(ship_gallery())
