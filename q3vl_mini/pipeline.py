"""All stages and the evaluation of their models: what `q3vl-mini run` does."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from . import evaluate, report
from .choices import STAGES
from .config import Preset, load_config
from .emoji_world import tasks
from .memory import peak_memory_mb
from .records import Quadruple
from .reranker import Reranker
from .side_by_side import Job, work_off
from .stages import Run, clear_away, mine_share, run_stage, thinned, time_of

MODELS = ("raw", "s0", "s1", "s2", "s3", "s3+reranker")  # the rows of the stage table
MEMORY = "memory.json"  # of all processes together, where several worked side by side


def run(
    preset: Preset,
    folder: str | Path,
    seed: int | None = None,
    results: str | Path | None = None,
    progress: bool = True,
    tracker: str = "auto",
) -> Path:
    """All stages, then the stage table: printed, as `results` (JSON; default folder/results.json) and as a figure.

    Goes on where an interrupted run of the same configuration stopped. Returns the path of the results. Raises: see
    stages.run_stage.
    """
    preset = preset if seed is None else replace(preset, seed=seed)
    preset.require_adapters("a run, which ends with a merge,")
    r = Run(preset, folder, progress, tracker)
    with r.at_work():
        return _run(r, Path(results or r.folder / "results.json"), progress)


def _run(r: Run, results: Path, progress: bool) -> Path:
    stages = stages_of(r.preset)
    last = json.loads(results.read_text())["meta"] if results.is_file() else {}
    walls: dict[str, float] = {}

    def finished(stage: str) -> None:
        metrics = r.metrics(stage)
        walls[stage] = metrics["wall_s"]
        if r.is_main and progress:
            before, after = metrics["validation"].values()
            left = minutes_left(walls, last)
            told = f"; about {left:.0f} minutes left" if left else ""
            print(f"{stage}: {walls[stage]:.0f} s, validation {before} -> {after}{told}", flush=True)

    if (n := workers(r)) > 1:
        _side_by_side(r, n, jobs(r, n), lambda name: finished(name) if name in stages else None)
    for stage in stages:
        if stage not in walls:
            run_stage(r, stage)
            finished(stage)
    records, unseen = evaluate_all(r)
    if r.is_main:
        walls["evaluation"] = time_of(_worked(r.folder / "evaluation", "*.json"))
        print(f"\n{report.stage_table(records)}\n")
        report.write_results(results, run_meta(r, walls), records, unseen)
        report.plot_stage_table(records, results.with_suffix(".png"))
        print(f"evaluation {walls['evaluation']:.0f} s; models in {r.folder}, results in {results}")
    for tracker in r.accelerator.trackers:
        tracker.finish()
    r.accelerator.wait_for_everyone()
    return results


def stages_of(preset: Preset) -> list[str]:
    """The stages of a run, in their order."""
    return [stage for stage in STAGES if stage in preset.stages or stage == "s3"]


def minutes_left(walls: Mapping[str, float], last: Mapping[str, Any]) -> float | None:
    """What the rest takes if it goes as in an earlier run, at this run's pace; None if that had other stages.

    walls: seconds of the stages so far. last: `meta` of the earlier run's results.
    """
    before = last.get("stage_wall_s", {})
    if not set(walls) <= set(before):
        return None
    pace = sum(walls.values()) / sum(before[stage] for stage in walls)
    overlap = last["wall_s"] / sum(before.values())  # below 1 where stages ran side by side
    return pace * overlap * sum(seconds for stage, seconds in before.items() if stage not in walls) / 60


# --- several processes of one machine -----------------------------------------------------------------------


def workers(run: Run) -> int:
    """How many processes work side by side: on a CPU, where they are of no group, as many as the preset names, but no
    more than there are cores, and memory for."""
    preset = run.preset
    if run.accelerator.num_processes > 1 or run.accelerator.device.type != "cpu":
        return 1
    room = psutil.virtual_memory().available // (preset.worker_mb * 2**20) if preset.worker_mb else preset.workers
    return max(1, min(preset.workers, room, os.cpu_count() or 1))


def jobs(run: Run, n: int) -> list[Job]:
    """What n workers have to do for a run, the most urgent first: mining in n shares, stages, measurements.

    A stage waits for its mining, for the model that it starts from, and s2 for the reranker. What is mined for one
    stage and serves another is mined once.
    """
    preset, found = run.preset, list[Job]()
    mining: dict[str, list[str]] = {}  # by stage, the jobs that mine for it
    for stage in stages_of(preset):
        if run.finished(stage):
            continue
        config, after = preset.stages.get(stage), ["s1", "s2"] if stage == "s3" else []
        if config is not None:
            after = [config.start] + ["reranker"] * (stage == "s2")
            if config.mining is not None:
                mining[stage] = next((mining[other] for other in mining if _mines_the_same(preset, stage, other)), [])
                if not mining[stage]:
                    mining[stage] = [f"{stage}, mining {i + 1} of {n}" for i in range(n)]
                    shares = [_job(run, x, "mine_share", stage, i, n) for i, x in enumerate(mining[stage])]
                    found += [replace(job, after=(config.mining.miner,)) for job in shares]
                after += mining[stage]
        found.append(replace(_job(run, stage, "run_stage", stage), after=tuple(after)))
    found += measurements(run)
    known = {job.name for job in found}
    return [replace(job, after=tuple(x for x in job.after if x in known)) for job in found]


def measurements(run: Run) -> list[Job]:
    """A job for each model that is not measured yet; the reranker's, which takes longest, comes first."""
    left = [x for x in MODELS[::-1] if not (run.folder / "evaluation" / f"{x}.json").is_file()]
    after = {"raw": (), "s3+reranker": ("s3",)}
    return [replace(_job(run, f"measuring {x}", "evaluate_models", (x,)), after=after.get(x, (x,))) for x in left]


def _mines_the_same(preset: Preset, stage: str, other: str) -> bool:
    one, two = preset.stages[stage], preset.stages[other]
    return one.mining == two.mining and one.tasks.items() <= two.tasks.items()


def _job(run: Run, name: str, function: str, *arguments: Any) -> Job:
    given = ", ".join(map(repr, (str(run.folder.resolve()), run.progress, run.tracker, function, *arguments)))
    return Job(name, f"from q3vl_mini.pipeline import help_with; help_with({given})")


def help_with(folder: str, progress: bool, tracker: str, function: str, *arguments: Any) -> None:
    """Do a job of the run in `folder`, which another process holds."""
    run, doing = _helper(folder, progress, tracker), {f.__name__: f for f in (mine_share, run_stage, evaluate_models)}
    try:
        doing[function](run, *arguments)
    except (ValueError, OSError, FloatingPointError) as error:  # what the command line tells in a line too
        print(error, file=sys.stderr)
        sys.exit(1)


@cache
def _helper(folder: str, progress: bool, tracker: str) -> Run:
    """One for all jobs that a worker does: they share what the vision tower made of pictures."""
    return Run(load_config(Path(folder) / "config.json"), folder, progress, tracker, helps=True)


def _side_by_side(run: Run, n: int, todo: Sequence[Job], when_done: Callable[[str], None] = lambda name: None) -> None:
    """Do the jobs, keep how much memory all took together, and clear away what only helpers read."""
    if todo:
        clear_away(run)
        file = run.folder / MEMORY
        before = json.loads(file.read_text())["peak_rss_mb"] if file.is_file() else 0
        report.write_json(file, {"peak_rss_mb": max(before, work_off(todo, n, run.progress, when_done))})
    for share in run.folder.glob("*/share-*-of-*.json"):
        share.unlink()


# --- measuring ----------------------------------------------------------------------------------------------


def evaluate_all(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """(records of every model by column, single-object retrieval in the unseen styles), kept in folder/evaluation/.

    So are the vectors of every embedder: the reranker's row and later measurements (report's findings) start from them.
    Several processes take the models in turn.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    if (n := workers(run)) > 1:
        _side_by_side(run, n, [replace(job, after=()) for job in measurements(run)])
    else:
        evaluate_models(run, MODELS[::-1][rank::world])  # the reranker takes longest
    run.accelerator.wait_for_everyone()
    records, unseen = {}, {}
    for name in MODELS:
        content = json.loads((run.folder / "evaluation" / f"{name}.json").read_text())
        records[name] = content["columns"]
        unseen |= {name: content["unseen_styles"]} if content["unseen_styles"] else {}
    return records, unseen


def evaluate_models(run: Run, names: Sequence[str]) -> None:
    """Measure models of a run, each unless folder/evaluation/NAME.json is there."""
    data, folder = run.preset.data, run.folder / "evaluation"
    benchmark = styles = None  # drawn once, and only if something is left to evaluate
    for name in names:
        file = folder / f"{name}.json"
        if not file.is_file():
            began = time.time()
            if benchmark is None:
                benchmark = thinned(tasks.benchmark("test", data.test_rows, data.test_seed), data.test_documents)
                styles = tasks.unseen_styles(data.test_seed)
                if data.test_documents:  # a query each
                    styles = thinned([q.select(range(data.test_documents)) for q in styles], data.test_documents)
                run.look_at("test")
            embedder = "s3" if name == "s3+reranker" else name
            # two processes must not write the same vectors
            alone = run.accelerator.num_processes == 1 and not run.helps
            model, vectors = run.model(embedder), folder / (embedder if alone else name)
            if name == "s3+reranker":
                columns = evaluate.evaluate_reranker(
                    run.model("reranker", Reranker),
                    model,
                    benchmark,
                    top_k=data.rerank_top_k,
                    batch_size=data.batch_size,
                    progress=run.progress,
                    folder=vectors,
                )
                single = None  # thousands of pairs a percent: the table's columns show what the reranker does
            else:
                columns = evaluate.evaluate_embedder(model, benchmark, data.batch_size, run.progress, folder=vectors)
                single = unseen_scores(model, styles, data.batch_size, vectors)
            content = {"columns": report.result_records({name: columns})[name], "unseen_styles": single}
            content |= {"worked": [[began, time.time() - began]], "peak_rss_mb": peak_memory_mb()}
            report.write_json(file, content)


def unseen_scores(
    embedder: Any, styles: list[Quadruple], batch_size: int, folder: Path | None = None
) -> dict[str, float]:
    """Hit@1 and Hit@10 of single-object text-to-image retrieval, the mean over the styles, and the queries' number."""
    scores: dict[str, list[float]] = {"hit@1": [], "hit@10": []}
    for quadruple, queries, corpus in evaluate.encoded(embedder, styles, batch_size=batch_size, folder=folder):
        for metric, values in scores.items():
            values.append(evaluate.score_quadruple(queries, corpus, quadruple, metric=metric).score)
    return {metric: float(np.mean(values)) for metric, values in scores.items()} | {"n": sum(map(len, styles))}


def run_meta(run: Run, walls: Mapping[str, float]) -> dict[str, Any]:
    """`meta` of the results: what ran, on what, for how long.

    Memory is that of all workers together at the worst moment, or of the largest process that had a part; stages that
    ran side by side count once in wall_s, and each in stage_wall_s.
    """
    parts = [*run.folder.glob("*/metrics.json"), *(run.folder / "evaluation").glob("*.json")]
    parts += run.folder.glob(MEMORY)
    peaks = [json.loads(file.read_text()).get("peak_rss_mb", 0) for file in parts]
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "git": report.git_revision(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "seed": run.preset.seed,
        "preset": run.preset.name,
        "cores": os.cpu_count(),
        "processes": run.accelerator.num_processes,
        "computed_in": str(run.autocast or run.preset.dtype or torch.float32).removeprefix("torch."),
        "workers": workers(run),
        "wall_s": time_of(_worked(run.folder, "*/metrics.json") + _worked(run.folder, "evaluation/*.json")),
        "peak_rss_mb": max(peak_memory_mb(), *peaks),
        "stage_wall_s": dict(walls),
    }


def _worked(folder: Path, pattern: str) -> list[tuple[float, float]]:
    """When there was work, of the files that say so: stretches [begin, seconds]."""
    return [stretch for file in folder.glob(pattern) for stretch in json.loads(file.read_text())["worked"]]
