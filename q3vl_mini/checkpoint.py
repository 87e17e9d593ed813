"""Checkpoints of a training run: safetensors and JSON only, replaced in one step.

A checkpoint holds every tensor that the run needs to go on (weights, optimiser moments, random
generators) and a JSON file with the numbers. It is written beside the old one and moved into place,
so a run killed at any moment finds a whole checkpoint: the new one or the one before.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def keep_log_until(log: Path, step: int) -> None:
    """Drop a JSON-lines log's rows after `step`: they were written after the checkpoint, and come again."""
    if log.is_file():
        rows = log.read_text().splitlines(keepends=True)
        log.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder` that takes its place at the end; after an error `folder` is as it was.

    Killed at any moment, `whole_folder` finds the new one or the one before.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def whole_folder(folder: Path) -> Path:
    """`folder`, or the one before it where `replacing` was killed between its two moves."""
    old = folder.with_name(folder.name + ".old")
    return old if old.exists() and not folder.exists() else folder


def claim(file: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write down with which settings a folder is filled, or find that it was begun with the same.

    Args:
        file: of the folder, JSON. what: the folder's content, for the error.

    Raises:
        ValueError: it was begun with other settings; names those that differ.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    known, settings = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    if changed := [name for name in settings if known.get(name) != settings[name]]:
        raise ValueError(
            f"{file.parent} holds {what} with another {', '.join(changed)}; give another folder, or remove it "
            f"({file.name} has what it was made with)"
        )


def save_checkpoint(folder: Path, modules: dict, optimizers: list, meta: dict[str, Any]) -> None:
    """Write modules (name -> state dict of tensors), optimisers and `meta` (JSON values) to `folder`."""
    folder = Path(folder)
    tensors, scalars = {}, {}
    for name, state in modules.items():
        tensors |= {f"{name}/{k}": v for k, v in state.items()}
    for i, optimizer in enumerate(optimizers):
        for row, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                where = f"optimizer{i}/{row}/{key}"
                if isinstance(value, Tensor):
                    tensors[where] = value
                else:
                    scalars[where] = value
    with replacing(folder) as new:
        # safetensors refuses tensors that share memory (tied weights, views): copy what it gets
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(json.dumps({"meta": meta, "scalars": scalars}))


def load_checkpoint(folder: Path, optimizers: list) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(modules' state dicts, meta) of a checkpoint, the optimisers filled; None where there is none yet."""
    folder = whole_folder(Path(folder))
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
    except Exception as error:
        remedy = "remove it to start the stage again"
        raise ValueError(f"the checkpoint {folder} cannot be read ({error}); {remedy}") from error
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
