"""Why s2 is as it is: stage 3 once more, taught by a judge that is always right instead of the reranker.

    python benchmarks/findings/teacher.py runs/seed-0 runs/seed-1 runs/seed-2

All else is the run's: s1, the data that it mined, the steps, the seed. The judge's margin is MARGIN for a right
document and -MARGIN for a wrong one, by the labels, which Emoji World has exactly. What is gained against s2 is what
the reranker's errors cost; what is gained against s1, about the most that this stage can give on these data. Trainings
are kept in the runs' folders, under teacher/. Writes results/findings/teacher.json.
"""

import json
import shutil

import numpy as np
from seeds import Overall, SeedRun, arguments, claim, opened, write
from stages import HURT, LIFTED

from q3vl_mini import evaluate
from q3vl_mini.config import override
from q3vl_mini.report import write_json
from q3vl_mini.stages import Run, mined_data, run_stage

MARGIN = 3.0  # the score is then 0.95 or 0.05
KEPT = ("s1/model", "s1/metrics.json", "s2/mined.json")


def taught_rightly(run: SeedRun) -> Run:
    """The run with the s2 of a teacher that is always right; trained once."""
    folder = run.folder / "teacher"
    for name in KEPT:
        source, place = run.folder / name, folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, place)
    trial = Run(override(run.preset, ["data.validation_rows=0"]), folder, progress=True, tracker="none")
    if not trial.finished("s2"):
        n, logits = trial.preset.stages["s2"].n_negatives, {}
        for quadruple in mined_data(trial, "s2"):
            logits[quadruple.name] = {
                i: {labels.positives[0]: MARGIN} | dict.fromkeys(labels.negatives[:n], -MARGIN)
                for i, labels in enumerate(quadruple.relevance)
            }
        write_json(folder / "s2" / "teacher.json", logits)
        run_stage(trial, "s2")
    return trial


def agreement(run: SeedRun) -> float:
    """Share of the queries of s2's data of which the right document, the first, has the reranker's highest margin."""
    by_task = json.loads((run.folder / "s2" / "teacher.json").read_text())
    rows = [row for task in by_task.values() for row in task.values()]
    return float(np.mean([max(row, key=row.get) == next(iter(row)) for row in rows]))


def main() -> None:
    runs = opened(arguments(__doc__).runs)
    quadruples = runs[0].quadruples()
    found = {model: [run.columns(model, quadruples) for run in runs] for model in ("s1", "s2")}
    found["s2, right teacher"] = []
    for run in runs:
        trial = taught_rightly(run)
        rows = evaluate.encoded(
            trial.model("s2"), quadruples, batch_size=run.preset.data.batch_size, folder=trial.folder / "test"
        )
        found["s2, right teacher"].append(evaluate.by_column(evaluate.score_quadruple(q, c, x) for x, q, c in rows))
    right = found["s2, right teacher"]

    def column(model: str, name: str) -> list:
        return [columns[name] for columns in found[model]]

    claims = [
        claim(
            "with a right teacher s2 is above s2 overall", list(map(Overall, right)), list(map(Overall, found["s2"]))
        ),
        *(claim(f"with a right teacher s2 is above s1 in {c}", [x[c] for x in right], column("s1", c)) for c in LIFTED),
        *(claim(f"with a right teacher s2 is below s1 in {c}", column("s1", c), [x[c] for x in right]) for c in HURT),
    ]
    table = {
        model: {"mean": [Overall(columns).score for columns in seeds]}
        | {name: [columns[name].score for columns in seeds] for name in seeds[0]}
        for model, seeds in found.items()
    }
    for entry in claims:
        print(f"{entry['claim']}: {100 * entry['difference']:+.1f} points, {entry['verdict']}")
    content = {"margin": MARGIN, "reranker_right": [agreement(run) for run in runs], "table": table, "claims": claims}
    write("teacher", runs, "python benchmarks/findings/teacher.py RUN ...", content)


if __name__ == "__main__":
    main()
