"""Checkpoints of a training run: safetensors and JSON only, replaced in one step.

A checkpoint holds every tensor that the run needs to go on (weights, optimiser moments, random
generators) and a JSON file with the numbers. It is written beside the old one and moved into place,
so a run killed at any moment finds a whole checkpoint: the new one or the one before.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .disk import previous, replacing, write_whole

TENSORS, NUMBERS, SUMS = "state.safetensors", "state.json", "SHA256SUMS"  # the last is what `sha256sum -c` reads


def claim(file: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write down with which settings a folder is filled, or find that it was begun with the same.

    Args:
        file: of the folder, JSON. what: the folder's content, for the error.

    Raises:
        ValueError: it was begun with other settings; names those that differ.
    """
    if not file.is_file():
        write_whole(file, json.dumps(settings, indent=1) + "\n")
        return
    known, settings = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    if changed := [name for name in settings if known.get(name) != settings[name]]:
        raise ValueError(
            f"{file.parent} holds {what} with another {', '.join(changed)}; give another folder, or remove it "
            f"({file.name} has what it was made with)"
        )


def save_checkpoint(
    folder: Path, modules: dict, optimizers: list[dict], meta: dict[str, Any], keep_previous: bool = False
) -> None:
    """Write modules (name -> state dict of tensors), optimisers' state dicts and `meta` (JSON values) to `folder`.

    keep_previous: see `replacing`; `load_checkpoint` takes the one before where this one is damaged.

    Raises:
        OSError: it cannot be written, by its name; what was there is as it was.
    """
    folder = Path(folder)
    tensors, scalars = {}, {}
    for name, state in modules.items():
        tensors |= {f"{name}/{k}": v for k, v in state.items()}
    for i, optimizer in enumerate(optimizers):
        for row, values in optimizer["state"].items():
            for key, value in values.items():
                where = f"optimizer{i}/{row}/{key}"
                if isinstance(value, Tensor):
                    tensors[where] = value
                else:
                    scalars[where] = value
    with replacing(folder, keep_previous) as new:
        # safetensors refuses tensors that share memory (tied weights, views): copy what it gets
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, new / TENSORS)
        (new / NUMBERS).write_text(json.dumps({"meta": meta, "scalars": scalars}))
        (new / SUMS).write_text("".join(f"{_digest(new / name)}  {name}\n" for name in (TENSORS, NUMBERS)))


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of a checkpoint. ValueError names the file that is not as it was written."""
    name = SUMS
    try:
        sums = (folder / SUMS).read_text().splitlines() if (folder / SUMS).is_file() else []
        for line in sums:
            digest, _, name = line.partition("  ")
            if _digest(folder / name) != digest:
                raise ValueError(f"it is not what was written, see {SUMS}")
        name = NUMBERS
        record = json.loads((folder / NUMBERS).read_text())
        name = TENSORS
        return load_file(folder / TENSORS), record
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / name} cannot be used ({error})") from error


def load_checkpoint(folder: Path, optimizers: list) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(modules' state dicts, meta) of a checkpoint, the optimisers filled; None where there is none yet.

    Of a damaged one, the one before it if that was kept, with a warning.

    Raises:
        ValueError: all that is there is damaged; names the files.
    """
    folder = Path(folder)
    places, faults = [place for place in (folder, previous(folder)) if place.exists()], []
    for place in places:
        try:
            tensors, record = _read(place)
            break
        except ValueError as error:
            faults.append(str(error))
    else:
        if not places:
            return None
        raise ValueError(f"{'; '.join(faults)}; remove {' and '.join(map(str, places))} to start from the beginning")
    if faults:
        warnings.warn(f"{faults[0]}; going on from the checkpoint before it, {place}", stacklevel=3)
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        prefix = f"optimizer{i}/"
        for source in (tensors, record["scalars"]):
            for where, value in source.items():
                if where.startswith(prefix):
                    row, key = where[len(prefix) :].split("/", 1)
                    state.setdefault(int(row), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    modules: dict[str, dict[str, Tensor]] = {}
    for where, value in tensors.items():
        name, key = where.split("/", 1)
        if not name.startswith("optimizer"):
            modules.setdefault(name, {})[key] = value
    return modules, record["meta"]


def generator_state(generator: torch.Generator) -> dict[str, Tensor]:
    """A generator's state as a module state dict, for `save_checkpoint`."""
    return {"state": generator.get_state()}
