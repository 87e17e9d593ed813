"""Section 3.3 against a slow loop, by hand, in its empty cases, and measured on injected noise."""

import tracemalloc
from dataclasses import replace

import faiss
import numpy as np
import pytest

from q3vl_mini.mining import HISTOGRAM_EDGES, mine, mine_query, noise_report, top_k
from q3vl_mini.records import Quadruple, Relevance, validate


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def quadruple_of(relevance, n_docs, name="set"):
    queries = [{"text": f"query {i}"} for i in range(len(relevance))]
    corpus = [{"text": f"document {i}"} for i in range(n_docs)]
    return Quadruple(name, "text_ret", "Find the document.", queries, corpus, list(relevance), {"seed": 3})


def random_case(seed=0, n_queries=60, n_docs=50, dim=6):
    """Random vectors; positives are partly near the query and partly anywhere; some labelled negatives."""
    rng = np.random.default_rng(seed)
    queries, corpus = unit(rng, n_queries, dim), unit(rng, n_docs, dim)
    relevance = []
    for query in queries:
        near = np.argsort(-corpus @ query)[: rng.integers(1, 20)]
        drawn = rng.permutation(np.unique(np.append(near[-2:], rng.integers(0, n_docs, 2))))
        negatives = [d for d in rng.integers(0, n_docs, 2).tolist() if d not in drawn]
        relevance.append(Relevance(tuple(drawn.tolist()), tuple(dict.fromkeys(negatives))))
    return quadruple_of(relevance, n_docs), queries, corpus


SETTING = {"k": 10, "t_plus": 0.55, "delta_minus": 0.05, "n_negatives": 4}


# top K


@pytest.mark.parametrize("k", [1, 7, 50])
def test_top_k_agrees_with_faiss(k):
    rng = np.random.default_rng(k)
    queries, corpus = unit(rng, 40, 16), unit(rng, 50, 16)
    index = faiss.IndexFlatIP(16)
    index.add(corpus)
    their_scores, their_rows = index.search(queries, k)
    rows, scores = top_k(queries, corpus, k)
    np.testing.assert_array_equal(rows, their_rows)
    np.testing.assert_allclose(scores, their_scores, atol=1e-6)


@pytest.mark.parametrize("memory_mb", [1e-6, 0.002, 0.01, 0.1])
def test_the_block_size_does_not_show(memory_mb):
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 23, 16), unit(rng, 131, 16)
    corpus[60:100] = corpus[:40]  # ties across blocks
    rows, scores = top_k(queries, corpus, 9)
    in_blocks = top_k(queries, corpus, 9, memory_mb=memory_mb)
    np.testing.assert_array_equal(rows, in_blocks[0])
    np.testing.assert_array_equal(scores, in_blocks[1])


def test_ties_go_to_the_lower_row_even_at_the_edge_of_the_top():
    corpus = np.ones((99, 1), dtype=np.float32)  # more of them than faiss is asked for
    corpus[4] = 2
    rows, _ = top_k(np.ones((2, 1), dtype=np.float32), corpus, 4)
    assert rows.tolist() == [[4, 0, 1, 2]] * 2


def test_k_is_cut_to_the_corpus():
    rng = np.random.default_rng(0)
    rows, scores = top_k(unit(rng, 3, 4), unit(rng, 5, 4), 100)
    assert rows.shape == scores.shape == (3, 5)
    with pytest.raises(ValueError, match="k is 0"):
        top_k(unit(rng, 3, 4), unit(rng, 5, 4), 0)


def test_a_corpus_on_disk_is_searched_within_the_memory_bound(tmp_path):
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 100, 128), unit(rng, 40000, 128).astype(np.float16)  # as float32, 20 MB
    np.save(tmp_path / "corpus.npy", corpus)
    on_disk = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    tracemalloc.start()
    rows, scores = top_k(queries, on_disk, 10, memory_mb=4)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert 1 < peak < 4.5
    np.testing.assert_array_equal(rows, top_k(queries, corpus, 10)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_corpus_on_disk_is_mined_like_one_in_memory_within_the_bound(tmp_path, dtype):
    quadruple, queries, _ = random_case(n_queries=50, n_docs=20000, dim=64)
    corpus = unit(np.random.default_rng(1), 20000, 64).astype(dtype)  # as float64, to be multiplied, 10 MB
    for i, labels in enumerate(quadruple.relevance):
        corpus[labels.positives[0]] = queries[i]
    np.save(tmp_path / "corpus.npy", corpus)
    on_disk = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    tracemalloc.start()
    mined = mine(quadruple, queries, on_disk, **SETTING, memory_mb=2)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 2.5
    whole = mine(quadruple, queries, corpus, **SETTING)
    assert mined == whole and len(whole.queries) == 50


# section 3.3


def slow_mine(quadruple, queries, corpus, k, t_plus, delta_minus, n_negatives):
    """Section 3.3, one query and one document at a time: {query row: (positives, negatives, rejected)}."""
    kept = {}
    for i, labels in enumerate(quadruple.relevance):
        cosine = [float(np.float32(np.dot(queries[i].astype(float), d.astype(float)))) for d in corpus]
        top = sorted(range(len(corpus)), key=lambda d: -cosine[d])[:k]  # noqa: B023
        positives = [d for d in top if d in labels.positives and cosine[d] > t_plus]
        if len(positives) == 0:
            continue
        s_plus = np.mean([cosine[d] for d in positives])
        negatives, rejected = list(labels.negatives), []
        for d in top:
            if d in labels.positives or d in labels.negatives:
                continue
            if cosine[d] < s_plus + delta_minus:
                if len(negatives) < n_negatives:
                    negatives.append(d)
            else:
                rejected.append(d)
        kept[i] = tuple(positives), tuple(negatives), tuple(rejected)
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "change", [{}, {"delta_minus": -0.1}, {"delta_minus": 10.0}, {"t_plus": 0.8}, {"k": 100}, {"n_negatives": 0}]
)
def test_mining_equals_the_slow_loop(seed, change):
    quadruple, queries, corpus = random_case(seed)
    mined = mine(quadruple, queries, corpus, **SETTING | change)
    expected = slow_mine(quadruple, queries, corpus, **SETTING | change)
    assert {q.row: (q.positives, q.negatives, q.rejected) for q in mined.queries} == expected
    if not change:  # all that the test is about does happen
        assert 0 < len(expected) < len(quadruple)
        assert any(rejected for _, _, rejected in expected.values())
        assert any(len(positives) > 1 for positives, _, _ in expected.values())


# cosines to the one query of eight documents; exact in binary
COSINES = np.array([0.5, 0.75, 0.9375, 0.625, 0.25, 0.6875, 0.125, -0.5], dtype=np.float32)
CORPUS = np.stack([COSINES, np.sqrt(1 - COSINES**2)], axis=1)
QUERY = np.array([[1, 0]], dtype=np.float32)


def mine_by_hand(labels, **change):
    setting = {"k": 6, "t_plus": 0.25, "delta_minus": 0.0625, "n_negatives": 9} | change
    return mine(quadruple_of([labels], 8), QUERY, CORPUS, **setting)


def test_an_example_by_hand():
    # top 6: 2 (0.9375), 1 (0.75), 5 (0.6875), 3 (0.625), 0 (0.5), 4 (0.25)
    (query,) = mine_by_hand(Relevance((1, 0, 4, 7))).queries
    # 4 is not above t+, 7 not in the top 6: refined are 1 and 0, s+ = 0.625, the bound is 0.6875
    assert query.positives == (1, 0) and query.positive_scores == (0.75, 0.5)
    # 2 and 5 are at or above the bound; 4 and 7 are labelled positive and so never negatives
    assert query.rejected == (2, 5) and query.rejected_scores == (0.9375, 0.6875)
    assert query.hard == (3,) and query.hard_scores == (0.625,)


def test_the_mean_of_the_refined_positives_counts_not_the_best_or_all():
    labels = Relevance((2, 0, 7))
    (query,) = mine_by_hand(labels, delta_minus=0.0).queries
    # s+ = (0.9375 + 0.5) / 2 = 0.71875: with the best positive 1 would pass, with all three 5 would not
    assert query.rejected == (1,) and query.hard == (5, 3, 4)


def test_t_plus_is_strict():
    with pytest.raises(ValueError, match="1 with none above t"):
        mine_by_hand(Relevance((3,)), t_plus=0.625)
    assert mine_by_hand(Relevance((3,)), t_plus=0.6249).rows == (0,)


def test_labelled_negatives_come_first_untested_and_count_towards_the_number():
    labels = Relevance((1,), negatives=(7, 2))
    (query,) = mine_by_hand(labels, n_negatives=3).queries
    assert query.negatives == (7, 2, 5)  # 7 is outside the top K, 2 above the bound
    assert 2 not in query.rejected
    (query,) = mine_by_hand(labels, n_negatives=1).queries
    assert query.negatives == (7, 2)  # all are kept


def test_labelled_negatives_can_be_candidates_like_any_other():
    (query,) = mine_by_hand(Relevance((1,), negatives=(7, 2, 3)), keep_labelled=False).queries
    assert query.labelled == () and query.hard == (5, 3, 0, 4) and query.rejected == (2,)


def test_evaluation_candidates_do_not_restrict_the_search():
    mined = mine_by_hand(Relevance((1,), candidates=(1, 6)))
    assert mined.queries[0].hard == (5, 3, 0, 4)
    assert mined.to_quadruple().relevance[0].candidates == (1, 6)


def test_mining_in_small_blocks_is_the_same():
    quadruple, queries, corpus = random_case()
    assert mine(quadruple, queries, corpus, **SETTING).queries == (
        mine(quadruple, queries, corpus, **SETTING, memory_mb=0.001).queries
    )


# what was kept and dropped


def test_the_report_counts_every_query_and_label_once():
    quadruple, queries, corpus = random_case()
    mined = mine(quadruple, queries, corpus, **SETTING)
    r = mined.report
    assert (
        r["queries"]
        == 60
        == r["queries_kept"] + r["dropped_no_positive_in_top_k"] + r["dropped_positives_below_t_plus"]
    )
    assert sorted(mined.rows + mined.dropped_low + mined.dropped_unretrieved) == list(range(60))
    assert r["dropped_no_positive_in_top_k"] > 0 and r["dropped_positives_below_t_plus"] > 0
    ranked = np.argsort(-queries @ corpus.T, axis=1)[:, :10]
    for row in mined.dropped_unretrieved:
        assert not set(ranked[row]) & set(quadruple.relevance[row].positives)
    for row in mined.dropped_low:
        found = set(ranked[row]) & set(quadruple.relevance[row].positives)
        assert found and max(queries[row] @ corpus[d] for d in found) <= 0.55
    labelled = sum(len(quadruple.relevance[row].positives) for row in mined.rows)
    assert labelled == r["positives_kept"] + r["positives_dropped_in_kept_queries"]
    assert r["hard_negatives"] + r["labelled_negatives"] == sum(len(q.negatives) for q in mined.queries)


def test_histograms_hold_every_score():
    quadruple, queries, corpus = random_case()
    mined = mine(quadruple, queries, corpus, **SETTING)
    histograms = mined.histograms()
    for name, count in (
        ("positives", "positives_kept"),
        ("hard_negatives", "hard_negatives"),
        ("rejected", "rejected_as_false_negatives"),
    ):
        assert histograms[name].sum() == mined.report[count] > 0
    lowest = HISTOGRAM_EDGES[np.flatnonzero(histograms["positives"])[0] + 1]
    assert lowest > 0.55  # refined positives lie above t+
    scores = [s for q in mined.queries for s in q.hard_scores]
    np.testing.assert_array_equal(histograms["hard_negatives"], np.histogram(scores, HISTOGRAM_EDGES)[0])


def test_what_t_plus_removed_is_in_the_histogram_whether_its_query_was_kept_or_not():
    labels = [Relevance((1, 0, 4, 7)), Relevance((4,))]  # to query 0: above, above, at t+ and outside the top 6
    mined = mine(quadruple_of(labels, 8), QUERY[[0, 0]], CORPUS, k=6, t_plus=0.25, delta_minus=0.0, n_negatives=2)
    assert mined.rows == (0,) and mined.dropped_low == (1,)
    assert mined.removed_scores == (0.25, 0.25)
    assert mined.histograms()["removed_positives"].sum() == 2


def test_a_score_a_rounding_above_1_is_counted():
    mined = mine_by_hand(Relevance((2,)))
    over = replace(mined, queries=(replace(mined.queries[0], positive_scores=(1.0000001,)),))
    assert over.histograms()["positives"][-1] == 1


def test_the_new_quadruple_is_valid_and_shares_the_corpus():
    quadruple, queries, corpus = random_case()
    mined = mine(quadruple, queries, corpus, **SETTING)
    refined = mined.to_quadruple("set, mined")
    validate(refined)
    assert refined.corpus is quadruple.corpus and refined.name == "set, mined" and refined.task == quadruple.task
    assert refined.queries == [quadruple.queries[row] for row in mined.rows]
    assert [(r.positives, r.negatives) for r in refined.relevance] == [
        (q.positives, q.negatives) for q in mined.queries
    ]
    assert refined.meta["seed"] == 3 and refined.meta["mining"]["t_plus"] == 0.55
    assert refined.meta["mining"]["queries_kept"] == len(refined)
    assert mined.to_quadruple().name == "set"


def test_the_report_reads_as_text():
    text = str(mine_by_hand(Relevance((1, 0, 4, 7))))
    assert text.splitlines() == [
        "set: mined with K = 6, t+ = 0.25, delta- = 0.0625, at most 9 negatives a query",
        "  queries    1 of 1 kept; dropped: 0 without a labelled positive in the top 6, 0 with none above t+",
        "  positives  2 kept, mean score 0.625; 2 dropped from kept queries",
        "  negatives  1 mined, mean score 0.625; 0 were labelled; 0 queries have none",
        "  rejected   2 candidates as suspected false negatives, mean score 0.812",
    ]


# empty cases and errors


def test_fewer_documents_than_k_are_all_candidates():
    (query,) = mine_by_hand(Relevance((1,)), k=100).queries
    assert len(query.positives + query.hard + query.rejected) == 8


def test_a_query_may_end_without_negatives():
    mined = mine_by_hand(Relevance((4,)), t_plus=0.0, delta_minus=0.0)  # the last of the top 6: all others score above
    assert mined.queries[0].negatives == () and mined.report["queries_without_negatives"] == 1
    assert "0 mined, no scores" in str(mined)
    assert mined.histograms()["hard_negatives"].sum() == 0


def test_nothing_kept_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match=r"set: mining dropped all 1 queries .*\n?.*raise k, lower t_plus"):
        mine_by_hand(Relevance((7,)))
    assert (
        mine_query(0, Relevance((7,)), np.array([1]), np.array([0.9]), t_plus=0, delta_minus=0, n_negatives=1) is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, q, c: (s, q[:-1], c), r"query vectors of shape \(59, 6\), expected \(60, D\)"),
        (lambda s, q, c: (s, q, c * np.float32(2)), "document 0: its vector has length 2; .*L2-normalise"),
        (
            lambda s, q, c: (s, np.where(np.arange(60)[:, None] == 7, np.nan, q), c),
            "query 7: its vector has length nan",
        ),
        (
            lambda s, q, c: (replace(s, relevance=[Relevance((0,), scores=(1.0,))] * 60), q, c),
            "query 0: has graded labels",
        ),
    ],
)
def test_what_cannot_be_mined_is_named(change, message):
    with pytest.raises(ValueError, match=f"set.*{message}"):
        mine(*change(*random_case()), **SETTING)
    with pytest.raises(ValueError, match="n_negatives is -1"):
        mine(*random_case(), **SETTING | {"n_negatives": -1})


# injected noise


def noisy_world(wrong_share=0.2, n_queries=200, seed=0):
    """A query is near its three relevant documents; one is labelled (or, for some, a random document)."""
    rng = np.random.default_rng(seed)
    queries = unit(rng, n_queries, 32)
    near = queries[:, None] + 0.5 * unit(rng, n_queries, 3, 32)
    corpus = (near / np.linalg.norm(near, axis=2, keepdims=True)).reshape(-1, 32).astype(np.float32)
    truth = [set(range(3 * i, 3 * i + 3)) for i in range(n_queries)]
    wrong = rng.random(n_queries) < wrong_share
    relevance = []
    for i in range(n_queries):
        label = 3 * i if not wrong[i] else int(rng.choice([d for d in range(3 * n_queries) if d not in truth[i]]))
        relevance.append(Relevance((label,)))
    return quadruple_of(relevance, 3 * n_queries), queries, corpus, truth, wrong


def test_mining_removes_injected_wrong_positives_and_avoids_false_negatives():
    quadruple, queries, corpus, truth, wrong = noisy_world()
    strict = mine(quadruple, queries, corpus, k=20, t_plus=0.7, delta_minus=-0.1, n_negatives=5)
    noise = noise_report(strict, truth)
    assert noise.wrong_positives == wrong.sum() > 20
    assert noise.removed_recall > 0.95 and noise.removed_precision > 0.95
    assert noise.false_negatives_filtered < 0.02 < 0.2 < noise.false_negatives_unfiltered
    assert noise.avoided_recall > 0.95 and noise.avoided_precision > 0.95
    # without the threshold and with a filter that lets everything pass, nothing is caught
    loose = noise_report(mine(quadruple, queries, corpus, k=600, t_plus=-1, delta_minus=9, n_negatives=5), truth)
    assert loose.removed == 0 and loose.removed_recall == 0 and np.isnan(loose.removed_precision)
    assert loose.false_negatives_filtered == loose.false_negatives_unfiltered > 0.2


def test_the_noise_report_by_hand():
    # row 0 as in the example by hand: refined 1 and 0, removed 4 and 7, rejected 2 and 5, hard 3
    labels = [Relevance((1, 0, 4, 7)), Relevance((6,))]  # 6 is not in the top 6: the second query goes
    mined = mine(quadruple_of(labels, 8), QUERY[[0, 0]], CORPUS, k=6, t_plus=0.25, delta_minus=0.0625, n_negatives=2)
    noise = noise_report(mined, [{1, 7, 2, 3}, {0}])
    # wrong: 0 and 4 of the first, 6 of the second; removed: 4, 7 and 6
    assert (noise.wrong_positives, noise.removed, noise.rejected) == (3, 3, 2)
    assert noise.removed_precision == pytest.approx(2 / 3) and noise.removed_recall == pytest.approx(2 / 3)
    # without delta- the two negatives would be 2 (relevant) and 5; with it there is 3 (relevant)
    assert noise.false_negatives_unfiltered == 0.5 and noise.false_negatives_filtered == 1.0
    assert noise.avoided_precision == 0.5 and noise.avoided_recall == 1.0
    assert "3 injected, 3 labels removed, precision 0.667, recall 0.667" in str(noise)


def test_truth_is_given_for_dropped_queries_too():
    quadruple, queries, corpus, truth, _ = noisy_world(n_queries=20)
    mined = mine(quadruple, queries, corpus, k=20, t_plus=0.7, delta_minus=0, n_negatives=5)
    with pytest.raises(ValueError, match="truth for 19 queries, expected 20"):
        noise_report(mined, truth[1:])


def test_labels_outside_the_corpus_and_vectors_that_do_not_fit_are_named():
    quadruple = Quadruple("mine", "text_ret", "Find.", ["a", "b"], ["x", "y"], [Relevance((0,)), Relevance((1,), (2,))])
    vectors, setting = np.eye(2, dtype=np.float32), dict(k=2, t_plus=0.1, delta_minus=0.05, n_negatives=1)
    with pytest.raises(ValueError, match=r"mine, query 1: labels \[2\] are outside the corpus of 2 documents"):
        mine(quadruple, vectors, vectors, **setting)
    with pytest.raises(ValueError, match="mine: query vectors have 3 dimensions, those of documents 2"):
        mine(replace(quadruple, relevance=2 * [Relevance((0,))]), np.eye(2, 3), vectors, **setting)
