"""Retrieval metrics, their chance levels and bootstrap intervals: pure functions of numpy arrays.

Every retrieval metric is a function of the *ranks of the positives* of one query, so that ties are
settled in one place, `positive_ranks`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


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


def parse_metric(metric: str) -> tuple[Callable[[np.ndarray, int], float], int]:
    """The function and k that a name means: 'ndcg@5' gives (ndcg_at_k, 5); ValueError for an unknown one.

    Taught in notebooks/14
    """
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
    function, k = parse_metric(metric)
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


def percentile_interval(scores: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): the middle share `confidence` of bootstrap scores (R,). Taught in notebooks/14"""
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
    return percentile_interval(bootstrap_scores(values, n_resamples, seed), confidence)


class PairedDifference(NamedTuple):
    """score(a) - score(b) and its interval. Taught in notebooks/14"""

    difference: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


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
    return PairedDifference(aggregate(a) - aggregate(b), *percentile_interval(differences, confidence))
