"""All stages and the evaluation of their models: what `q3vl-mini run` does."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from . import evaluate, report
from .choices import STAGES
from .config import Preset, load_config
from .emoji_world import tasks
from .memory import peak_memory_mb
from .records import Quadruple
from .reranker import Reranker
from .stages import Run, run_stage, thinned

EMBEDDERS = ("raw", "s0", "s1", "s2", "s3")  # the rows of the stage table, before s3+reranker


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
    preset = r.preset
    stages = [stage for stage in STAGES if stage in preset.stages or stage == "s3"]
    last = json.loads(results.read_text())["meta"]["stage_wall_s"] if results.is_file() else {}
    walls = {}
    for stage in stages:
        walls[stage] = run_stage(r, stage)["wall_s"]
        if r.is_main and progress:
            before, after = r.metrics(stage)["validation"].values()
            left = minutes_left(walls, last)
            told = f"; about {left:.0f} minutes left" if left else ""
            print(f"{stage}: {walls[stage]:.0f} s, validation {before} -> {after}{told}", flush=True)
    began = time.monotonic()
    records, unseen = evaluate_all(r)
    if r.is_main:
        each = [json.loads(f.read_text())["wall_s"] for f in (r.folder / "evaluation").glob("*.json")]
        walls["evaluation"] = sum(each) / evaluators(r)
        print(f"\n{report.stage_table(records)}\n")
        report.write_results(results, run_meta(r, walls), records, unseen)
        report.plot_stage_table(records, results.with_suffix(".png"))
        print(f"evaluation {time.monotonic() - began:.0f} s; models in {r.folder}, results in {results}")
    for tracker in r.accelerator.trackers:
        tracker.finish()
    r.accelerator.wait_for_everyone()
    return results


def minutes_left(walls: Mapping[str, float], last: Mapping[str, float]) -> float | None:
    """What an earlier run (seconds by stage) needed for the other stages, at this run's pace; None if it had others."""
    if not set(walls) <= set(last):
        return None
    pace = sum(walls.values()) / sum(last[stage] for stage in walls)
    return pace * sum(seconds for stage, seconds in last.items() if stage not in walls) / 60


def evaluate_all(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """(records of every model by column, single-object retrieval in the unseen styles), kept in folder/evaluation/.

    So are the vectors of every embedder: the reranker's row and later measurements (report's findings) start from them.
    Several processes take the models in turn.
    """
    names = (*EMBEDDERS, "s3+reranker")
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    if (n := evaluators(run)) > world:
        _evaluate_side_by_side(run, n)
    else:
        evaluate_models(run, names[::-1][rank::world])  # the reranker takes longest
    run.accelerator.wait_for_everyone()
    records, unseen = {}, {}
    for name in names:
        content = json.loads((run.folder / "evaluation" / f"{name}.json").read_text())
        records[name] = content["columns"]
        unseen |= {name: content["unseen_styles"]} if content["unseen_styles"] else {}
    return records, unseen


def evaluators(run: Run) -> int:
    """How many processes measure at the same time: those that there are; if that is one, on a CPU the preset's."""
    world, on_cpu = run.accelerator.num_processes, run.accelerator.device.type == "cpu"
    return run.preset.data.evaluators if world == 1 and on_cpu else world


def evaluate_models(run: Run, names: Sequence[str]) -> None:
    """Measure models of a run, each unless folder/evaluation/NAME.json is there."""
    data, folder = run.preset.data, run.folder / "evaluation"
    benchmark = styles = None  # drawn once, and only if something is left to evaluate
    for name in names:
        file = folder / f"{name}.json"
        if not file.is_file():
            began = time.monotonic()
            if benchmark is None:
                benchmark = thinned(tasks.benchmark("test", data.test_rows, data.test_seed), data.test_documents)
                styles = tasks.unseen_styles(data.test_seed)
                if data.test_documents:  # a query each
                    styles = thinned([q.select(range(data.test_documents)) for q in styles], data.test_documents)
                run.store.clear()  # training's pictures make room for the test's, which every model looks at
            embedder = "s3" if name == "s3+reranker" else name
            # two processes must not write the same vectors
            alone = run.accelerator.num_processes == 1
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
            content |= {"wall_s": round(time.monotonic() - began, 1), "peak_rss_mb": peak_memory_mb()}
            report.write_json(file, content)


def _evaluate_side_by_side(run: Run, n: int) -> None:
    """`evaluate_models` of all models in n processes. The reranker comes after s3, whose vectors it reads.

    They are started as commands, so that a script that calls `run` needs no guard against being imported by them.
    """
    others = EMBEDDERS[-2::-1]
    shares = [("s3", "s3+reranker"), *(others[i :: n - 1] for i in range(n - 1))]
    shares = [share for share in shares if not all((run.folder / "evaluation" / f"{x}.json").is_file() for x in share)]
    of_group = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in of_group}
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n))
    folder, started = str(run.folder.resolve()), []
    try:
        for share in shares:
            shows = run.progress and share is shares[-1]
            code = f"from q3vl_mini.pipeline import evaluate_share; evaluate_share({folder!r}, {share}, {shows})"
            started.append(subprocess.Popen([sys.executable, "-c", code], env=environment))
        failed = [share for share, process in zip(shares, started, strict=True) if process.wait()]
    finally:
        for process in started:
            process.terminate()
    if failed:
        raise ChildProcessError(f"measuring {' and '.join(map(str, failed))} ended with the error that is told above")


def evaluate_share(folder: str, names: Sequence[str], progress: bool) -> None:
    """`evaluate_models` of a run that has trained all its stages, from its folder alone. It ends with its parent."""
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    evaluate_models(Run(load_config(Path(folder) / "config.json"), folder, progress, tracker="none"), names)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
    """`meta` of the results: what ran, on what, for how long; memory is that of the largest process that had a part."""
    parts = [*run.folder.glob("*/metrics.json"), *(run.folder / "evaluation").glob("*.json")]
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
        "wall_s": round(sum(walls.values()), 1),
        "peak_rss_mb": max(peak_memory_mb(), *peaks),
        "stage_wall_s": dict(walls),
    }
