"""Other settings of MRL and QAT, scored on validation: what do half the dimensions and int8 cost a training?

    python benchmarks/findings/compression_trials.py runs/seed-1 --steps 100 --set "dim_weights=[1.0, 1.0, 0.3, 0.3]"
    python benchmarks/findings/compression_trials.py runs/seed-1 --stages s3    what the run itself has, without a step

A trial trains the stages one after another on what the run mined. One line of JSON a trial, which --out adds to
results/compression_trials.jsonl: for each task MRR@10 of the whole vectors in float32, and what share of it shorter
and coarser ones keep. `steps` is null where each stage had as many as in the run.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from compression import TASKS, compressed

from q3vl_mini import evaluate
from q3vl_mini.choices import PRECISIONS
from q3vl_mini.config import load_config, override
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.stages import Run, run_stage


def trained(source: Path, stages: list[str], steps: int | None, changes: list[str], folder: Path) -> Embedder:
    """The embedder of the last of `stages`, trained in `folder` on what the run `source` mined; with nothing to
    change it is the run's own."""
    preset = load_config(source / "config.json")
    if not steps and not changes:
        return Run(preset, source, progress=False, tracker="none").model(stages[-1])
    short = [f"stages.{stage}.steps={steps}" for stage in stages if steps]
    run = Run(override(preset, ["data.validation_rows=0", *short, *changes]), folder, progress=False, tracker="none")
    for stage in stages:
        (folder / stage).mkdir()
        shutil.copyfile(source / stage / "mined.json", folder / stage / "mined.json")
        run_stage(run, stage)
    return run.model(stages[-1])


def kept(model: Embedder, rows: int, seed: int, batch_size: int) -> dict[str, dict[str, float]]:
    """For each task: MRR@10 of the whole vectors in float32 ("full"), and the shares of it that others keep."""
    quadruples = [build(name, "validation", rows, seed) for name in TASKS]
    shares: dict[str, dict[str, float]] = {}
    for x, queries, corpus in evaluate.encoded(model, quadruples, batch_size=batch_size):
        found: dict[str, float] = {}
        for dim in sorted((int(d) for d in model.quantizers["int8"]), reverse=True):
            for precision in PRECISIONS:
                score = compressed(model.quantizers, queries, corpus, x, dim, precision).score
                found[f"{dim} {precision}"] = score
        full = next(iter(found.values()))
        shares[x.name] = {"full": round(full, 4)} | {name: round(x / full, 4) for name, x in found.items()}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--stages", nargs="+", default=["s0"])
    parser.add_argument("--steps", type=int, help="of each stage; by default the run's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", type=int, default=1000, help="validation queries of each task")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    preset = load_config(options.run / "config.json")
    setting = {"seed": preset.seed, "rows": options.rows, "stages": options.stages, "steps": options.steps}
    with TemporaryDirectory() as folder:
        model = trained(options.run, options.stages, options.steps, options.set, Path(folder))
        measured = kept(model, options.rows, preset.data.test_seed, preset.data.batch_size)
    setting["set"] = ", ".join(options.set)
    found = json.dumps(setting | measured)
    print(found)
    if options.out:
        with options.out.open("a") as lines:
            lines.write(found + "\n")


if __name__ == "__main__":
    main()
