"""A run's reranker trained with other settings, scored on validation behind the run's s1.

    python benchmarks/reranker_trials.py runs/seed-1 --set steps=200 --out results/reranker_trials.jsonl
    python benchmarks/reranker_trials.py runs/seed-1 --raw          the backbone itself, without a step

One line of JSON a trial: for each retrieval task what s1 scores, what it scores with its five best documents ordered
by the reranker, and how often the reranker alone puts the right document first of eight (stages.first_of_candidates).
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from q3vl_mini import evaluate
from q3vl_mini.config import load_config, override
from q3vl_mini.emoji_world.tasks import TASKS, benchmark
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import Run, first_of_candidates, run_stage

MEASURES = ("s1", "s1+reranker", "first_of_8")


def trial(run: Path, changes: list[str], raw: bool, rows: int, folder: Path) -> dict:
    """Train in `folder` on what the run mined, and measure."""
    changed = [f"stages.reranker.{change}" for change in changes]
    preset = override(load_config(run / "config.json"), ["data.validation_rows=0", *changed])
    here = Run(preset, folder, progress=False, tracker="none")
    seconds = 0.0
    if not raw:
        (folder / "reranker").mkdir()
        shutil.copyfile(run / "s1" / "mined.json", folder / "reranker" / "mined.json")
        seconds = run_stage(here, "reranker")["training_s"]
    reranker, s1 = here.model("raw" if raw else "reranker", Reranker), here.load(run / "s1" / "model")
    retrieval = {TASKS[name].column for name in preset.stages["reranker"].tasks}
    asked = [q for q in benchmark("validation", rows, preset.data.test_seed) if q.task in retrieval]
    size, k, by_task = preset.data.batch_size, preset.data.rerank_top_k, {}
    for q, queries, corpus in evaluate.encoded(s1, asked, batch_size=size):
        alone = evaluate.score_quadruple(queries, corpus, q).score
        reranked = evaluate.rerank_quadruple(reranker, q, queries, corpus, top_k=k).score
        by_task[q.name] = [alone, reranked, first_of_candidates(reranker, q, size)]
    mean = dict(zip(MEASURES, np.mean(list(by_task.values()), axis=0).tolist(), strict=True))
    setting = {"seed": preset.seed, "set": "no training" if raw else " ".join(changes), "rows": rows}
    return setting | {"training_s": seconds, "mean": mean, "by_task": by_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that has finished s1")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of [stages.reranker]")
    parser.add_argument("--raw", action="store_true", help="no training: the backbone as it is")
    parser.add_argument("--rows", type=int, default=150, help="validation queries of each task")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = json.dumps(trial(options.run, options.set, options.raw, options.rows, Path(folder)))
    print(found)
    if options.out:
        with options.out.open("a") as lines:
            lines.write(found + "\n")


if __name__ == "__main__":
    main()
