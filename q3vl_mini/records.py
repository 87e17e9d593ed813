"""What everything else speaks: an Instance, a Clip, and the report's quadruple (I, Q, C, R).

An *instance* is a dict with any of the keys `text`, `image`, `video` (each one value or a list of
values) and optionally `instruction`. An image is a PIL image, an array (H, W, 3), a path, or an
object with `.render() -> PIL.Image`; a video is a path, bytes of a video file, a list of frames, a
`Clip`, or an object with `.render() -> Clip`. Drawing on demand keeps Emoji World small in memory
and lets the resolution be chosen late.

A *quadruple* (report, section 3) is one sub-dataset: an instruction; queries; a corpus; relevance
labels that give each query its positive and its negative documents.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

Instance = dict[str, Any]
MODALITIES = ("text", "image", "video")


@dataclass(frozen=True, eq=False)
class Clip:
    """Decoded video: `frames` uint8 (T, H, W, 3) and the rate `fps` in frames a second."""

    frames: np.ndarray
    fps: float

    def __post_init__(self):
        shape, dtype = getattr(self.frames, "shape", None), getattr(self.frames, "dtype", type(self.frames).__name__)
        if shape is None or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"a Clip needs frames of shape (T >= 1, H, W, 3), got {shape}")
        if dtype != np.uint8:
            raise ValueError(f"a Clip needs frames of uint8, got {dtype}; for floats in [0, 1] take (255 * x).round()")
        if not self.fps > 0:
            raise ValueError(f"a Clip needs fps > 0, got {self.fps}")


class Rejected(ValueError):
    """A row, an asset or an answer that is left out: `reason` in a few words to count by, `detail` what was found."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


ENOUGH_ROWS = 50  # of which a share means something


def too_many(unusable: int, rows: int, may_skip: float) -> bool:
    """Whether a job should stop: of ENOUGH_ROWS or more rows, more than the share `may_skip` cannot be used."""
    return rows >= ENOUGH_ROWS and unusable > may_skip * rows


@dataclass(frozen=True)
class Relevance:
    """Labels of one query: rows of the corpus, by position.

    `scores` are graded labels, one for each positive (STS only). `candidates` are the rows that
    this query ranks in evaluation; None ranks the whole corpus.
    """

    positives: tuple[int, ...]
    negatives: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    candidates: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Quadruple:
    """One sub-dataset (I, Q, C, R). `task` names the column of the stage table it belongs to."""

    name: str
    task: str
    instruction: str
    queries: Sequence[Instance]
    corpus: Sequence[Instance]
    relevance: Sequence[Relevance]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.queries)

    def select(self, rows: Sequence[int], name: str | None = None) -> "Quadruple":
        """The same corpus with only the queries at `rows`."""
        return replace(
            self,
            name=name or self.name,
            queries=[self.queries[i] for i in rows],
            relevance=[self.relevance[i] for i in rows],
        )

    def thin(self, documents: int, seed: int = 0) -> "Quadruple":
        """The same queries on a smaller corpus: the rows that labels and candidates name, others up to `documents`."""
        named = {i for labels in self.relevance for rows in _rows(labels) for i in rows}
        others = [i for i in range(len(self.corpus)) if i not in named]
        drawn = random.Random(seed).sample(others, min(len(others), max(0, documents - len(named))))
        kept = sorted({*named, *drawn})
        place = {row: i for i, row in enumerate(kept)}
        relevance = []
        for labels in self.relevance:
            positives, negatives, candidates = (tuple(place[i] for i in rows) for rows in _rows(labels))
            candidates = None if labels.candidates is None else candidates
            relevance.append(replace(labels, positives=positives, negatives=negatives, candidates=candidates))
        return replace(self, corpus=[self.corpus[i] for i in kept], relevance=relevance)

    def with_candidates(self, k: int, labelled: int = 4, seed: int = 0) -> "Quadruple":
        """The same queries with at most k documents to rank each: its first positive, which alone is right then, up to
        `labelled` of its negatives, and others drawn at random."""
        rng, relevance = random.Random(seed), []
        for labels in self.relevance:
            near = [i for i in labels.negatives if i not in labels.positives][:labelled]
            known = {*labels.positives, *labels.negatives}
            others = [i for i in range(len(self.corpus)) if i not in known]
            drawn = rng.sample(others, min(len(others), max(0, k - 1 - len(near))))
            one = labels.positives[:1]
            relevance.append(Relevance(one, tuple(near), None, (*one, *near, *drawn)))
        return replace(self, relevance=relevance)


def _rows(labels: Relevance) -> tuple[tuple[int, ...], ...]:
    """The rows that a query's positives, negatives and candidates name."""
    return labels.positives, labels.negatives, labels.candidates or ()


def as_instance(item: Instance | str) -> Instance:
    """A bare string as the instance that it stands for."""
    return {"text": item} if isinstance(item, str) else item


def is_empty(value: Any) -> bool:
    """True for what carries no content: None, '' or white space, an empty list."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, tuple)) and all(is_empty(v) for v in value)


def lone_surrogate(text: str) -> int | None:
    """Where half of a character of two (U+D800 to U+DFFF) stands alone in a text; None if nowhere.

    It comes from a text that was cut between the two, or from bytes that were no UTF-8. It can be neither tokenised
    nor written.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def text_problem(text: Any, name: str, where: str) -> str | None:
    """What keeps `text` from being a text, as a sentence that starts with `where`; None if it is one, or None."""
    if text is None:
        return None
    if not isinstance(text, str):
        return f"{where}: {name} must be a string, got {type(text).__name__}; convert it with str()"
    if (place := lone_surrogate(text)) is not None:
        return (
            f"{where}: {name} has half a character at position {place} (a lone surrogate, {text[place]!r}); read it "
            "again as UTF-8, or take text.encode('utf-8', 'replace').decode()"
        )
    return None


def validate_instance(instance: Any, where: str) -> list[str]:
    """Problems of one instance as sentences that start with `where`; an empty list if it is sound."""
    instance = as_instance(instance)
    if not isinstance(instance, Mapping):
        return [f"{where}: an item is a string or a dict with text, image or video, got {type(instance).__name__}"]
    problems = []
    unknown = sorted(set(instance) - {*MODALITIES, "instruction"}, key=str)
    if unknown:
        problems.append(f"{where}: unknown keys {unknown}; use text, image, video and instruction")
    if all(is_empty(instance.get(m)) for m in MODALITIES):
        problems.append(f"{where}: has no text, image or video; drop the row or fill one of them")
    texts = instance.get("text")
    texts = [(text, "text") for text in (texts if isinstance(texts, (list, tuple)) else [texts])]
    found = (text_problem(text, name, where) for text, name in [*texts, (instance.get("instruction"), "instruction")])
    return problems + [problem for problem in found if problem]


def validate_labels(labels: Relevance, n_docs: int, where: str) -> list[str]:
    """Problems of one query's labels over `n_docs` documents, as sentences that start with `where`."""
    problems = []
    if not labels.positives:
        problems.append(f"{where}: no positive document; drop the query or label one")
    for part in ("positives", "negatives", "candidates"):
        rows = getattr(labels, part) or ()
        if odd := [d for d in rows if isinstance(d, bool) or not isinstance(d, (int, np.integer))]:
            return [*problems, f"{where}: {part} holds {odd[0]!r}; give rows of the corpus as whole numbers"]
        if outside := [d for d in rows if not 0 <= d < n_docs]:
            problems.append(f"{where}: {part} {outside[:3]} are outside the corpus of {n_docs} documents; drop them")
    both = set(labels.positives) & set(labels.negatives)
    if both:
        problems.append(f"{where}: documents {sorted(both)[:3]} are positive and negative; keep one label")
    if labels.scores is not None and len(labels.scores) != len(labels.positives):
        n_scores = len(labels.scores)
        problems.append(f"{where}: {n_scores} scores for {len(labels.positives)} positives; give one each")
    if odd := [x for x in labels.scores or () if not (isinstance(x, Real) and math.isfinite(x))]:
        problems.append(f"{where}: the score {odd[0]!r} is no finite number; give the similarity of the two as one")
    if labels.candidates is not None and not set(labels.positives) <= set(labels.candidates):
        problems.append(f"{where}: a positive is not among the candidates; add it")
    return problems


def validate(quadruple: Quadruple, limit: int = 20) -> None:
    """Raise ValueError naming data set, row and remedy for the first `limit` faults of a quadruple."""
    name, n_queries, n_docs = quadruple.name, len(quadruple.queries), len(quadruple.corpus)
    problems: list[str] = []
    if problem := text_problem(quadruple.instruction, "the instruction", name):
        problems.append(problem)
    elif is_empty(quadruple.instruction):
        problems.append(f"{name}: the instruction is empty; state the task in one sentence")
    if n_queries == 0 or n_docs == 0:
        problems.append(f"{name}: {n_queries} queries and {n_docs} documents; both need at least one")
    if len(quadruple.relevance) != n_queries:
        problems.append(f"{name}: {n_queries} queries but {len(quadruple.relevance)} relevance rows; give one a query")
    for kind, rows in (("query", quadruple.queries), ("document", quadruple.corpus)):
        for i in range(len(rows)):
            if len(problems) >= limit:
                break
            problems += validate_instance(rows[i], f"{name}, {kind} {i}")
    for i, labels in enumerate(quadruple.relevance):
        if len(problems) >= limit:
            break
        problems += validate_labels(labels, n_docs, f"{name}, relevance row {i}")
    if problems:
        raise ValueError("\n".join(problems[:limit]))
