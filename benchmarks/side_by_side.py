"""Ways to do the same work, timed in turn in one process: A, B, A, B, ...

A machine that has other work to do is slower now and faster then, for all ways alike within one round. So a round gives
a ratio, and the result is the median of the rounds' ratios.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "results" / "performance"


def seconds_of(ways: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each way in each round. Let each run before on a little, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(compared: str, over: Sequence[float], under: Sequence[float], sense: str, *bar: float) -> dict[str, Any]:
    """A line of the results: the median of over / under by rounds, its range, and whether it reaches the bar.

    sense: "at least" or "at most" one bar, or "within" two.
    """
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    line = number(compared, statistics.median(ratios), sense, *bar)
    line["range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    line["medians"] = [float(f"{statistics.median(x):.4g}") for x in (over, under)]
    return line | {"rounds": len(ratios)}


def number(compared: str, value: float, sense: str | None = None, *bar: float) -> dict[str, Any]:
    """A line of the results: one number, and whether it reaches the bar, if it has one."""
    if sense is None:
        return {"compared": compared, "value": round(value, 4)}
    met = {"at least": value >= bar[0], "at most": value <= bar[-1], "within": bar[0] <= value <= bar[-1]}[sense]
    return {"compared": compared, "value": round(value, 4), "sense": sense, "bar": list(bar), "met": met}


def write(name: str, setting: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write results/performance/NAME.json and print it."""
    text = json.dumps({"setting": setting, "threads": torch.get_num_threads(), "rows": rows, **more}, indent=1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
