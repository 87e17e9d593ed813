"""From vectors to the report's stage table: metrics, chance levels, intervals, MMEB-mini.

Nothing here knows a model. An embedder is whatever has `.encode(items, instruction=None, ...)`, a
reranker whatever has `.logits(pairs, instruction=None)`. Every retrieval metric is a function of the
*ranks of the positives* of one query, so that ties are settled in one place, `positive_ranks`.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata
from tqdm import tqdm

from q3vl_mini.records import Quadruple

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
META_KEYS = ("git", "versions", "seed", "preset", "cores", "wall_s", "peak_rss_mb", "stage_wall_s")

# Scores closer than this are ties. float32 noise of a batch is about 1e-7 in a cosine and 1e-5 in a
# logit: without rounding, a collapsed model would be ranked by noise and earn the chance level.
COSINE_DECIMALS = 6
LOGIT_DECIMALS = 4


def positive_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks of the positives in the ranking by descending score, pessimistic about ties.

    scores (C,) of the candidates; relevant (C,) bool. Returns (P,) ranks from 1, ascending. A negative
    with the same score stands before the positive, so equal scores for everything earn nothing.

    >>> positive_ranks(np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, True, False, True]))
    array([3, 4])

    Taught in notebooks/14
    """
    positives = np.sort(scores[relevant])[::-1]
    negatives = scores[~relevant]
    ahead = [np.count_nonzero(negatives >= score) for score in positives]
    return np.arange(1, len(positives) + 1) + np.array(ahead, dtype=np.int64)


def hit_at_k(ranks: np.ndarray, k: int) -> float:
    """1 if a positive is among the first k, else 0. ranks (P,) as from `positive_ranks`.

    >>> hit_at_k(np.array([3, 4]), 1), hit_at_k(np.array([3, 4]), 3)
    (0.0, 1.0)

    Taught in notebooks/14
    """
    return float(np.min(ranks) <= k)


def reciprocal_rank(ranks: np.ndarray, k: int) -> float:
    """1 / rank of the first positive, 0 if it is below k; the mean over queries is MRR@k.

    Taught in notebooks/14
    """
    first = int(np.min(ranks))
    return 1.0 / first if first <= k else 0.0


def ndcg_at_k(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with linear gain: sum of 1 / log2(1 + rank) over the positives, over its best value.

    Labels are binary here, where linear (rel) and exponential (2^rel - 1) gain are equal
    (Jarvelin and Kekalainen 2002).

    >>> round(ndcg_at_k(np.array([2]), 5), 4)
    0.6309

    Taught in notebooks/14
    """
    found = ranks[ranks <= k]
    return float(np.sum(1.0 / np.log2(1.0 + found)) / _ideal_dcg(len(ranks), k))


def _ideal_dcg(n_positives: int, k: int) -> float:
    return sum(1.0 / math.log2(1 + rank) for rank in range(1, min(n_positives, k) + 1))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, ties with their average rank. Arrays (..., Q) give (...).

    0 where either side is constant (scipy gives nan): a model with one answer to everything has
    learned nothing.

    Taught in notebooks/14
    """
    ranks_a, ranks_b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    ranks_a -= ranks_a.mean(-1, keepdims=True)
    ranks_b -= ranks_b.mean(-1, keepdims=True)
    covariance = (ranks_a * ranks_b).sum(-1)
    scale = np.sqrt((ranks_a**2).sum(-1) * (ranks_b**2).sum(-1))
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)


def _parse_metric(metric: str) -> tuple[Callable[[np.ndarray, int], float], int]:
    """'ndcg@5' -> (ndcg_at_k, 5)."""
    functions = {"hit": hit_at_k, "ndcg": ndcg_at_k, "mrr": reciprocal_rank}
    name, _, k = metric.partition("@")
    if name not in functions or not k.isdigit() or int(k) < 1:
        raise ValueError(f"unknown metric {metric!r}; use hit@k, ndcg@k or mrr@k with k >= 1, or spearman")
    return functions[name], int(k)


@lru_cache(maxsize=4096)
def chance_level(metric: str, n_candidates: int, n_positives: int) -> float:
    """Expected value of a metric for one query under a uniformly random ranking, exactly.

    hit@k: 1 - C(N-P, k) / C(N, k), so P/N at k = 1. ndcg@k: every rank holds a positive with
    probability P/N. mrr@k: sum over r of P(first positive at r) / r. spearman: 0.

    >>> chance_level("hit@1", 4, 1)
    0.25

    Taught in notebooks/14
    """
    if metric == "spearman":
        return 0.0
    if not 1 <= n_positives <= n_candidates:
        raise ValueError(f"{n_positives} positives of {n_candidates} candidates; expected 1 <= positives <= candidates")
    function, k = _parse_metric(metric)
    if function is ndcg_at_k:
        expected_dcg = n_positives / n_candidates * _ideal_dcg(n_candidates, k)
        return expected_dcg / _ideal_dcg(n_positives, k)
    none_yet, hit, reciprocal = 1.0, 0.0, 0.0  # none_yet: probability of no positive before this rank
    for rank in range(1, min(k, n_candidates) + 1):
        here = none_yet * min(1.0, n_positives / (n_candidates - rank + 1))
        hit, reciprocal, none_yet = hit + here, reciprocal + here / rank, none_yet - here
        if none_yet <= 0:
            break
    return hit if function is hit_at_k else reciprocal


class PairedDifference(NamedTuple):
    """score(a) - score(b) and its interval. Taught in notebooks/14"""

    difference: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def aggregate(values: np.ndarray) -> float:
    """The score of a data set: the mean of values (Q,), or Spearman of pairs (Q, 2).

    Taught in notebooks/14
    """
    return float(values.mean()) if values.ndim == 1 else float(spearman(values[:, 0], values[:, 1]))


def bootstrap_scores(values: np.ndarray, n_resamples: int = 1000, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Scores (n_resamples,) of data sets drawn from the queries with replacement.

    values (Q,) are averaged; values (Q, 2) are pairs, resampled together and correlated. The draw
    depends on Q and the seed alone: two models with one seed see the same queries, which is what
    makes a difference paired.

    Taught in notebooks/14
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("no values to resample; expected one a query")
    rng = np.random.default_rng(seed)
    scores = np.empty(n_resamples)
    step = max(1, 2**21 // n)  # about 16 MB of indices at a time
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        sample = values[rng.integers(0, n, size=(stop - start, n))]  # (R, Q) or (R, Q, 2)
        scores[start:stop] = sample.mean(1) if values.ndim == 1 else spearman(sample[..., 0], sample[..., 1])
    return scores


def _percentiles(scores: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: np.ndarray, n_resamples: int = 1000, confidence: float = 0.95, seed: int | Sequence[int] = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `aggregate(values)` (Efron 1979).

    Queries are what varies; the model and the corpus are fixed. Where all values are equal the
    interval has no width, whatever their number: read n_queries beside it.

    Taught in notebooks/14
    """
    return _percentiles(bootstrap_scores(values, n_resamples, seed), confidence)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, n_resamples: int = 1000, confidence: float = 0.95, seed: int | Sequence[int] = 0
) -> PairedDifference:
    """Difference a - b of two models on the same queries, row by row; values as in `bootstrap_scores`.

    Taught in notebooks/14
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values of shapes {a.shape} and {b.shape}; score both models on the same queries")
    differences = bootstrap_scores(a, n_resamples, seed) - bootstrap_scores(b, n_resamples, seed)
    return PairedDifference(aggregate(a) - aggregate(b), *_percentiles(differences, confidence))


class _Scored:
    """What data set and column share; each gives `score`, `chance` and `resample`."""

    score: float
    chance: float

    def resample(self, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
        raise NotImplementedError

    @cached_property
    def ci(self) -> tuple[float, float]:
        """The 95 % bootstrap interval."""
        return _percentiles(self.resample(), 0.95)

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
        differences[c] = PairedDifference(a[c].score - b[c].score, *_percentiles(draws[-1], confidence))
    overall = float(np.mean([differences[c].difference for c in shared]))
    differences["mean"] = PairedDifference(overall, *_percentiles(np.mean(draws, axis=0), confidence))
    return differences


def _metric_of(quadruple: Quadruple, metric: str | None = None) -> str:
    if metric is None and quadruple.task not in COLUMNS:
        raise ValueError(f"{quadruple.name}: task {quadruple.task!r} is no column; use one of {list(COLUMNS)}")
    metric = metric or COLUMNS[quadruple.task]
    if metric != "spearman":
        _parse_metric(metric)
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
    function, k = _parse_metric(metric)
    values, counts = np.empty(len(query_vectors)), []
    for i, candidates, scores, relevant in ranked_rows(quadruple, query_vectors, corpus_vectors, memory_mb):
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
    function, k = _parse_metric(metric)
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


def _margins(reranker: Any, quadruple: Quadruple, pairs: list[tuple[int, int]], pairs_per_call: int) -> np.ndarray:
    margins = np.empty(len(pairs))
    for start in range(0, len(pairs), pairs_per_call):
        block = [(quadruple.queries[q], quadruple.corpus[d]) for q, d in pairs[start : start + pairs_per_call]]
        margins[start : start + len(block)] = reranker.logits(block, instruction=quadruple.instruction)
    if not np.isfinite(margins).all():
        raise ValueError(f"{quadruple.name}: the reranker gave nan or inf; the model or its dtype overflowed")
    return np.round(margins, LOGIT_DECIMALS)


def encoded(
    embedder: Any, quadruples: Iterable[Quadruple], *, batch_size: int = 32, progress: bool = False, **options: Any
) -> Iterator[tuple[Quadruple, np.ndarray, np.ndarray]]:
    """Yield each quadruple with its query vectors (Q, D) and corpus vectors (N, D).

    Queries get the quadruple's instruction, documents the embedder's default. A corpus object that
    several quadruples share is encoded once and released after its last use. `options` go to
    `encode` (dim, precision).

    Taught in notebooks/14
    """
    quadruples = list(quadruples)  # holds the corpora, so an id names one object throughout
    for quadruple in quadruples:
        _metric_of(quadruple)  # an unknown task fails before hours of encoding
    last_use = {id(q.corpus): i for i, q in enumerate(quadruples)}
    sizes = {id(q.corpus): len(q.corpus) for q in quadruples}
    total = sum(len(q) for q in quadruples) + sum(sizes.values())
    vectors: dict[int, np.ndarray] = {}
    with tqdm(total=total, desc="encode", unit="item", disable=not progress) as bar:
        for i, quadruple in enumerate(quadruples):
            key = id(quadruple.corpus)
            bar.set_postfix_str(quadruple.name)
            if key not in vectors:
                vectors[key] = embedder.encode(quadruple.corpus, batch_size=batch_size, **options)
                bar.update(sizes[key])
            queries = embedder.encode(
                quadruple.queries, instruction=quadruple.instruction, batch_size=batch_size, **options
            )
            bar.update(len(quadruple))
            yield quadruple, queries, vectors[key]
            if last_use[key] == i:
                del vectors[key]


def _by_column(results: Iterable[DatasetResult]) -> dict[str, ColumnResult]:
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
    return _by_column(score_quadruple(queries, corpus, quadruple) for quadruple, queries, corpus in rows)


def evaluate_reranker(
    reranker: Any,
    embedder: Any,
    quadruples: Iterable[Quadruple],
    *,
    top_k: int = 100,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, ColumnResult]:
    """Score embedder and reranker together: {column: ColumnResult}, as `evaluate_embedder`.

    Taught in notebooks/14
    """
    rows = encoded(embedder, quadruples, batch_size=batch_size, progress=progress)
    return _by_column(rerank_quadruple(reranker, q, queries, corpus, top_k=top_k) for q, queries, corpus in rows)


def _record(result: DatasetResult | ColumnResult) -> dict[str, Any]:
    return {
        "score": result.score,
        "metric": result.metric,
        "n_queries": result.n_queries,
        "n_candidates": result.n_candidates,
        "chance": result.chance,
        "ci": list(result.ci),
    }


def result_records(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{model: {column: record, "mean": {"score"}, "datasets": {...}}}, the `models` of results/tiny.json.

    Takes ColumnResults or such records, so tables are made from a run or from its file alike. The mean
    is None for a model that lacks a column another model has: it would not be comparable.

    Taught in notebooks/14
    """
    if not models:
        raise ValueError("no models; expected {model: {column: ColumnResult}}")
    for model, columns in models.items():
        unknown = set(columns) - {*COLUMNS, "mean", "datasets"}
        if unknown or not any(c in COLUMNS for c in columns):
            raise ValueError(f"{model}: columns {sorted(columns)}; expected at least one and only {list(COLUMNS)}")
    present = [c for c in COLUMNS if any(c in columns for columns in models.values())]
    records: dict[str, dict[str, Any]] = {}
    for model, columns in models.items():
        entry: dict[str, Any] = {}
        datasets = dict(columns.get("datasets", {}))
        for c in present:
            if isinstance(columns.get(c), ColumnResult):
                entry[c] = _record(columns[c])
                datasets |= {d.name: {"column": c, **_record(d)} for d in columns[c].datasets}
            elif c in columns:
                entry[c] = dict(columns[c])
        complete = len(entry) == len(present)
        mean = float(np.mean([r["score"] for r in entry.values()])) if complete else None
        records[model] = {**entry, "mean": {"score": mean}}
        if datasets:
            records[model]["datasets"] = datasets
    return records


def stage_table(results: Mapping[str, Mapping[str, Any]], intervals: bool = False) -> str:
    """Markdown table like the report's table 6, in percent: a row a model, then chance and candidates.

    results: {model: {column: ColumnResult or its record}}. intervals adds the bootstrap interval.

    Taught in notebooks/14
    """
    records = result_records(results)
    columns = [c for c in COLUMNS if any(c in r for r in records.values())]
    labels = {c: next(r[c] for r in records.values() if c in r) for c in columns}

    def cell(record: Mapping[str, Any] | None) -> str:
        if record is None or record["score"] is None:
            return "–"
        score = f"{100 * record['score']:.1f}"
        if not intervals or "ci" not in record:
            return score
        return score + f" [{100 * record['ci'][0]:.1f}, {100 * record['ci'][1]:.1f}]"

    lines = [["model", *columns, "mean"], ["---"] + ["---:"] * (len(columns) + 1)]
    lines += [[model, *(cell(r.get(c)) for c in columns), cell(r["mean"])] for model, r in records.items()]
    chances = [labels[c]["chance"] for c in columns]
    lines.append(["chance", *(f"{100 * chance:.1f}" for chance in chances), f"{100 * np.mean(chances):.1f}"])
    lines.append(["candidates", *(f"{labels[c]['n_candidates']:.0f}" for c in columns), ""])
    lines.append(["metric", *(labels[c]["metric"] for c in columns), ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(
    path: str | Path,
    meta: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    unseen_styles: Mapping[str, Mapping[str, float]],
) -> None:
    """Write results/tiny.json: meta, models, unseen_styles (schema in DESIGN.md), replaced in one move.

    Raises ValueError if meta or a row of unseen_styles lacks a key, or a number is nan.

    Taught in notebooks/14
    """
    missing = [key for key in META_KEYS if key not in meta]
    if missing:
        raise ValueError(f"meta lacks {missing}; expected {list(META_KEYS)}")
    for model, row in unseen_styles.items():
        if set(row) != {"hit@1", "hit@10", "n"}:
            raise ValueError(f"unseen_styles of {model}: keys {sorted(row)}; expected hit@1, hit@10 and n")
    content = {"meta": dict(meta), "models": result_records(models), "unseen_styles": dict(unseen_styles)}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


PANELS = {
    "Images": ("image_cls", "image_qa", "image_ret", "image_gd"),
    "Video": ("video_cls", "video_qa", "video_ret", "video_mret"),
    "Documents and text": ("visdoc", "text_ret", "text_cls", "sts", "cross_lingual"),
}
# Okabe and Ito's colours, told apart by marker too; black is kept for the mean.
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))


def plot_stage_table(results: Mapping[str, Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Slope chart of the stage table: chance, then the models from left to right, a line a column.

    Bars are bootstrap intervals; the black line in each panel is the mean over all columns. Saves to
    `path` if given, without touching a notebook's backend, and returns the figure.

    Taught in notebooks/14
    """
    records = result_records(results)
    models = list(records)
    panels = {t: [c for c in names if any(c in r for r in records.values())] for t, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(1.6 + 3.6 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        labels = []
        for column, (colour, marker) in zip(columns, LINES, strict=False):
            known = [(x, r[column]) for x, r in enumerate(records.values(), start=1) if column in r]
            xs, scores = [x for x, _ in known], 100 * np.array([r["score"] for _, r in known])
            spread = np.abs(100 * np.array([r["ci"] for _, r in known]).T - scores)  # (2, models)
            axis.plot([0, xs[0]], [100 * known[0][1]["chance"], scores[0]], color=colour, linestyle=":", marker="_")
            axis.errorbar(xs, scores, yerr=spread, color=colour, marker=marker, capsize=2, linewidth=1.6)
            labels.append((scores[-1], f"{column} {scores[-1]:.0f}", colour))
        overall = [(x, r["mean"]["score"]) for x, r in enumerate(records.values(), start=1)]
        means = [(x, 100 * score) for x, score in overall if score is not None]
        if means:
            axis.plot(*zip(*means, strict=True), color="black", linewidth=2.4, alpha=0.6)
            labels.append((means[-1][1], f"mean {means[-1][1]:.0f}", "black"))
        for y, (_, text, colour) in zip(_spread([y for y, _, _ in sorted(labels)], 4.5), sorted(labels), strict=True):
            axis.annotate(text, (len(models) + 0.15, y), color=colour, fontsize=8, va="center", annotation_clip=False)
        axis.set(title=title, xlim=(-0.2, len(models) + 0.15 + 0.34 * (len(models) + 1)))
        axis.set_xticks(range(len(models) + 1), ["chance", *models], rotation=30, ha="right")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("score, % (metric of each column)")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, their mean kept, so that labels do not overlap."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [height - shift for height in moved]
