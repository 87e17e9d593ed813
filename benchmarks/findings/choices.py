"""F6, and the choices that the report leaves unexplained: what one change of the recipe does, all else equal.

    python benchmarks/findings/choices.py runs/seed-0 runs/seed-1 runs/seed-2 --choices stage-2-terms

Each choice is two short trainings of one stage, or of one stage after another, with the preset's settings and with
others instead, on the same data, from the same seed, of the same number of steps and of documents a query (of which a
stage has its own number, where stages are what is compared); both are measured on MMEB-mini's test split, by which
nothing is chosen: the preset stays what it is. s2 and the reranker, which are short, have all their steps where they
are what is trained, and so have the few choices that ask for it; then the run's own training is one side.
The reranker is measured over the TOP_K best candidates of s1, in its retrieval tasks.
Trainings are kept in the run's folder under choices/, so that a call goes on where the last one stopped. Writes
results/findings/F6.json with every choice measured so far.
"""

import json
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from seeds import RESULTS, Columns, Overall, SeedRun, arguments, claim, opened, write

from q3vl_mini import evaluate
from q3vl_mini.compression import pack_binary, truncate, unpack_binary
from q3vl_mini.config import override
from q3vl_mini.emoji_world import tasks
from q3vl_mini.emoji_world.tasks import TASKS
from q3vl_mini.forward import VisualStore
from q3vl_mini.report import git_revision
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import Run, run_stage


@dataclass(frozen=True)
class Choice:
    """The claim `text`, that the preset's settings score higher than those `instead` (as `--set` takes them).

    stage: what is trained, from what the seed's run has before it. "s0, s1" is s0, and s1 from there, each for its
    share of the steps. instead_of: the other side's, if it is not the same. ours: what is claimed to be higher, if it
    is not the preset. dim, binary: the vectors that are scored, cut and reduced to signs; by default whole. wrong:
    data.wrong_labels of both sides, which then mine for themselves. long: both sides have all the run's steps.
    """

    stage: str
    text: str
    instead: tuple[str, ...]
    instead_of: str = ""
    ours: tuple[str, ...] = ()
    dim: int | None = None
    binary: bool = False
    wrong: float = 0.0
    long: bool = False


STRONG_QAT = ("quantizers={int8 = 0.1, binary = 1.0}",)
TERMS = '["query_document", "query_query", "document_document"]'
QUERY_DOCUMENT = 'stages.s0.terms=["query_document"]'
NO_MASK = "stages.s0.margin=1e9"
CHOICES = {
    "stage-1-terms": Choice("s0", "stage 1 has q-q and d-d terms", (QUERY_DOCUMENT,)),
    "stage-2-terms": Choice("s1", "stage 2 has no q-q and d-d terms", (f"stages.s1.terms={TERMS}",)),
    "stage-1-terms-long": Choice(
        "s0", "stage 1, with all its steps, has q-q and d-d terms", (QUERY_DOCUMENT,), long=True
    ),
    "stage-1-qq": Choice(
        "s0",
        "stage 1 has the q-q term, neither having d-d",
        (QUERY_DOCUMENT,),
        ours=('stages.s0.terms=["query_document", "query_query"]',),
    ),
    "stage-1-dd": Choice(
        "s0",
        "stage 1 has the d-d term, neither having q-q",
        (QUERY_DOCUMENT,),
        ours=('stages.s0.terms=["query_document", "document_document"]',),
    ),
    "stage-1-terms-unmasked": Choice(
        "s0", "stage 1 has q-q and d-d terms, no high score being masked", (NO_MASK, QUERY_DOCUMENT), ours=(NO_MASK,)
    ),
    "stage-1-terms-then-2-long": Choice(
        "s0, s1", "stage 1 has q-q and d-d terms, scored after all steps of stage 2", (QUERY_DOCUMENT,), long=True
    ),
    "stage-2-terms-long": Choice(
        "s1", "stage 2, with all its steps, has no q-q and d-d terms", (f"stages.s1.terms={TERMS}",), long=True
    ),
    "masks": Choice("s0", "scores above the positive's are masked", (NO_MASK,)),
    "masks-of-whole": Choice(
        "s0",
        "at a prefix its own scores are masked, not those of the whole embedding",
        ('stages.s0.masks_of="whole"',),
    ),
    "hard-negatives": Choice(
        "s1",
        "stage 2 has mined and labelled negatives, not random ones",
        ("stages.s1.n_negatives=0", "stages.s1.n_random=3"),
    ),
    "refinement": Choice(
        "s1",
        "positives are refined where 20 % of labels are wrong",
        ("stages.s1.mining.k=1_000_000", "stages.s1.mining.t_plus=-1.0"),
        wrong=0.2,
    ),
    "colder": Choice("s1", "stage 2 at temperature 0.03, not 0.01", ("stages.s1.temperature=0.01",)),
    "warmer": Choice("s1", "stage 2 at temperature 0.03, not 0.1", ("stages.s1.temperature=0.1",)),
    "stage-1-colder": Choice("s0", "stage 1 at temperature 0.03, not 0.01", ("stages.s0.temperature=0.01",)),
    "stage-1-warmer": Choice("s0", "stage 1 at temperature 0.03, not 0.1", ("stages.s0.temperature=0.1",)),
    "lower-rate": Choice("s0", "learning rate 5e-3, not 2e-3", ("stages.s0.lr=2e-3",)),
    "higher-rate": Choice("s0", "learning rate 5e-3, not 1e-2", ("stages.s0.lr=1e-2",)),
    "decay": Choice("s0", "no weight decay, not 0.1", ("stages.s0.weight_decay=0.1",)),
    "warm-up": Choice("s0", "a tenth of the steps warm up, not none", ("stages.s0.warmup=0.0",)),
    "smaller-batches": Choice(
        "s0", "batches of 64, not twice as many of 32", ("stages.s0.batch_size=32", "stages.s0.steps=120")
    ),
    "longer": Choice("s0", "60 steps are enough, 120 are no better", ("stages.s0.steps=120",)),
    "uniform": Choice("s0", "large sub-datasets are drawn more often, not all alike", ("stages.s0.exponent=0.0",)),
    "proportional": Choice(
        "s0", "large sub-datasets are drawn less often than in proportion", ("stages.s0.exponent=1.0",)
    ),
    "others-negatives": Choice(
        "s1",
        "other queries' hard negatives are not in Z",
        ('stages.s1.terms=["query_document", "others_negatives"]',),
    ),
    "ending": Choice("s0", "the generation prompt is pooled, not PAD", ('template="report"',)),
    "two-stages": Choice("s0, s1", "stage 1 and then stage 2, not stage 1 for as long", (), instead_of="s0"),
    "three-stages": Choice(
        "s0, s1, s2", "three stages of a third of the steps each, not stage 1 alone", (), instead_of="s0"
    ),
    "lora": Choice(
        "s0",
        "LoRA, not full fine-tuning at the rate that validation likes best",
        ("lora_rank=0", "stages.s0.lr=1e-3"),
    ),
    "rank": Choice("s0", "LoRA has rank 32, not 4", ("lora_rank=4", "lora_alpha=4")),
    "mrl": Choice("s0", "MRL, scored at 32 dimensions", ("dims=[0]", "dim_weights=[1.0]"), dim=32),
    "mrl-whole": Choice("s0", "MRL, scored at all dimensions", ("dims=[0]", "dim_weights=[1.0]")),
    "mrl-weights": Choice(
        "s0",
        "prefixes have 0.3 of the whole's weight, not as much as it, scored at half the dimensions",
        ("dim_weights=[1.0, 1.0, 1.0, 1.0]",),
        dim=128,
    ),
    "qat": Choice("s0", "QAT, scored on signs", ("quantizers={}",), binary=True),
    "qat-half": Choice(
        "s0", "QAT, scored on the signs of half the dimensions", ("quantizers={}",), dim=128, binary=True
    ),
    "step-rate": Choice(
        "s0",
        "the quantisers' steps move at 1e-5, not 1e-3, scored on signs",
        ("stages.s0.quantizer_lr=1e-3",),
        binary=True,
    ),
    "qat-whole": Choice("s0", "QAT, scored in float32", ("quantizers={}",)),
    "strong-qat": Choice(
        "s0",
        "QAT with ten times the weight of signs, scored on signs",
        ("quantizers={}",),
        ours=STRONG_QAT,
        binary=True,
    ),
    "strong-qat-half": Choice(
        "s0",
        "QAT with ten times the weight of signs, scored on the signs of half the dimensions",
        ("quantizers={}",),
        ours=STRONG_QAT,
        dim=128,
        binary=True,
    ),
    "strong-qat-whole": Choice(
        "s0", "QAT with ten times the weight of signs, scored in float32", ("quantizers={}",), ours=STRONG_QAT
    ),
    "student-colder": Choice("s2", "s2 at temperature 0.03, not 0.01", ("stages.s2.temperature=0.01",)),
    "student-warmer": Choice("s2", "s2 at temperature 0.03, not 0.1", ("stages.s2.temperature=0.1",)),
    "teacher-sharper": Choice("s2", "its teacher at temperature 1, not 0.3", ("stages.s2.teacher_temperature=0.3",)),
    "teacher-flatter": Choice("s2", "its teacher at temperature 1, not 3", ("stages.s2.teacher_temperature=3.0",)),
    "reranker-random": Choice(
        "reranker",
        "the reranker has three mined and four random negatives, not seven random ones",
        ("stages.reranker.n_negatives=0", "stages.reranker.n_random=7"),
    ),
    "reranker-mined": Choice(
        "reranker",
        "the reranker has three mined and four random negatives, not seven mined ones",
        ("stages.reranker.n_negatives=7", "stages.reranker.n_random=0"),
    ),
}
SHORT = ("s2", "reranker")  # the stages that have all their steps where they are what is trained
TOP_K = 20


def trained(
    run: SeedRun, choice: Choice, stage: str, changes: tuple[str, ...], options: Namespace, store: VisualStore
) -> Columns:
    """The scores of one training of `stage` (see Choice).

    Most choices share the training with the preset's settings: it is one folder, and done once. All share the store:
    no choice changes the vision tower.
    """
    stages = stage.split(", ")
    unchanged = stages if choice.long or stage in SHORT else []  # those with as many steps as in the run
    spoiled = (f"wrong={choice.wrong:g}",) if choice.wrong else ()
    length = ("long",) if choice.long else ()
    name = "-".join([*stages, *length, *spoiled, *changes]).translate(str.maketrans("/ ", "__", '"'))
    folder = run.folder / "choices" / name
    preset = override(run.preset, ["data.validation_rows=0"])
    for part in [x for x in stages if x not in unchanged]:
        short = f"stages.{part}.steps={options.steps // len(stages)}", f"stages.{part}.batch_size={options.batch_size}"
        preset = override(preset, short)
    preset = override(preset, changes)  # after them, as steps and batch size may be what the choice is about
    preset = override(preset, [f"data.wrong_labels={choice.wrong}"])
    start = preset.stages[stages[0]].start
    if start != "raw" and not (folder / start).is_dir():
        shutil.copytree(run.folder / start, folder / start)
    for part in stages:  # both sides train on what the run mined, unless that is what the choice is about
        if part in unchanged and not changes and not (folder / part).is_dir():
            shutil.copytree(run.folder / part, folder / part)  # the run's own training has these settings
        kept = [file for name in ("mined.json", "teacher.json") if (file := run.folder / part / name).is_file()]
        if kept and not (folder / part).is_dir() and not choice.wrong:
            (folder / part).mkdir(parents=True)
            for file in kept:
                shutil.copyfile(file, folder / part / file.name)
    trial = Run(preset, folder, progress=options.progress, tracker="none")
    trial.store = store
    for part in stages:
        run_stage(trial, part)
    quadruples = tasks.benchmark("test", options.rows, preset.data.test_seed)
    if stages[-1] == "reranker":
        retrieval = {TASKS[name].column for name in preset.stages["reranker"].tasks}
        return evaluate.evaluate_reranker(
            trial.model("reranker", Reranker),
            trial.load(run.folder / "s1" / "model"),
            [q for q in quadruples if q.task in retrieval],
            top_k=TOP_K,
            batch_size=preset.data.batch_size,
            folder=run.folder / "choices" / f"s1-test-{options.rows}",
        )
    kept = folder / f"test-{options.rows}"
    rows = evaluate.encoded(trial.model(stages[-1]), quadruples, batch_size=preset.data.batch_size, folder=kept)
    return evaluate.by_column(evaluate.score_quadruple(cut(q, choice), cut(c, choice), x) for x, q, c in rows)


def cut(vectors: np.ndarray, choice: Choice) -> np.ndarray:
    """The vectors (N, D) as the choice scores them."""
    vectors = truncate(np.array(vectors), choice.dim or vectors.shape[1])
    return unpack_binary(pack_binary(vectors)) if choice.binary else vectors


def main() -> None:
    def more(parser: ArgumentParser) -> None:
        parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
        parser.add_argument("--steps", type=int, default=60)
        parser.add_argument("--batch-size", type=int, default=64)
        parser.add_argument("--rows", type=int, default=100, help="test queries of each task")
        parser.add_argument("--progress", action="store_true")

    options = arguments(__doc__, more)
    runs = opened(options.runs)
    file = RESULTS / "F6.json"
    store = VisualStore()
    known: dict[str, Mapping] = json.loads(file.read_text())["choices"] if file.is_file() else {}
    for name in options.choices:
        choice = CHOICES[name]
        other = choice.instead_of or choice.stage
        ours = [trained(run, choice, choice.stage, choice.ours, options, store) for run in runs]
        theirs = [trained(run, choice, other, choice.instead, options, store) for run in runs]
        whole = choice.long or choice.stage in SHORT
        sizes = [runs[0].preset.stages[part] for part in choice.stage.split(", ")] if whole else [options]
        overall = [[Overall(columns) for columns in side] for side in (ours, theirs)]
        entry = claim(choice.text, *overall)
        known[name] = entry | {
            "stage": choice.stage,
            "ours": choice.ours,
            "instead_of": choice.instead_of,
            "instead": choice.instead,
            "scores": [[x.score for x in side] for side in overall],
            "columns": {c: claim(c, [s[c] for s in ours], [s[c] for s in theirs]) for c in ours[0]},
            "seeds": [run.preset.seed for run in runs],
            "git": git_revision(),
            "steps": sum(size.steps for size in sizes),
            "batch_size": sizes[-1].batch_size,
            "rows": options.rows,
        }
        interval = f"[{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
        print(f"{choice.text}: {100 * entry['difference']:+.1f} points {interval}, {entry['verdict']}", flush=True)
        said = f"--steps {options.steps} --batch-size {options.batch_size} --rows {options.rows}"
        write("F6", runs, f"python benchmarks/findings/choices.py {said} RUN ...", {"choices": known})


if __name__ == "__main__":
    main()
