"""F5: visual tokens a picture and a page, frames and tokens a clip (report, figure 7).

    python benchmarks/findings/granularity.py runs/seed-0 runs/seed-1 runs/seed-2

The same test queries, with the same things drawn at more and more pixels or sampled at more and more frames. Writes
results/findings/F5.json.
"""

from dataclasses import replace

import numpy as np
from seeds import arguments, claim, opened, over_seeds, write

from q3vl_mini import evaluate
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.media import MediaBudget, prepare
from q3vl_mini.records import Quadruple
from q3vl_mini.stages import Run

# what changes, for each setting the changes of a picture or clip and of the budget; the first column names the axis
SIDES = (32, 64, 96, 128, 192)
SWEEPS = {
    "tokens a picture": (
        "scene_retrieval",
        [({"pixels": s, "pattern": "plain"}, {"image_min_tokens": 1}) for s in SIDES],
    ),
    "tokens a page": ("visual_document", [({}, {"image_max_tokens": n}) for n in (6, 12, 20, 30)]),
    "frames a clip": ("motion", [({}, {"fps": fps}) for fps in (0.5, 1.0, 2.0)]),
    "tokens a clip": (
        "video_retrieval",
        [({"pixels": s, "pattern": "plain"}, {"image_min_tokens": 1}) for s in SIDES[:4]],
    ),
}


def drawn(x: Quadruple, changes: dict) -> Quadruple:
    """The quadruple with every picture or clip drawn with other attributes."""

    def changed(instance: dict) -> dict:
        kinds = [kind for kind in ("image", "video") if kind in instance]
        return {**instance, **{kind: replace(instance[kind], **changes) for kind in kinds}}

    return replace(x, queries=[changed(q) for q in x.queries], corpus=[changed(c) for c in x.corpus]) if changes else x


def size_of(x: Quadruple, axis: str, budget: MediaBudget, processor) -> float:
    """Mean visual tokens, or frames, of a clip, page or picture of the quadruple."""
    rows = [item for item in (*x.queries, *x.corpus) if "image" in item or "video" in item][:20]
    visuals = [
        prepare(item[kind], kind, budget, processor) for item in rows for kind in ("image", "video") if kind in item
    ]
    frames = [2 * v.grid_thw[0] for v in visuals]
    return float(np.mean(frames if axis.startswith("frames") else [v.n_tokens for v in visuals]))


def main() -> None:
    def more(parser):
        parser.add_argument("--rows", type=int, default=200, help="test queries a task")
        parser.add_argument("--model", default="s3")

    options = arguments(__doc__, more)
    runs = opened(options.runs)
    curves: dict[str, list[dict]] = {}
    claims = []
    for axis, (task, settings) in SWEEPS.items():
        quadruple = build(task, "test", options.rows, runs[0].preset.data.test_seed + 2)
        points = []
        for changes, limits in settings:
            x, seeds = drawn(quadruple, changes), []
            for run in runs:
                model = Run(run.preset, run.folder, progress=False, tracker="none").model(options.model)
                model.budget = replace(model.budget, **limits)
                [(_, queries, corpus)] = evaluate.encoded(model, [x], batch_size=run.preset.data.batch_size)
                seeds.append(evaluate.score_quadruple(queries, corpus, x))
            points.append((size_of(x, axis, model.budget, model.processor), seeds))
            print(axis, points[-1][0], [round(s.score, 3) for s in seeds], flush=True)
        curves[axis] = [
            {
                "size": size,
                "score": [s.score for s in seeds],
                "ci": over_seeds(np.stack([s.resample() for s in seeds])),
                "chance": seeds[0].chance,
                "metric": seeds[0].metric,
            }
            for size, seeds in points
        ]
        for (small, a), (large, b) in zip(points, points[1:], strict=False):
            claims.append(claim(f"{axis}: {large:g} are above {small:g}", b, a))
    command = f"python benchmarks/findings/granularity.py --rows {options.rows} --model {options.model} RUN ..."
    write(
        "F5",
        runs,
        command,
        {"model": options.model, "task": {a: t for a, (t, _) in SWEEPS.items()}, "curves": curves, "claims": claims},
    )


if __name__ == "__main__":
    main()
