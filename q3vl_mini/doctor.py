"""What this machine can run, what is missing, and what to do about it."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from .backbone import resolve
from .config import data_dir
from .machine import fast_cpu_dtype

GB = 2**30
# packages that are not needed to train, by what they are for and the extra that installs them
OPTIONAL = {
    "gradio": ("the demo", "demo"),
    "jupyterlab": ("the course", "notebooks"),
    "lancedb": ("collections on disk", "lancedb"),
    "qdrant_client": ("a Qdrant server", "qdrant"),
    "deepspeed": ("ZeRO on several GPUs", "deepspeed"),
    "sentence_transformers": ("exports, loaded by it", "test"),
    "mteb": ("evaluation with mteb", "eval"),
    "pypdfium2": ("pages of PDF files", "pdf"),
    "jsonschema": ("synthesis by an annotator", "synthesis"),
    "tensorboard": ("training curves in TensorBoard", "tensorboard"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. state: "ok", "missing" (something will fail) or "note" (worth knowing)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor() -> list[Check]:
    """Every check, in the order of installing: Python, packages, hardware, data, models, the Hub; then the presets."""
    groups = (_python, _packages, _hardware, _data, _optional, _hub, _presets)
    return [check for group in groups for check in group()]


def _python() -> Iterator[Check]:
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Check(
        "Python", "ok" if supported else "missing", platform.python_version(), "" if supported else "use 3.11 to 3.13"
    )


def _packages() -> Iterator[Check]:
    for name in ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "faiss-cpu", "av"):
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "missing", "not installed", "pip install -r requirements.txt")


def _hardware() -> Iterator[Check]:
    memory, cores = psutil.virtual_memory(), os.cpu_count() or 1
    enough = memory.total >= 7 * GB
    yield Check(
        "memory",
        "ok" if enough else "note",
        f"{memory.total / GB:.1f} GB, {memory.available / GB:.1f} free",
        "" if enough else "the preset tiny is made for 8 GB",
    )
    fast = fast_cpu_dtype() is torch.bfloat16
    found = f"{cores} cores, fastest in {'bfloat16' if fast else 'float32'}"
    yield Check("CPU", "ok", found, "" if fast else "the preset tiny takes several times as long as in a fast bfloat16")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            bf16 = torch.cuda.is_bf16_supported(False)
            found = f"{gpu.name}, {gpu.total_memory / GB:.0f} GB, {'bfloat16' if bf16 else 'float16 only'}"
            yield Check(f"GPU {i}", "ok", found, "`q3vl-mini plan --preset colab` says what fits")
    else:
        yield Check("GPU", "note", "none that torch can use", "the preset tiny needs none; colab and full do")
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= 2 * GB
    yield Check("disk", "ok" if enough else "note", f"{free / GB:.0f} GB free here", "" if enough else "a run wants 2")


def _data() -> Iterator[Check]:
    yield _tried("data_samples", lambda: str(data_dir()), "run from a checkout, or set Q3VL_MINI_DATA to the folder")
    for name in ("q3vl-tiny", "s3", "reranker"):
        remedy = "`q3vl-mini run` makes it" if name != "q3vl-tiny" else "`q3vl-mini pretrain` makes it"
        shipped = Path("q3vl-tiny") if name == "q3vl-tiny" else Path("adapters", name)
        yield _tried(f"model {name}", lambda shipped=shipped: str(resolve(data_dir() / shipped)), remedy)


def _tried(name: str, find: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, "ok", find())
    except FileNotFoundError as error:
        return Check(name, "missing", str(error).split(";")[0], remedy)


def _optional() -> Iterator[Check]:
    for name, (purpose, extra) in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        remedy = "" if there else f"for {purpose}: pip install 'q3vl-mini[{extra}]'"
        yield Check(name, "ok" if there else "note", "installed" if there else "not installed", remedy)


def _hub() -> Iterator[Check]:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        yield Check("Hub", "note", "HF_HUB_OFFLINE is set", "unset it to download Qwen3-VL; tiny needs no Hub")
    else:
        yield Check("Hub", "ok", "downloads are allowed")


def _presets() -> Iterator[Check]:
    """What this machine can run. `full` is planned for 80 GB a GPU, `colab` for the 16 GB of a T4, of which 15 show."""
    yield _tried("preset tiny", lambda: resolve("q3vl-tiny") and "runs on this CPU", "`q3vl-mini pretrain` comes first")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    largest = max((torch.cuda.get_device_properties(i).total_memory / GB for i in range(count)), default=0)
    for name, needed in (("colab", 14), ("full", 70)):
        fits = largest >= needed
        found = f"{count} GPUs, the largest of {largest:.0f} GB" if count else "no GPU"
        remedy = f"`q3vl-mini run --preset {name} --dry-run{' real' if fits else ''}` goes through it"
        yield Check(f"preset {name}", "ok" if fits else "note", found, remedy)


def doctor_table(checks: list[Check]) -> str:
    """The checks as lines: a mark, the name, what was found, the remedy."""
    marks = {"ok": "ok     ", "missing": "MISSING", "note": "note   "}
    width = max(len(check.name) for check in checks)
    lines = [f"{marks[c.state]}  {c.name:<{width}}  {c.found}{f' ({c.remedy})' if c.remedy else ''}" for c in checks]
    return "\n".join(lines)
