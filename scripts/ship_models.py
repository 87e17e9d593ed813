"""Copy the adapters of a run to data_samples/adapters, in half precision.

    python scripts/ship_models.py runs/tiny

The processor is not copied: a shipped adapter takes that of its base, data_samples/q3vl-tiny.
"""

import argparse
import shutil
from pathlib import Path

import torch

from q3vl_mini.backbone import cast_file

ADAPTERS = Path(__file__).resolve().parents[1] / "data_samples" / "adapters"
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    ship(parser.parse_args().run)
