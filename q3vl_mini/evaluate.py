"""From vectors to the scores of MMEB-mini's columns: scoring, re-ranking, whole models.

Nothing here knows a model. An embedder is whatever has `.encode(items, instruction=None, ...)`, a
reranker whatever has `.logits(pairs, instruction=None)`.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from .memory import give_back_freed
from .metrics import (
    PairedDifference,
    aggregate,
    bootstrap_scores,
    chance_level,
    parse_metric,
    percentile_interval,
    positive_ranks,
)
from .records import Quadruple
from .vectors import encode_to_file

COLUMNS: dict[str, str] = {
    "image_cls": "hit@1",
    "image_qa": "hit@1",
    "image_ret": "hit@1",
    "image_gd": "hit@1",
    "video_cls": "hit@1",
    "video_qa": "hit@1",
    "video_ret": "hit@1",
    "video_mret": "hit@1",
    "visdoc": "ndcg@5",
    "text_ret": "ndcg@10",
    "text_cls": "hit@1",
    "sts": "spearman",
    "cross_lingual": "hit@1",
}

# Scores closer than this are ties. float32 noise of a batch is about 1e-7 in a cosine and 1e-5 in a
# logit: without rounding, a collapsed model would be ranked by noise and earn the chance level.
COSINE_DECIMALS = 6
LOGIT_DECIMALS = 4


class _Scored(ABC):
    """What data set and column share; each gives `score`, `chance` and `resample`."""

    score: float
    chance: float

    @abstractmethod
    def resample(self, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """Scores of `n_resamples` bootstrap samples of the queries, (n_resamples,)."""

    @cached_property
    def ci(self) -> tuple[float, float]:
        """The 95 % bootstrap interval."""
        return percentile_interval(self.resample())

    @property
    def above_chance(self) -> bool:
        """True if the whole interval is above the chance level."""
        return self.ci[0] > self.chance


@dataclass(frozen=True, eq=False)
class DatasetResult(_Scored):
    """One model on one quadruple: values (Q,), or (Q, 2) pairs of prediction and label for spearman.

    `n_candidates` is the mean over the queries (1 for spearman), `chance` the mean chance level.

    Taught in notebooks/14
    """

    name: str
    column: str
    metric: str
    values: np.ndarray
    n_candidates: float
    chance: float

    @property
    def n_queries(self) -> int:
        return len(self.values)

    @property
    def score(self) -> float:
        return aggregate(self.values)

    def resample(self, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """Bootstrap scores; the name enters the seed, so data sets of one length are drawn independently."""
        return bootstrap_scores(self.values, n_resamples, [seed, zlib.crc32(self.name.encode())])


@dataclass(frozen=True, eq=False)
class ColumnResult(_Scored):
    """One model on one column of the stage table: the mean over its data sets, each of one weight.

    Taught in notebooks/14
    """

    column: str
    datasets: tuple[DatasetResult, ...]

    def __post_init__(self):
        kinds = sorted({(d.column, d.metric) for d in self.datasets})
        if len(kinds) != 1 or kinds[0][0] != self.column:
            raise ValueError(f"column {self.column} takes data sets of its own task and one metric, got {kinds}")
        names = [d.name for d in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError(f"column {self.column}: two data sets have one name in {names}; rename one")

    @property
    def metric(self) -> str:
        return self.datasets[0].metric

    @property
    def n_queries(self) -> int:
        return sum(d.n_queries for d in self.datasets)

    @property
    def n_candidates(self) -> float:
        return _whole(np.mean([d.n_candidates for d in self.datasets]))

    @property
    def score(self) -> float:
        return float(np.mean([d.score for d in self.datasets]))

    @property
    def chance(self) -> float:
        return float(np.mean([d.chance for d in self.datasets]))

    def resample(self, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """Bootstrap scores of the column: queries are drawn within each data set."""
        return np.mean([d.resample(n_resamples, seed) for d in self.datasets], axis=0)


def _whole(x: float) -> int | float:
    return int(x) if float(x).is_integer() else float(x)


def mean_score(columns: Mapping[str, ColumnResult]) -> float:
    """The mean over the columns, each with the same weight.

    Taught in notebooks/14
    """
    return float(np.mean([columns[c].score for c in COLUMNS if c in columns]))


def compare(
    a: Mapping[str, ColumnResult],
    b: Mapping[str, ColumnResult],
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Paired differences a - b for each column that both have, and for their mean under "mean".

    Raises ValueError if a column was scored on other data sets or other numbers of queries.

    Taught in notebooks/14
    """
    shared = [c for c in COLUMNS if c in a and c in b]
    if not shared:
        raise ValueError(f"no column in common: {sorted(a)} and {sorted(b)}")
    draws, differences = [], {}
    for c in shared:
        shapes_a, shapes_b = ([(d.name, d.values.shape) for d in side[c].datasets] for side in (a, b))
        if shapes_a != shapes_b:
            raise ValueError(f"{c}: a was scored on {shapes_a}, b on {shapes_b}; score both on the same quadruples")
        draws.append(a[c].resample(n_resamples, seed) - b[c].resample(n_resamples, seed))
        differences[c] = PairedDifference(a[c].score - b[c].score, *percentile_interval(draws[-1], confidence))
    overall = float(np.mean([differences[c].difference for c in shared]))
    differences["mean"] = PairedDifference(overall, *percentile_interval(np.mean(draws, axis=0), confidence))
    return differences


def _metric_of(quadruple: Quadruple, metric: str | None = None) -> str:
    if metric is None and quadruple.task not in COLUMNS:
        raise ValueError(f"{quadruple.name}: task {quadruple.task!r} is no column; use one of {list(COLUMNS)}")
    metric = metric or COLUMNS[quadruple.task]
    if metric != "spearman":
        parse_metric(metric)
    return metric


def _check_vectors(quadruple: Quadruple, query_vectors: np.ndarray, corpus_vectors: np.ndarray) -> None:
    parts = (("query", query_vectors, quadruple.queries), ("document", corpus_vectors, quadruple.corpus))
    for kind, vectors, items in parts:
        if vectors.ndim != 2 or len(vectors) != len(items):
            raise ValueError(f"{quadruple.name}: {kind} vectors of shape {vectors.shape}, expected ({len(items)}, D)")
        if vectors.dtype == np.uint8:
            raise ValueError(f"{quadruple.name}: {kind} vectors are packed bits; unpack them to -1 and 1 first")
        if not all(np.isfinite(vectors[i : i + 4096]).all() for i in range(0, len(vectors), 4096)):
            raise ValueError(f"{quadruple.name}: {kind} vectors hold nan or inf; the model or its dtype overflowed")
    if query_vectors.shape[1] != corpus_vectors.shape[1]:
        raise ValueError(
            f"{quadruple.name}: queries have {query_vectors.shape[1]} dimensions, documents {corpus_vectors.shape[1]};"
            " encode both with the same dim"
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 (a zero row stays zero), in float64: chunking then cannot change a rounded cosine."""
    vectors = np.array(vectors, dtype=np.float64)
    vectors /= np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), 1e-12)[:, None]
    return vectors


def _cosine_rows(queries: np.ndarray, corpus: np.ndarray, memory_mb: float) -> Iterator[np.ndarray]:
    """Cosines (N,) with the corpus for each query in turn, computed in blocks of at most memory_mb."""
    n, dim = corpus.shape
    budget = memory_mb * 2**20 / 8 / 2  # in float64 numbers: half for the scores, half for their making
    rows = int(max(1, min(256, budget / 2 / n)))  # the last block is still in use while the next is made
    columns = int(max(1, budget / (dim + rows)))
    for start in range(0, len(queries), rows):
        block = _unit(queries[start : start + rows])
        scores = np.empty((len(block), n))
        for left in range(0, n, columns):
            scores[:, left : left + columns] = block @ _unit(corpus[left : left + columns]).T
        yield from np.round(scores, COSINE_DECIMALS, out=scores)


def ranked_rows(
    quadruple: Quadruple, query_vectors: np.ndarray, corpus_vectors: np.ndarray, memory_mb: float = 256
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """For each query: its row, its candidates (C,), their cosines (C,), and which are relevant (C,) bool.

    A query with its own candidates ranks those, every other one the whole corpus. Cosines are rounded
    to 1e-6. Queries come in no particular order. Chunks keep memory near memory_mb beside the vectors.

    Taught in notebooks/14
    """
    everything = np.arange(len(corpus_vectors))
    own = [i for i, labels in enumerate(quadruple.relevance) if labels.candidates is not None]
    open_ = [i for i, labels in enumerate(quadruple.relevance) if labels.candidates is None]
    for i in own:
        candidates = np.unique(np.asarray(quadruple.relevance[i].candidates))
        scores = np.round(_unit(corpus_vectors[candidates]) @ _unit(query_vectors[i : i + 1])[0], COSINE_DECIMALS)
        yield i, candidates, scores, _relevant(quadruple, i, candidates)
    cosines = _cosine_rows(query_vectors[open_] if own else query_vectors, corpus_vectors, memory_mb)
    for i, scores in zip(open_, cosines, strict=True):
        yield i, everything, scores, _relevant(quadruple, i, everything)


def _relevant(quadruple: Quadruple, row: int, candidates: np.ndarray) -> np.ndarray:
    positives = quadruple.relevance[row].positives
    relevant = np.isin(candidates, positives)
    if not positives or relevant.sum() != len(set(positives)):
        raise ValueError(
            f"{quadruple.name}, query {row}: {relevant.sum()} of its {len(set(positives))} positives are among its"
            f" {len(candidates)} candidates; expected at least one, and all of them"
        )
    return relevant


def _dataset_result(
    quadruple: Quadruple, metric: str, values: np.ndarray, counts: Sequence[tuple[int, int]]
) -> DatasetResult:
    """counts: (candidates, positives) for each query."""
    chance = float(np.mean([chance_level(metric, c, p) for c, p in counts]))
    n_candidates = _whole(np.mean([c for c, _ in counts]))
    return DatasetResult(quadruple.name, quadruple.task, metric, values, n_candidates, chance)


def _graded_pairs(quadruple: Quadruple) -> tuple[list[int], np.ndarray]:
    """STS: the one document of each query and its graded label."""
    for i, labels in enumerate(quadruple.relevance):
        if labels.scores is None or len(labels.positives) != 1:
            raise ValueError(
                f"{quadruple.name}, query {i}: spearman needs one positive with one score, got"
                f" {len(labels.positives)} positives and scores {labels.scores}"
            )
    labels = np.array([r.scores[0] for r in quadruple.relevance], dtype=np.float64)
    if np.ptp(labels) == 0:
        raise ValueError(f"{quadruple.name}: all labels are {labels[0]}; a rank correlation needs different ones")
    return [r.positives[0] for r in quadruple.relevance], labels


def score_quadruple(
    query_vectors: np.ndarray,
    corpus_vectors: np.ndarray,
    quadruple: Quadruple,
    *,
    metric: str | None = None,
    memory_mb: float = 256,
) -> DatasetResult:
    """Score one data set from its vectors (Q, D) and (N, D); they need not be normalised.

    metric: hit@k, ndcg@k, mrr@k or spearman; by default the one of the quadruple's column.
    Raises ValueError naming the data set if shapes, values or labels do not fit.

    Taught in notebooks/14
    """
    query_vectors, corpus_vectors = np.asanyarray(query_vectors), np.asanyarray(corpus_vectors)
    metric = _metric_of(quadruple, metric)
    _check_vectors(quadruple, query_vectors, corpus_vectors)
    if metric == "spearman":
        documents, labels = _graded_pairs(quadruple)
        cosines = np.einsum("qd,qd->q", _unit(query_vectors), _unit(corpus_vectors[documents]))
        values = np.stack([np.round(cosines, COSINE_DECIMALS), labels], axis=1)  # (Q, 2)
        return _dataset_result(quadruple, metric, values, [(1, 1)] * len(values))
    return _ranked_result(quadruple, metric, ranked_rows(quadruple, query_vectors, corpus_vectors, memory_mb))


def score_rows(quadruple: Quadruple, scores: Sequence[np.ndarray], metric: str | None = None) -> DatasetResult:
    """Score one data set from any scores: for each query one number a document of the corpus, (N,), higher is better.

    For what is not a cosine of vectors, such as BM25. Ties and candidates are treated as in `score_quadruple`.
    """
    metric = _metric_of(quadruple, metric)
    if len(scores) != len(quadruple) or any(len(row) != len(quadruple.corpus) for row in scores):
        raise ValueError(
            f"{quadruple.name}: expected {len(quadruple)} rows of {len(quadruple.corpus)} scores, one a document"
        )
    if metric == "spearman":
        documents, labels = _graded_pairs(quadruple)
        found = [row[document] for row, document in zip(scores, documents, strict=True)]
        return _dataset_result(quadruple, metric, np.stack([found, labels], axis=1), [(1, 1)] * len(labels))

    def ranked() -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        for i, labels in enumerate(quadruple.relevance):
            own = labels.candidates is not None
            candidates = np.unique(labels.candidates) if own else np.arange(len(quadruple.corpus))
            yield i, candidates, scores[i][candidates], _relevant(quadruple, i, candidates)

    return _ranked_result(quadruple, metric, ranked())


def _ranked_result(
    quadruple: Quadruple, metric: str, ranked: Iterable[tuple[int, np.ndarray, np.ndarray, np.ndarray]]
) -> DatasetResult:
    """ranked: for each query what `ranked_rows` yields."""
    function, k = parse_metric(metric)
    values, counts = np.empty(len(quadruple)), []
    for i, candidates, scores, relevant in ranked:
        values[i] = function(positive_ranks(scores, relevant), k)
        counts.append((len(candidates), int(relevant.sum())))
    return _dataset_result(quadruple, metric, values, counts)


def rerank_quadruple(
    reranker: Any,
    quadruple: Quadruple,
    query_vectors: np.ndarray,
    corpus_vectors: np.ndarray,
    *,
    top_k: int = 100,
    metric: str | None = None,
    memory_mb: float = 256,
    pairs_per_call: int = 1024,
) -> DatasetResult:
    """Let a cross-encoder re-order the embedding's top_k (report, table 5); the rest keeps its place.

    `reranker.logits([(query, document), ...], instruction=...)` gives margins logit(yes) - logit(no).
    They order like the scores of equation 5 and, unlike a float32 sigmoid, do not saturate into ties.
    Pairs of several queries share a call, so that short candidate lists still fill a batch. For
    spearman the margin of each labelled pair takes the cosine's place.

    Taught in notebooks/14
    """
    query_vectors, corpus_vectors = np.asanyarray(query_vectors), np.asanyarray(corpus_vectors)
    metric = _metric_of(quadruple, metric)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    _check_vectors(quadruple, query_vectors, corpus_vectors)
    if metric == "spearman":
        documents, labels = _graded_pairs(quadruple)
        margins = _margins(reranker, quadruple, list(enumerate(documents)), pairs_per_call)
        return _dataset_result(quadruple, metric, np.stack([margins, labels], axis=1), [(1, 1)] * len(labels))
    function, k = parse_metric(metric)
    pairs, spans, counts = [], [], []  # spans: query row, its slice of pairs, which are relevant, ranks below
    for i, candidates, scores, relevant in ranked_rows(quadruple, query_vectors, corpus_vectors, memory_mb):
        top = np.lexsort((relevant, -scores))[:top_k]  # by score, negatives first among ties
        below = positive_ranks(scores, relevant)
        spans.append((i, slice(len(pairs), len(pairs) + len(top)), relevant[top], below[below > top_k]))
        pairs += [(i, int(document)) for document in candidates[top]]
        counts.append((len(candidates), int(relevant.sum())))
    margins = _margins(reranker, quadruple, pairs, pairs_per_call)
    values = np.empty(len(query_vectors))
    for i, span, relevant, below in spans:
        values[i] = function(np.concatenate([positive_ranks(margins[span], relevant), below]), k)
    return _dataset_result(quadruple, metric, values, counts)


def judge_quadruple(reranker: Any, quadruple: Quadruple, metric: str = "hit@1", **options: Any) -> DatasetResult:
    """Score a cross-encoder alone, which orders each query's own candidates (`Quadruple.with_candidates`).

    options go to `reranker.logits` (batch_size).
    """
    asked = [np.unique(labels.candidates or ()) for labels in quadruple.relevance]
    if lacking := [i for i, candidates in enumerate(asked) if not len(candidates)]:
        raise ValueError(f"{quadruple.name}, query {lacking[0]}: no candidates of its own; see with_candidates")
    pairs = [(i, int(document)) for i, candidates in enumerate(asked) for document in candidates]
    parts = np.split(_margins(reranker, quadruple, pairs, **options), np.cumsum([len(c) for c in asked])[:-1])
    ranked = [(i, c, m, _relevant(quadruple, i, c)) for i, (c, m) in enumerate(zip(asked, parts, strict=True))]
    return _ranked_result(quadruple, metric, ranked)


def _margins(
    reranker: Any, quadruple: Quadruple, pairs: list[tuple[int, int]], pairs_per_call: int = 1024, **options: Any
) -> np.ndarray:
    margins = np.empty(len(pairs))
    for start in range(0, len(pairs), pairs_per_call):
        block = [(quadruple.queries[q], quadruple.corpus[d]) for q, d in pairs[start : start + pairs_per_call]]
        margins[start : start + len(block)] = reranker.logits(block, instruction=quadruple.instruction, **options)
    if not np.isfinite(margins).all():
        raise ValueError(f"{quadruple.name}: the reranker gave nan or inf; the model or its dtype overflowed")
    return np.round(margins, LOGIT_DECIMALS)


def encoded(
    embedder: Any,
    quadruples: Iterable[Quadruple],
    *,
    batch_size: int = 32,
    progress: bool = False,
    folder: Path | None = None,
    **options: Any,
) -> Iterator[tuple[Quadruple, np.ndarray, np.ndarray]]:
    """Yield each quadruple with its query vectors (Q, D) and corpus vectors (N, D).

    Queries get the quadruple's instruction, documents the embedder's default. A corpus object that
    several quadruples share is encoded once and released after its last use. With `folder`, vectors
    are memory-mapped files in it, <name>.queries.npy and <name>.corpus.npy, a / in a name as %2F; what an earlier call
    left there is taken, so a folder is of one model and one benchmark. `options` go to `encode` (dim, precision).

    Taught in notebooks/14
    """
    quadruples = list(quadruples)  # holds the corpora, so an id names one object throughout
    for quadruple in quadruples:
        _metric_of(quadruple)  # an unknown task fails before hours of encoding
    if folder is not None and len({q.name for q in quadruples}) < len(quadruples):
        raise ValueError(f"two data sets of one name in {[q.name for q in quadruples]}; a file is named after each")
    last_use = {id(q.corpus): i for i, q in enumerate(quadruples)}
    sizes = {id(q.corpus): len(q.corpus) for q in quadruples}
    total = sum(len(q) for q in quadruples) + sum(sizes.values())
    vectors: dict[int, np.ndarray] = {}
    with tqdm(total=total, desc="encode", unit="item", disable=not progress) as bar:
        for i, quadruple in enumerate(quadruples):
            key, file = id(quadruple.corpus), quote(quadruple.name, safe="")  # whoever wrote its card chose the name
            bar.set_postfix_str(quadruple.name)
            encode = partial(embedder.encode, batch_size=batch_size, **options)
            if key not in vectors:
                vectors[key] = _vectors(encode, quadruple.corpus, folder, f"{file}.corpus.npy")
                bar.update(sizes[key])
            encode = partial(encode, instruction=quadruple.instruction)
            queries = _vectors(encode, quadruple.queries, folder, f"{file}.queries.npy")
            bar.update(len(quadruple))
            yield quadruple, queries, vectors[key]
            if last_use[key] == i:
                del vectors[key]
            give_back_freed()


def _vectors(
    encode: Callable[[Sequence[Any]], np.ndarray], items: Sequence[Any], folder: Path | None, file: str
) -> np.ndarray:
    if folder is None:
        return encode(items)
    if (folder / file).is_file():
        return np.load(folder / file, mmap_mode="r")
    return encode_to_file(encode, items, folder / file)


def by_column(results: Iterable[DatasetResult]) -> dict[str, ColumnResult]:
    """The data sets of each column together, in the order of COLUMNS."""
    groups: dict[str, list[DatasetResult]] = {}
    for result in results:
        groups.setdefault(result.column, []).append(result)
    return {c: ColumnResult(c, tuple(groups[c])) for c in COLUMNS if c in groups}


def evaluate_embedder(
    embedder: Any, quadruples: Iterable[Quadruple], batch_size: int = 32, progress: bool = False, **options: Any
) -> dict[str, ColumnResult]:
    """Score a bi-encoder on a benchmark: {column: ColumnResult}, in the order of COLUMNS.

    Taught in notebooks/14
    """
    rows = encoded(embedder, quadruples, batch_size=batch_size, progress=progress, **options)
    return by_column(score_quadruple(queries, corpus, quadruple) for quadruple, queries, corpus in rows)


def evaluate_reranker(
    reranker: Any,
    embedder: Any,
    quadruples: Iterable[Quadruple],
    *,
    top_k: int = 100,
    batch_size: int = 32,
    progress: bool = False,
    folder: Path | None = None,
) -> dict[str, ColumnResult]:
    """Score embedder and reranker together: {column: ColumnResult}, as `evaluate_embedder`; `folder` as in `encoded`.

    Taught in notebooks/14
    """
    rows = encoded(embedder, quadruples, batch_size=batch_size, progress=progress, folder=folder)
    return by_column(rerank_quadruple(reranker, q, queries, corpus, top_k=top_k) for q, queries, corpus in rows)
