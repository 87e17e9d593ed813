"""What all findings share: the runs of several seeds, paired differences over them, and what is said of a claim."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from q3vl_mini import evaluate
from q3vl_mini.config import Preset, differences, load_config
from q3vl_mini.emoji_world import tasks
from q3vl_mini.evaluate import ColumnResult, by_column, mean_score, score_quadruple
from q3vl_mini.metrics import percentile_interval
from q3vl_mini.records import Quadruple
from q3vl_mini.report import git_revision, write_json
from q3vl_mini.stages import Run

RESULTS = Path(__file__).resolve().parents[2] / "results" / "findings"
ENOUGH = 3  # seeds, before a finding is said to be shown or not
Columns = Mapping[str, ColumnResult]


@dataclass(frozen=True)
class SeedRun:
    """A finished run of one seed (`q3vl-mini run --preset tiny --seed 1 --folder runs/seed-1`)."""

    folder: Path
    preset: Preset

    @classmethod
    def open(cls, folder: str | Path) -> "SeedRun":
        return cls(Path(folder), load_config(Path(folder) / "config.json"))

    def quadruples(self) -> list[Quadruple]:
        """MMEB-mini's test split as this run was measured on it."""
        return tasks.benchmark("test", self.preset.data.test_rows, self.preset.data.test_seed)

    def vectors(
        self, model: str, quadruples: Sequence[Quadruple]
    ) -> Iterator[tuple[Quadruple, np.ndarray, np.ndarray]]:
        """What evaluation kept of a model: each quadruple with its query and corpus vectors."""
        folder = self.folder / "evaluation" / model
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} holds no vectors of {model!r}; finish the run: q3vl-mini run --folder {self.folder}"
            )
        return evaluate.encoded(_Nothing(folder), quadruples, folder=folder)

    def columns(self, model: str, quadruples: Sequence[Quadruple]) -> Columns:
        """The model's scores with their value for every query, from the vectors that evaluation kept."""
        return by_column(score_quadruple(q, c, x) for x, q, c in self.vectors(model, quadruples))

    def scores(self, model: str, quadruples: Sequence[Quadruple]) -> dict[str, evaluate.DatasetResult]:
        """The model's scores on other quadruples, by name; their vectors are kept in the run's folder too."""
        embedder = Run(self.preset, self.folder, progress=False, tracker="none").model(model)
        size, folder = self.preset.data.batch_size, self.folder / "findings" / model
        rows = evaluate.encoded(embedder, quadruples, batch_size=size, folder=folder)
        return {x.name: score_quadruple(queries, corpus, x) for x, queries, corpus in rows}


@dataclass(frozen=True)
class _Nothing:
    """In an embedder's place where all vectors are kept."""

    folder: Path

    def encode(self, items: Sequence[Any], **options: Any) -> np.ndarray:
        raise FileNotFoundError(f"{self.folder} lacks vectors of this benchmark; remove it and evaluate again")


@dataclass(frozen=True)
class Difference:
    """score(a) - score(b): the mean over the seeds, its 95 % interval, and each seed's own."""

    difference: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def opened(folders: Sequence[str | Path]) -> list[SeedRun]:
    """The runs of several seeds: one recipe, and no seed twice.

    Raises:
        ValueError: two runs differ in more than their seed, or not even in that.
    """
    runs = [SeedRun.open(folder) for folder in folders]
    first = runs[0]
    for i, run in enumerate(runs):
        if changed := differences(first.preset, replace(run.preset, seed=first.preset.seed)):
            raise ValueError(f"{first.folder} and {run.folder} differ in more than their seed: {', '.join(changed)}")
        if twice := [other.folder for other in runs[:i] if other.preset.seed == run.preset.seed]:
            raise ValueError(f"{twice[0]} and {run.folder} are of one seed, {run.preset.seed}; give each seed once")
    return runs


def over_seeds(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean over seeds, from bootstrap scores (S, R) whose columns have the same queries.

    Chance enters twice. Queries: the bootstrap scores, averaged over the seeds. Seeds: Student's t with S - 1 degrees
    of freedom times the standard error of the seeds' mean, added to them in random order. (To draw three seeds with
    replacement gives little more than the range of the three, which holds the mean of all seeds 3 times in 4.)
    One seed tells nothing of others: then the interval is of the queries alone.
    """
    n_seeds, n_resamples = draws.shape
    mean = draws.mean(0)
    if n_seeds > 1:
        error = draws.mean(1).std(ddof=1) / np.sqrt(n_seeds)
        levels = (np.random.default_rng(0).permutation(n_resamples) + 0.5) / n_resamples
        mean = mean + error * stats.t.ppf(levels, n_seeds - 1)
    return percentile_interval(mean)


def paired(a: Sequence[Any], b: Sequence[Any], n_resamples: int = 2000) -> Difference:
    """The difference of two models, each trained with the same seeds and scored on the same queries.

    a, b: for each seed a result with `score` and `resample`. A resample has the same queries for both models and for
    all seeds.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} seeds; a pair needs the same, and at least one")
    draws = np.stack([x.resample(n_resamples) - y.resample(n_resamples) for x, y in zip(a, b, strict=True)])  # (S, R)
    by_seed = [x.score - y.score for x, y in zip(a, b, strict=True)]
    return Difference(float(np.mean(by_seed)), *over_seeds(draws), tuple(by_seed))


@dataclass(frozen=True)
class Overall:
    """All columns of a model as one result: their mean, resampled within each."""

    columns: Columns

    @property
    def score(self) -> float:
        return mean_score(self.columns)

    def resample(self, n_resamples: int) -> np.ndarray:
        return np.mean([c.resample(n_resamples) for c in self.columns.values()], axis=0)


@dataclass(frozen=True)
class Share:
    """A share of what a result scores, resampled with it: the bar of a claim that little is lost."""

    of: Any
    share: float

    @property
    def score(self) -> float:
        return self.share * self.of.score

    def resample(self, n_resamples: int) -> np.ndarray:
        return self.share * self.of.resample(n_resamples)


def verdict(found: Difference) -> str:
    """Of the claim that a difference is above 0: "shown" or "contradicted" if the whole interval is on one side of it
    and there are ENOUGH seeds, which agree; else "undecided"."""
    if len(found.by_seed) >= ENOUGH:
        if found.low > 0 and min(found.by_seed) > 0:
            return "shown"
        if found.high < 0 and max(found.by_seed) < 0:
            return "contradicted"
    return "undecided"


def claim(text: str, a: Sequence[Any], b: Sequence[Any]) -> dict[str, Any]:
    """A claim that a is above b as a record: what is claimed, what was found, the verdict."""
    found = paired(a, b)
    return {"claim": text, **asdict(found), "verdict": verdict(found)}


def arguments(description: str, more: Callable[[ArgumentParser], Any] = lambda parser: None) -> Namespace:
    """The command line of a finding: the folders of the runs, one a seed, and what `more` adds."""
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs, one a seed")
    more(parser)
    return parser.parse_args()


def write(name: str, runs: Sequence[SeedRun], command: str, content: Mapping[str, Any]) -> None:
    """results/findings/<name>.json, with the seeds, the revision and the command that made it."""
    head = {"finding": name, "seeds": [run.preset.seed for run in runs], "git": git_revision(), "command": command}
    write_json(RESULTS / f"{name}.json", head | dict(content), indent=1)
