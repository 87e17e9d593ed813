"""What all findings share: the runs of several seeds, paired differences over them, and what is said of a claim."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from q3vl_mini import evaluate
from q3vl_mini.config import Preset, load_config
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


def paired(a: Sequence[Any], b: Sequence[Any], n_resamples: int = 2000) -> Difference:
    """The difference of two models, each trained with the same seeds and scored on the same queries.

    a, b: for each seed a result with `score` and `resample`. Bootstrap over both: every sample draws the seeds with
    replacement, and then the queries, the same for both models. Three seeds say little about a fourth: an interval
    holds what they and these queries show.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} seeds; a pair needs the same, and at least one")
    draws = np.stack([x.resample(n_resamples) - y.resample(n_resamples) for x, y in zip(a, b, strict=True)])  # (S, R)
    seeds = np.random.default_rng(0).integers(0, len(a), size=(len(a), n_resamples))
    by_seed = [x.score - y.score for x, y in zip(a, b, strict=True)]
    interval = percentile_interval(np.take_along_axis(draws, seeds, axis=0).mean(0))
    return Difference(float(np.mean(by_seed)), *interval, tuple(by_seed))


@dataclass(frozen=True)
class Overall:
    """All columns of a model as one result: their mean, resampled within each."""

    columns: Columns

    @property
    def score(self) -> float:
        return mean_score(self.columns)

    def resample(self, n_resamples: int) -> np.ndarray:
        return np.mean([c.resample(n_resamples) for c in self.columns.values()], axis=0)


def verdict(found: Difference, above: float = 0.0) -> str:
    """Of the claim that a difference is above a bound: "shown" or "not shown" if the whole interval is on one side of
    it and there are ENOUGH seeds, which agree; else "undecided"."""
    if len(found.by_seed) >= ENOUGH:
        if found.low > above and min(found.by_seed) > above:
            return "shown"
        if found.high < above and max(found.by_seed) < above:
            return "not shown"
    return "undecided"


def claim(text: str, a: Sequence[Any], b: Sequence[Any], above: float = 0.0) -> dict[str, Any]:
    """A claim a - b > above as a record: what is claimed, what was found, the verdict."""
    found = paired(a, b)
    return {"claim": text, "above": above, **asdict(found), "verdict": verdict(found, above)}


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
