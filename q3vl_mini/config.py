"""Configuration: one frozen dataclass, filled from a preset (a TOML file) or a saved run."""

import os
from functools import cache
from pathlib import Path


@cache
def data_dir() -> Path:
    """The folder data_samples: of the checkout, of an installed wheel, or where Q3VL_MINI_DATA points."""
    package = Path(__file__).resolve().parent
    choices = [package.parent / "data_samples", package / "data_samples"]
    if os.environ.get("Q3VL_MINI_DATA"):
        choices.insert(0, Path(os.environ["Q3VL_MINI_DATA"]))
    for folder in choices:
        if (folder / "emoji_world" / "concepts.json").is_file():
            return folder
    raise FileNotFoundError(
        f"data_samples not found (looked at {', '.join(map(str, choices))}); run from a checkout of the "
        "repository, or set Q3VL_MINI_DATA to the folder"
    )
