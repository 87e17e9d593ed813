"""Metrics, chance levels and intervals against other libraries, simulations and slow loops."""

import doctest
import math

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
from sklearn.metrics import ndcg_score

from q3vl_mini import metrics
from q3vl_mini.metrics import (
    bootstrap_interval,
    bootstrap_scores,
    chance_level,
    hit_at_k,
    ndcg_at_k,
    paired_bootstrap,
    parse_metric,
    positive_ranks,
    reciprocal_rank,
    spearman,
)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_metrics_agree_with_trec_eval(k):
    rng = np.random.default_rng(k)
    for n_positives in (1, 2, 7, 12):
        scores = rng.permutation(30) / 30
        relevant = np.isin(np.arange(30), rng.choice(30, n_positives, replace=False))
        judged = {"q": {f"d{i}": int(r) for i, r in enumerate(relevant)}}
        run = {"q": {f"d{i}": float(s) for i, s in enumerate(scores)}}
        theirs = pytrec_eval.RelevanceEvaluator(judged, {f"success.{k}", f"ndcg_cut.{k}", "recip_rank"}).evaluate(run)
        ranks = positive_ranks(scores, relevant)
        assert hit_at_k(ranks, k) == theirs["q"][f"success_{k}"]
        assert ndcg_at_k(ranks, k) == pytest.approx(theirs["q"][f"ndcg_cut_{k}"], abs=1e-12)
        within = theirs["q"]["recip_rank"] if theirs["q"]["recip_rank"] >= 1 / k else 0.0
        assert reciprocal_rank(ranks, k) == pytest.approx(within, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 10, 50])
def test_ndcg_agrees_with_sklearn(k):
    rng = np.random.default_rng(k)
    scores = rng.normal(size=(20, 30))
    relevant = rng.random((20, 30)) < 0.15
    relevant[:, 0] = True
    ours = [ndcg_at_k(positive_ranks(s, r), k) for s, r in zip(scores, relevant, strict=True)]
    theirs = [ndcg_score([r.astype(int)], [s], k=k, ignore_ties=True) for s, r in zip(scores, relevant, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_ndcg_by_hand():
    # positives at ranks 1 and 4 of two: (1 + 1/log2(5)) / (1 + 1/log2(3)); the third is below k
    expected = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert ndcg_at_k(np.array([1, 4, 6]), 5) == pytest.approx(expected)
    assert ndcg_at_k(np.array([6]), 5) == 0


def test_a_positive_tied_with_a_negative_stands_below_it():
    scores, relevant = np.array([0.5, 0.5, 0.5, 0.7]), np.array([True, False, True, False])
    assert positive_ranks(scores, relevant).tolist() == [3, 4]
    # what sorting alone would give: the positive that happens to come first is at rank 2
    optimistic = np.flatnonzero(relevant[np.argsort(-scores, kind="stable")]) + 1
    assert optimistic.tolist() == [2, 4]


def test_ties_among_positives_alone_cost_nothing():
    assert positive_ranks(np.array([0.5, 0.5, 0.1]), np.array([True, True, False])).tolist() == [1, 2]


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_agrees_with_scipy_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    a, b = rng.integers(levels, size=(2, 6, 50))
    theirs = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), theirs, atol=1e-12)


def test_spearman_of_a_constant_is_zero_not_nan():
    assert spearman(np.ones(5), np.arange(5)) == 0


@pytest.mark.parametrize("metric", ["hit@1", "hit@3", "ndcg@5", "ndcg@10", "mrr@3", "mrr@10"])
@pytest.mark.parametrize(("n_candidates", "n_positives"), [(4, 1), (7, 3), (30, 2), (5, 5)])
def test_chance_level_agrees_with_a_simulation(metric, n_candidates, n_positives):
    function, k = parse_metric(metric)
    rng = np.random.default_rng(0)
    relevant = np.arange(n_candidates) < n_positives
    values = [function(positive_ranks(rng.permutation(n_candidates), relevant), k) for _ in range(4000)]
    expected = chance_level(metric, n_candidates, n_positives)
    assert np.mean(values) == pytest.approx(expected, abs=4.5 * np.std(values) / math.sqrt(4000) + 1e-12)


def test_chance_of_hit_at_1_is_the_share_of_positives():
    assert chance_level("hit@1", 40, 3) == pytest.approx(3 / 40)
    assert chance_level("hit@50", 40, 3) == pytest.approx(1)
    assert chance_level("spearman", 1, 1) == 0


def test_chance_refuses_more_positives_than_candidates():
    with pytest.raises(ValueError, match="5 positives of 4 candidates"):
        chance_level("hit@1", 4, 5)


@pytest.mark.parametrize("metric", ["map", "hit", "hit@0", "ndcg@x"])
def test_unknown_metrics_are_named(metric):
    with pytest.raises(ValueError, match=f"unknown metric '{metric}'"):
        chance_level(metric, 4, 1)


def test_the_interval_agrees_with_scipy():
    values = np.random.default_rng(0).random(80) ** 2
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1)
    low, high = bootstrap_interval(values, n_resamples=20000)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)


def test_spearman_is_bootstrapped_over_pairs():
    rng = np.random.default_rng(0)
    a = rng.normal(size=60).round(1)
    pairs = np.stack([a, a + rng.normal(size=60)], axis=1)
    draws = np.random.default_rng(7).integers(0, 60, size=(100, 60))
    loop = [scipy.stats.spearmanr(pairs[rows, 0], pairs[rows, 1]).statistic for rows in draws]
    np.testing.assert_allclose(bootstrap_scores(pairs, 100, seed=7), loop, atol=1e-12)
    assert bootstrap_interval(pairs)[0] > 0.3  # drawing the two sides apart would centre it at zero


def test_the_95_percent_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = bootstrap_interval((rng.random(80) < 0.4).astype(float), n_resamples=500, seed=trial)
        covered += low <= 0.4 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_a_wider_confidence_is_a_wider_interval():
    values = np.random.default_rng(0).random(50)
    (a, b), (c, d) = (bootstrap_interval(values, confidence=q) for q in (0.9, 0.99))
    assert c < a < b < d


def test_resampling_in_blocks_equals_one_block():
    values = np.random.default_rng(0).random(2**20 + 1)  # two resamples do not fit a block
    rng = np.random.default_rng(5)
    loop = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(3)]
    np.testing.assert_allclose(bootstrap_scores(values, n_resamples=3, seed=5), loop)


def test_a_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=200)
    a, b = difficulty + 0.1 + 0.05 * rng.normal(size=200), difficulty + 0.05 * rng.normal(size=200)
    result = paired_bootstrap(a, b)
    assert result.difference == pytest.approx(np.mean(a - b))
    assert result[1:] == pytest.approx(bootstrap_interval(a - b))
    assert result.significant
    unpaired = bootstrap_scores(a, seed=1) - bootstrap_scores(b, seed=2)
    assert np.quantile(unpaired, 0.025) < 0 < result.low  # the pairs are what makes it visible


def test_a_model_does_not_differ_from_itself():
    values = np.random.default_rng(0).random(30)
    result = paired_bootstrap(values, values)
    assert tuple(result) == (0, 0, 0) and not result.significant


def test_paired_values_must_be_of_the_same_queries():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        paired_bootstrap(np.ones(3), np.ones(4))


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval(np.array([]))


def test_the_examples_in_the_docstrings_are_true():
    outcome = doctest.testmod(metrics)
    assert outcome.attempted >= 4 and outcome.failed == 0
