"""A dry run: all stages of a preset on a few rows and steps, to learn in minutes what a real run would stumble over.

What a stage computes stays the preset's: losses and their terms, gradient cache, mining with its K and thresholds,
dimensions and precisions, frames, dtype, checkpointing. What is made smaller is printed.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from . import pipeline, sharding, zero
from .config import Preset, StageConfig, differences
from .machine import fast_cpu_dtype
from .plan import model_config
from .public_data.made_up import write_copies
from .public_data.sets import SETS
from .stages import WAIT

STAND_IN = "q3vl-tiny"
STEPS, PROBE = 2, 2
TEST_ROWS, TEST_DOCUMENTS, RERANKED = 4, 8, 4
ROWS, CHUNK_TOKENS = 8, 256  # with stand-ins: a batch of pictures takes several chunks
REAL_ROWS = 64  # with the real backbone, whose chunks stay as large as they are


def dry_run(
    preset: Preset,
    folder: str | Path,
    real: bool = False,
    backbone: str | None = None,
    results: str | Path | None = None,
    progress: bool = True,
    tracker: str = "auto",
) -> Path:
    """All stages and the evaluation of `preset`, made small. Returns the path of the results; their scores say nothing.

    Args:
        folder: of the run; results are in it too, if not elsewhere. An interrupted dry run goes on.
        real: with the preset's backbone and the public sets as the preset finds them, which tries the download, the
            disk and the GPU. Else with stand-ins, offline: a small backbone, and made-up public sets in
            folder/public in the schema of the real ones.
        backbone: the stand-in; None is STAND_IN.

    Raises:
        ValueError: the folder holds a finished dry run. And what pipeline.run raises, as the real run would.
    """
    folder = Path(folder)
    results = Path(results or folder / "results.json")
    if results.is_file():
        raise ValueError(f"{results} is there: a dry run that is finished; remove {folder}, or give another folder")
    small = shrunk(preset) if real else with_stand_ins(preset, backbone or STAND_IN, folder / "public")
    sharding.asked_by_launch()  # accelerate would take a launch with these for its own
    zero.asked_by_launch()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    if state.is_main_process:
        print(f"A dry run of {preset.name!r} in {folder}. What is not as in the preset:", flush=True)
        print(told(preset, small), flush=True)
        if not real:
            write_copies(public_sets(preset), small.data.public, ROWS, preset.seed)
    state.wait_for_everyone()
    return pipeline.run(small, folder, results=results, progress=progress, tracker=tracker)


def shrunk(preset: Preset, rows: int = REAL_ROWS) -> Preset:
    """The preset with `rows` rows of each sub-dataset, STEPS steps and a short evaluation.

    Corpora have as many documents, and what the labels name: few queries of a model that is not trained yet may all
    miss the top K of a large one, and mining stops where none is left.
    """

    def few(stage: StageConfig) -> StageConfig:
        tasks = {name: min(n, rows) for name, n in stage.tasks.items()}
        return replace(stage, tasks=tasks, steps=min(stage.steps, STEPS), batch_size=min(stage.batch_size, rows))

    data, merge = preset.data, preset.merge
    return replace(
        preset,
        name=f"{preset.name}-dry-run",
        stages={name: few(stage) for name, stage in preset.stages.items()},
        data=replace(
            data,
            train_documents=rows,
            test_rows=min(data.test_rows, TEST_ROWS),
            test_documents=TEST_DOCUMENTS,
            validation_rows=min(data.validation_rows, TEST_ROWS),
            rerank_top_k=min(data.rerank_top_k, RERANKED),
        ),
        merge=replace(merge, steps=min(merge.steps, STEPS), probe=min(merge.probe, PROBE)),
    )


def with_stand_ins(preset: Preset, backbone: str, public: str | Path) -> Preset:
    """`shrunk`, with another backbone in what this machine computes, its dimensions, chunks that its batches fill, and
    the public sets of the folder `public`."""
    small, width = shrunk(preset, ROWS), model_config(backbone).text_config.hidden_size
    weights = preset.dim_weights or [1.0] * len(preset.dims)
    kept = [(dim, weight) for dim, weight in zip(preset.dims, weights, strict=True) if dim < width]
    stages = {
        name: replace(stage, chunk_tokens=min(stage.chunk_tokens, CHUNK_TOKENS)) for name, stage in small.stages.items()
    }
    return replace(
        small,
        backbone=backbone,
        dtype=preset.dtype and usable_dtype(preset.dtype),
        dims=tuple(dim for dim, _ in kept),
        dim_weights=preset.dim_weights and tuple(weight for _, weight in kept),
        stages=stages,
        data=replace(small.data, public=str(public)),
    )


def usable_dtype(dtype: str) -> str:
    """The dtype itself where there is a GPU; else what this CPU is fastest in: it may only imitate half precision."""
    return dtype if torch.cuda.is_available() else str(fast_cpu_dtype()).removeprefix("torch.")


def public_sets(preset: Preset) -> list[str]:
    """The public sets that a preset's stages name."""
    return sorted({name for stage in preset.stages.values() for name in stage.tasks} & SETS.keys())


def told(before: Preset, after: Preset) -> str:
    """What differs, a line a setting; stages that change alike share one."""
    lines: dict[str, list[str]] = defaultdict(list)
    rows = [n for stage in before.stages.values() for n in stage.tasks.values()]
    for change in differences(before, after):
        place, _, values = change.partition(" ")
        if ".tasks." not in place:
            part, _, setting = place.rpartition(".")
            lines[f"{setting} {values}"].append(part.removeprefix("stages."))
    said = [f"  {change}" + (f" ({', '.join(parts)})" if parts[0] else "") for change, parts in lines.items()]
    most = max(n for stage in after.stages.values() for n in stage.tasks.values())
    return "\n".join([f"  rows of {len(rows)} sub-datasets: {sum(rows)} -> {most} each, at most", *said])
