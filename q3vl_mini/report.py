"""What is reported of models and runs: records, the stage table, the results file, the figures."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .disk import write_whole
from .evaluate import COLUMNS, ColumnResult, DatasetResult

META_KEYS = ("git", "versions", "seed", "preset", "cores", "wall_s", "peak_rss_mb", "stage_wall_s")


def result_records(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{model: {column: record, "mean": {"score"}, "datasets": {...}}}, the `models` of results/tiny.json.

    Takes ColumnResults or such records, so tables are made from a run or from its file alike. The mean
    is None for a model that lacks a column another model has: it would not be comparable.

    Taught in notebooks/14
    """
    if not models:
        raise ValueError("no models; expected {model: {column: ColumnResult}}")
    for model, columns in models.items():
        unknown = set(columns) - {*COLUMNS, "mean", "datasets"}
        if unknown or not any(c in COLUMNS for c in columns):
            raise ValueError(f"{model}: columns {sorted(columns)}; expected at least one and only {list(COLUMNS)}")
    present = [c for c in COLUMNS if any(c in columns for columns in models.values())]
    records: dict[str, dict[str, Any]] = {}
    for model, columns in models.items():
        entry: dict[str, Any] = {}
        datasets = dict(columns.get("datasets", {}))
        for c in present:
            if isinstance(columns.get(c), ColumnResult):
                entry[c] = _record(columns[c])
                datasets |= {d.name: {"column": c, **_record(d)} for d in columns[c].datasets}
            elif c in columns:
                entry[c] = dict(columns[c])
        complete = len(entry) == len(present)
        mean = float(np.mean([r["score"] for r in entry.values()])) if complete else None
        records[model] = {**entry, "mean": {"score": mean}}
        if datasets:
            records[model]["datasets"] = datasets
    return records


def _record(result: DatasetResult | ColumnResult) -> dict[str, Any]:
    return {
        "score": result.score,
        "metric": result.metric,
        "n_queries": result.n_queries,
        "n_candidates": result.n_candidates,
        "chance": result.chance,
        "ci": list(result.ci),
    }


def stage_table(results: Mapping[str, Mapping[str, Any]], intervals: bool = False) -> str:
    """Markdown table like the report's table 6, in percent: a row a model, then chance and candidates.

    results: {model: {column: ColumnResult or its record}}. intervals adds the bootstrap interval.

    Taught in notebooks/14
    """
    records = result_records(results)
    columns = [c for c in COLUMNS if any(c in r for r in records.values())]
    labels = {c: next(r[c] for r in records.values() if c in r) for c in columns}

    def cell(record: Mapping[str, Any] | None) -> str:
        if record is None or record["score"] is None:
            return "–"
        score = f"{100 * record['score']:.1f}"
        if not intervals or "ci" not in record:
            return score
        return score + f" [{100 * record['ci'][0]:.1f}, {100 * record['ci'][1]:.1f}]"

    lines = [["model", *columns, "mean"], ["---"] + ["---:"] * (len(columns) + 1)]
    lines += [[model, *(cell(r.get(c)) for c in columns), cell(r["mean"])] for model, r in records.items()]
    chances = [labels[c]["chance"] for c in columns]
    lines.append(["chance", *(f"{100 * chance:.1f}" for chance in chances), f"{100 * np.mean(chances):.1f}"])
    lines.append(["candidates", *(f"{labels[c]['n_candidates']:.0f}" for c in columns), ""])
    lines.append(["metric", *(labels[c]["metric"] for c in columns), ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(
    path: str | Path,
    meta: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    unseen_styles: Mapping[str, Mapping[str, float]],
) -> None:
    """Write results/tiny.json: meta, models and unseen_styles, replaced in one move.

    Raises ValueError if meta or a row of unseen_styles lacks a key, or a number is nan.

    Taught in notebooks/14
    """
    missing = [key for key in META_KEYS if key not in meta]
    if missing:
        raise ValueError(f"meta lacks {missing}; expected {list(META_KEYS)}")
    for model, row in unseen_styles.items():
        if set(row) != {"hit@1", "hit@10", "n"}:
            raise ValueError(f"unseen_styles of {model}: keys {sorted(row)}; expected hit@1, hit@10 and n")
    content = {"meta": dict(meta), "models": result_records(models), "unseen_styles": dict(unseen_styles)}
    write_json(path, content, indent=1, ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, content: Any, **options: Any) -> None:
    """Write JSON in one move, so that what exists is whole; `options` go to json.dumps."""
    write_whole(Path(path), json.dumps(content, **options) + "\n")


MARKED = re.compile(r"(<!-- ([\w:-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)  # a table in a page


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its two markers, <!-- NAME:begin --> and <!-- NAME:end -->."""
    return MARKED.sub(lambda m: m[1] + tables.get(m[2], "Not measured yet.\n") + m[3], page)


def rewrite(page: Path, text: str, check: bool = False) -> bool:
    """Make `text` the page, or with `check` only compare; whether it was that before."""
    same = page.read_text(encoding="utf-8") == text
    if not (check or same):
        page.write_text(text, encoding="utf-8")
    return same


def git_revision() -> str:
    """The checkout's commit, with "+changes" if files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        ask = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        revision = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = ask(["git", "status", "--porcelain", "--untracked-files=no", "--", "."]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+changes" if changed else "")


PANELS = {
    "Images": ("image_cls", "image_qa", "image_ret", "image_gd"),
    "Video": ("video_cls", "video_qa", "video_ret", "video_mret"),
    "Documents and text": ("visdoc", "text_ret", "text_cls", "sts", "cross_lingual"),
}
# Okabe and Ito's colours, told apart by marker too; black is kept for the mean.
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))


def plot_stage_table(results: Mapping[str, Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Slope chart of the stage table: chance, then the models from left to right, a line a column.

    Bars are bootstrap intervals; the black line in each panel is the mean over all columns. Saves to
    `path` if given, without touching a notebook's backend, and returns the figure.

    Taught in notebooks/14
    """
    records = result_records(results)
    models = list(records)
    panels = {t: [c for c in names if any(c in r for r in records.values())] for t, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(1.6 + 3.6 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        labels = []
        for column, (colour, marker) in zip(columns, LINES, strict=False):
            known = [(x, r[column]) for x, r in enumerate(records.values(), start=1) if column in r]
            xs, scores = [x for x, _ in known], 100 * np.array([r["score"] for _, r in known])
            spread = np.abs(100 * np.array([r["ci"] for _, r in known]).T - scores)  # (2, models)
            axis.plot([0, xs[0]], [100 * known[0][1]["chance"], scores[0]], color=colour, linestyle=":", marker="_")
            axis.errorbar(xs, scores, yerr=spread, color=colour, marker=marker, capsize=2, linewidth=1.6)
            labels.append((scores[-1], f"{column} {scores[-1]:.0f}", colour))
        overall = [(x, r["mean"]["score"]) for x, r in enumerate(records.values(), start=1)]
        means = [(x, 100 * score) for x, score in overall if score is not None]
        if means:
            axis.plot(*zip(*means, strict=True), color="black", linewidth=2.4, alpha=0.6)
            labels.append((means[-1][1], f"mean {means[-1][1]:.0f}", "black"))
        for y, (_, text, colour) in zip(_spread([y for y, _, _ in sorted(labels)], 4.5), sorted(labels), strict=True):
            axis.annotate(text, (len(models) + 0.15, y), color=colour, fontsize=8, va="center", annotation_clip=False)
        axis.set(title=title, xlim=(-0.2, len(models) + 0.15 + 0.34 * (len(models) + 1)))
        axis.set_xticks(range(len(models) + 1), ["chance", *models], rotation=30, ha="right")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("score, % (metric of each column)")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, their mean kept, so that labels do not overlap."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [height - shift for height in moved]


def plot_path(
    points: Sequence[Mapping[str, float]],
    marks: Mapping[str, Mapping[str, float]] | None = None,
    path: str | Path | None = None,
    ends: tuple[str, str] = ("s1", "s2"),
) -> Figure:
    """Scores on the way from one model to another (combine.path_scores): a line a column over t, the mean in black.

    marks: models that stand beside the path, {name: {"t", column: score, ..., "mean"}}, each a star at its t. Saves
    to `path` if given, and returns the figure.
    """
    if len(points) < 2:
        raise ValueError(f"a path of {len(points)} points; give at least its two ends")
    panels = {title: [c for c in names if c in points[0]] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(1.2 + 3.2 * len(panels), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    ts = [point["t"] for point in points]
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        looks = dict(zip(columns, LINES, strict=False)) | {"mean": ("black", ".")}
        for column, (colour, marker) in looks.items():
            scores = [100 * point[column] for point in points]
            axis.plot(ts, scores, color=colour, marker=marker, linewidth=1.6, label=column)
            for mark in (marks or {}).values():
                axis.plot(mark["t"], 100 * mark[column], "*", color=colour, markersize=13, markeredgecolor="black")
        axis.set(title=title, xlabel=f"t: {ends[0]} at 0, {ends[1]} at 1")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("score, %" + "".join(f"; star: {name}" for name in marks or {}))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def plot_curve(log: list[dict[str, Any]], path: str | Path, title: str) -> Figure:
    """The loss of each step, and its running mean."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
    axis.plot(steps, losses, color="#56B4E9", linewidth=0.8, alpha=0.6, label="loss")
    running = [losses[0]]
    for loss in losses[1:]:
        running.append(0.95 * running[-1] + 0.05 * loss)
    axis.plot(steps, running, color="#0072B2", linewidth=2, label="running mean")
    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return figure
