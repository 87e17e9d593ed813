"""Scores of data sets, columns and whole models against slow loops and hand-made cases."""

import math
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from q3vl_mini.evaluate import (
    ColumnResult,
    DatasetResult,
    compare,
    encoded,
    evaluate_embedder,
    evaluate_reranker,
    judge_quadruple,
    mean_score,
    rerank_quadruple,
    score_quadruple,
)
from q3vl_mini.metrics import paired_bootstrap
from q3vl_mini.records import Quadruple, Relevance


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def quadruple_of(relevance, n_docs, task="image_ret", name="set", corpus=None):
    queries = [{"text": f"{name} query {i}"} for i in range(len(relevance))]
    corpus = corpus if corpus is not None else [{"text": f"{name} document {i}"} for i in range(n_docs)]
    return Quadruple(name, task, f"Instruction of {name}.", queries, corpus, list(relevance))


def random_case(seed=0, n_queries=30, n_docs=40, dim=8, own=False, task="image_ret", name="set"):
    """Vectors and labels with one to three positives; every second query with its own candidates if `own`."""
    rng = np.random.default_rng(seed)
    relevance = []
    for i in range(n_queries):
        drawn = rng.permutation(n_docs)
        positives = tuple(drawn[: rng.integers(1, 4)].tolist())
        candidates = tuple(drawn[: rng.integers(5, 15)].tolist()) if own and i % 2 else None
        relevance.append(Relevance(positives, candidates=candidates))
    return unit(rng, n_queries, dim), unit(rng, n_docs, dim), quadruple_of(relevance, n_docs, task, name)


class TableEmbedder:
    """Each text has a fixed vector; records the calls."""

    def __init__(self, seed=0, dim=8):
        self.calls, self.seed, self.dim = [], seed, dim

    def encode(self, items, instruction=None, batch_size=32, **options):
        self.calls.append((list(items), instruction, batch_size, options))
        vectors = [np.random.default_rng([self.seed, *item["text"].encode()]).normal(size=self.dim) for item in items]
        return np.array(vectors, dtype=np.float32)


class TableReranker:
    """margin(query text, document text) as given; records the calls."""

    def __init__(self, margin):
        self.margin, self.calls = margin, []

    def logits(self, pairs, instruction=None):
        self.calls.append((len(pairs), instruction))
        return np.array([self.margin(q["text"], d["text"]) for q, d in pairs], dtype=np.float32)


# scoring


def slow_values(queries, corpus, quadruple, metric):
    """One query, one document at a time; the ranking is a list, negatives first among ties."""
    name, k = metric.split("@")
    values = []
    for i, labels in enumerate(quadruple.relevance):
        candidates = range(len(corpus)) if labels.candidates is None else labels.candidates
        keys = []
        for d in candidates:
            x, y = queries[i].astype(float), corpus[d].astype(float)
            cosine = sum(x * y) / math.sqrt(sum(x * x)) / math.sqrt(sum(y * y))
            keys.append((-round(cosine, 6), d in labels.positives))
        hits = [r for r, (_, is_positive) in enumerate(sorted(keys), start=1) if is_positive and r <= int(k)]
        ideal = sum(1 / math.log2(1 + r) for r in range(1, min(len(labels.positives), int(k)) + 1))
        values.append(
            {"hit": float(bool(hits)), "mrr": 1 / hits[0] if hits else 0}.get(
                name, sum(1 / math.log2(1 + r) for r in hits) / ideal
            )
        )
    return values


@pytest.mark.parametrize("metric", ["hit@1", "hit@3", "ndcg@5", "mrr@10"])
@pytest.mark.parametrize("own", [False, True])
def test_scores_equal_a_slow_loop(metric, own):
    queries, corpus, quadruple = random_case(own=own)
    result = score_quadruple(3 * queries, corpus, quadruple, metric=metric)  # lengths do not matter
    np.testing.assert_allclose(result.values, slow_values(queries, corpus, quadruple, metric), atol=1e-12)
    assert result.score == pytest.approx(np.mean(result.values))
    assert result.n_queries == 30
    sizes = [len(r.candidates or range(40)) for r in quadruple.relevance]
    assert result.n_candidates == pytest.approx(np.mean(sizes))
    if metric == "hit@1":
        shares = [len(r.positives) / n for r, n in zip(quadruple.relevance, sizes, strict=True)]
        assert result.chance == pytest.approx(np.mean(shares))
    assert result.ci[0] <= result.score <= result.ci[1]


@pytest.mark.parametrize("memory_mb", [1e-6, 0.004, 0.01, 1])
def test_the_memory_bound_does_not_change_a_score(memory_mb):
    queries, corpus, quadruple = random_case(n_queries=37, n_docs=101, own=True, seed=3)
    corpus[50:60] = corpus[:10]  # exact ties across blocks
    whole = score_quadruple(queries, corpus, quadruple, metric="ndcg@10")
    parts = score_quadruple(queries, corpus, quadruple, metric="ndcg@10", memory_mb=memory_mb)
    assert whole.values.tolist() == parts.values.tolist()


def test_memory_stays_within_its_bound():
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 200, 64), unit(rng, 20000, 64)  # all scores at once: 32 MB
    quadruple = quadruple_of([Relevance((i,)) for i in range(200)], 20000)
    tracemalloc.start()
    score_quadruple(queries, corpus, quadruple, memory_mb=4)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert 1 < peak < 6  # beside the bound: a few rows of masks


def test_own_candidates_are_ranked_alone():
    corpus = np.eye(3, dtype=np.float32)
    queries = np.array([[1.0, 0.5, 0.1]], dtype=np.float32)  # document 0 is nearest, then 1, then 2
    open_ = quadruple_of([Relevance((1,))], 3)
    closed = quadruple_of([Relevance((1,), candidates=(1, 2))], 3)
    assert score_quadruple(queries, corpus, open_).score == 0
    assert score_quadruple(queries, corpus, closed).score == 1
    assert score_quadruple(queries, corpus, closed).n_candidates == 2


@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize("task", ["image_ret", "visdoc", "sts"])
def test_a_collapsed_model_gets_no_credit(task, noise):
    rng = np.random.default_rng(0)
    relevance = [Relevance((i,), scores=(float(i),) if task == "sts" else None) for i in range(20)]
    same = unit(rng, 1, 16)
    queries, corpus = (same + noise * rng.normal(size=(20, 16)).astype(np.float32) for _ in range(2))
    result = score_quadruple(queries, corpus, quadruple_of(relevance, 20, task))
    assert result.score == 0 and not result.above_chance


def test_sts_is_the_rank_correlation_of_cosines_and_labels():
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 25, 8), unit(rng, 30, 8)
    documents, labels = rng.permutation(30)[:25], rng.integers(0, 6, 25)
    relevance = [Relevance((int(d),), scores=(float(s),)) for d, s in zip(documents, labels, strict=True)]
    result = score_quadruple(queries, corpus, quadruple_of(relevance, 30, "sts"))
    cosines = [float(queries[i] @ corpus[d]) for i, d in enumerate(documents)]
    assert result.metric == "spearman" and result.n_queries == 25 and result.chance == 0
    assert result.score == pytest.approx(scipy.stats.spearmanr(cosines, labels).statistic, abs=1e-9)


def test_sts_labels_must_be_there_and_differ():
    vectors = unit(np.random.default_rng(0), 2, 4)
    with pytest.raises(ValueError, match="set, query 1: spearman needs one positive with one score"):
        score_quadruple(vectors, vectors, quadruple_of([Relevance((0,), scores=(1.0,)), Relevance((1,))], 2, "sts"))
    with pytest.raises(ValueError, match="all labels are 1.0"):
        score_quadruple(vectors, vectors, quadruple_of([Relevance((i,), scores=(1.0,)) for i in (0, 1)], 2, "sts"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, c, s: (q[:-1], c, s), r"query vectors of shape \(29, 8\), expected \(30, D\)"),
        (lambda q, c, s: (q, c[:, :4], s), "queries have 8 dimensions, documents 4"),
        (lambda q, c, s: (q, c * np.nan, s), "document vectors hold nan or inf"),
        (lambda q, c, s: (q, c.astype(np.uint8), s), "packed bits"),
        (lambda q, c, s: (q, c, replace(s, task="audio")), "task 'audio' is no column"),
        (
            lambda q, c, s: (q, c, replace(s, relevance=[Relevance((1,), candidates=(2, 3))] * 30)),
            "query 0: 0 of its 1 positives are among its 2 candidates",
        ),
        (lambda q, c, s: (q, c, replace(s, relevance=[Relevance(())] * 30)), "query 0: 0 of its 0 positives"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=f"set.*{message}"):
        score_quadruple(*change(*random_case()))


# whole models


def benchmark():
    """Two data sets of one column over a shared corpus, and one of another column."""
    corpus = [{"text": f"document {i}"} for i in range(20)]
    first, second = (
        random_case(seed=s, n_queries=n, n_docs=20, name=name)[2] for s, n, name in ((1, 12, "one"), (2, 30, "two"))
    )
    pages = random_case(seed=3, n_queries=10, n_docs=15, task="visdoc", name="pages")[2]
    return [pages, replace(first, corpus=corpus), replace(second, corpus=corpus)]


def test_a_column_is_the_mean_of_its_data_sets():
    results = evaluate_embedder(TableEmbedder(), benchmark())
    assert list(results) == ["image_ret", "visdoc"]  # the order of COLUMNS
    column = results["image_ret"]
    assert [d.name for d in column.datasets] == ["one", "two"]
    assert column.score == pytest.approx((column.datasets[0].values.mean() + column.datasets[1].values.mean()) / 2)
    assert column.score != pytest.approx(np.concatenate([d.values for d in column.datasets]).mean())
    assert (column.n_queries, column.n_candidates, column.metric) == (42, 20, "hit@1")
    assert mean_score(results) == pytest.approx((column.score + results["visdoc"].score) / 2)


def test_a_columns_interval_resamples_within_each_data_set():
    column = evaluate_embedder(TableEmbedder(), benchmark())["image_ret"]
    one, two = (scipy.stats.sem(d.values, ddof=0) for d in column.datasets)
    assert np.std(column.resample(4000)) == pytest.approx(math.hypot(one, two) / 2, rel=0.1)
    assert ColumnResult("image_ret", column.datasets[:1]).ci == column.datasets[0].ci


def test_a_shared_corpus_is_encoded_once_and_instructions_go_to_queries_alone():
    embedder, quadruples = TableEmbedder(), benchmark()
    evaluate_embedder(embedder, quadruples, batch_size=7, dim=8)
    of_queries = [(items, instruction) for items, instruction, _, _ in embedder.calls if instruction is not None]
    of_documents = [items for items, instruction, _, _ in embedder.calls if instruction is None]
    assert of_documents == [quadruples[0].corpus, quadruples[1].corpus]
    assert of_queries == [(q.queries, q.instruction) for q in quadruples]
    assert all((batch_size, options) == (7, {"dim": 8}) for _, _, batch_size, options in embedder.calls)


def test_an_unknown_task_fails_before_anything_is_encoded():
    embedder = TableEmbedder()
    with pytest.raises(ValueError, match="task 'audio' is no column; use one of"):
        evaluate_embedder(embedder, [*benchmark(), replace(benchmark()[0], task="audio")])
    assert embedder.calls == []


def test_progress_counts_every_item_once(capsys):
    list(encoded(TableEmbedder(), benchmark(), progress=True))
    assert "87/87" in capsys.readouterr().err  # 52 queries, 20 + 15 documents


def test_a_column_takes_one_task_and_metric_and_different_names():
    def result(name, column="image_ret", metric="hit@1"):
        return DatasetResult(name, column, metric, np.ones(3), 4, 0.25)

    with pytest.raises(ValueError, match="own task and one metric"):
        ColumnResult("image_ret", (result("a"), result("b", metric="hit@2")))
    with pytest.raises(ValueError, match="own task and one metric"):
        ColumnResult("visdoc", (result("a"),))
    with pytest.raises(ValueError, match="two data sets have one name"):
        ColumnResult("image_ret", (result("a"), result("a")))


# the reranker


def test_the_reranker_orders_the_top_and_leaves_the_rest():
    corpus = np.eye(5, dtype=np.float32)
    queries = np.array([[5, 4, 3, 2, 1]], dtype=np.float32)  # the embedding's order is 0, 1, 2, 3, 4
    margins = {"set document 0": -1, "set document 1": 0, "set document 2": 1, "set document 3": 9, "set document 4": 8}
    reranker = TableReranker(lambda q, d: margins[d])

    def rank_of(positive, top_k):
        quadruple = quadruple_of([Relevance((positive,))], 5)
        return 1 / rerank_quadruple(reranker, quadruple, queries, corpus, top_k=top_k, metric="mrr@5").score

    assert [rank_of(d, 3) for d in range(5)] == [3, 2, 1, 4, 5]
    assert [rank_of(d, 100) for d in range(5)] == [5, 4, 3, 1, 2]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 100])
def test_reranking_equals_a_slow_loop(top_k, own):
    queries, corpus, quadruple = random_case(own=own, seed=5)
    reranker = TableReranker(lambda q, d: np.random.default_rng([*q.encode(), *d.encode()]).integers(0, 6))  # ties
    result = rerank_quadruple(reranker, quadruple, queries, corpus, top_k=top_k, metric="mrr@100", pairs_per_call=50)
    for i, labels in enumerate(quadruple.relevance):
        candidates = list(range(40)) if labels.candidates is None else sorted(labels.candidates)
        order = sorted(candidates, key=lambda d: -round(float(queries[i].astype(float) @ corpus[d]), 6))
        top, rest = order[:top_k], order[top_k:]
        margin = {d: reranker.margin(quadruple.queries[i]["text"], quadruple.corpus[d]["text"]) for d in top}
        final = sorted(top, key=lambda d: (-margin[d], d in labels.positives)) + rest
        first = next(r for r, d in enumerate(final, start=1) if d in labels.positives)
        assert result.values[i] == pytest.approx(1 / first)
    assert {instruction for _, instruction in reranker.calls} == {quadruple.instruction}
    sizes = [n for n, _ in reranker.calls]
    assert sum(sizes) == sum(min(top_k, len(r.candidates or range(40))) for r in quadruple.relevance)
    assert all(n == 50 for n in sizes[:-1])


def test_a_reranker_alone_is_judged_on_each_querys_own_candidates():
    labels = [Relevance((0, 7), (1, 2, 3)), Relevance((4,))]
    quadruple = quadruple_of(labels, 30).with_candidates(10, labelled=2)
    first, second = (set(r.candidates) for r in quadruple.relevance)
    assert {0, 1, 2} <= first and not first & {3, 7}  # the other positive is not wrong, so it may not compete
    assert 4 in second and len(first) == len(second) == 10
    for liked, found in (("document 0", [1, 0]), ("document 4", [0, 1])):
        result = judge_quadruple(TableReranker(lambda q, d, liked=liked: d.endswith(liked)), quadruple)
        assert result.values.tolist() == found and result.n_candidates == 10 and result.chance == pytest.approx(0.1)
    with pytest.raises(ValueError, match="query 0: no candidates of its own"):
        judge_quadruple(TableReranker(lambda q, d: 0), quadruple_of(labels, 30))


def test_margins_beyond_the_sigmoids_reach_still_order():
    corpus, queries = np.eye(2, dtype=np.float32), np.array([[2, 1]], dtype=np.float32)
    reranker = TableReranker(lambda q, d: 40 if d.endswith("1") else 30)
    assert 1 / (1 + np.exp(np.float32(-30))) == np.float32(1)  # as scores they would tie
    assert rerank_quadruple(reranker, quadruple_of([Relevance((1,))], 2), queries, corpus).score == 1


def test_a_collapsed_reranker_gets_no_credit():
    queries, corpus, quadruple = random_case(n_queries=200)
    noise = np.random.default_rng(0)
    reranker = TableReranker(lambda q, d: 3 + 1e-6 * noise.normal())
    assert score_quadruple(queries, corpus, quadruple).score > 0  # noise would earn chance, one in twenty
    assert rerank_quadruple(reranker, quadruple, queries, corpus).score == 0


def test_of_tied_documents_the_negatives_reach_the_reranker_first():
    corpus, queries = np.ones((4, 2), dtype=np.float32), np.ones((1, 2), dtype=np.float32)
    perfect = TableReranker(lambda q, d: float(d.endswith("0")))
    quadruple = quadruple_of([Relevance((0,))], 4)
    assert rerank_quadruple(perfect, quadruple, queries, corpus, top_k=3).score == 0
    assert rerank_quadruple(perfect, quadruple, queries, corpus, top_k=4).score == 1


def test_sts_takes_the_rerankers_margin():
    vectors = unit(np.random.default_rng(0), 6, 4)
    relevance = [Relevance((i,), scores=(float(i),)) for i in range(6)]
    reranker = TableReranker(lambda q, d: -float(d[-1]))
    assert rerank_quadruple(reranker, quadruple_of(relevance, 6, "sts"), vectors, vectors).score == pytest.approx(-1)


def test_a_reranker_that_gives_nan_is_named():
    queries, corpus, quadruple = random_case()
    with pytest.raises(ValueError, match="set: the reranker gave nan"):
        rerank_quadruple(TableReranker(lambda q, d: np.nan), quadruple, queries, corpus)
    with pytest.raises(ValueError, match="top_k is 0"):
        rerank_quadruple(TableReranker(lambda q, d: 0), quadruple, queries, corpus, top_k=0)


def test_a_reranker_that_agrees_with_the_embedder_changes_nothing():
    embedder = TableEmbedder()

    def cosine(q, d):
        x, y = embedder.encode([{"text": q}, {"text": d}])
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y) * 100

    alone = evaluate_embedder(embedder, benchmark())
    both = evaluate_reranker(TableReranker(cosine), embedder, benchmark(), top_k=5)
    assert alone["image_ret"].score > 0
    assert {c: r.score for c, r in both.items()} == {c: r.score for c, r in alone.items()}


# comparison


def models():
    return {
        "s0": evaluate_embedder(TableEmbedder(0), benchmark()),
        "s1": evaluate_embedder(TableEmbedder(1), benchmark()),
    }


def test_compare_pairs_queries_in_every_column_and_in_the_mean():
    m = models()
    differences = compare(m["s1"], m["s0"])
    assert list(differences) == ["image_ret", "visdoc", "mean"]
    one = paired_bootstrap(
        m["s1"]["visdoc"].datasets[0].values,
        m["s0"]["visdoc"].datasets[0].values,
        seed=[0, zlib.crc32(b"pages")],
    )
    assert differences["visdoc"] == pytest.approx(one)
    assert differences["mean"].difference == pytest.approx(mean_score(m["s1"]) - mean_score(m["s0"]))
    assert differences["mean"].low < differences["mean"].difference < differences["mean"].high


def test_compare_refuses_other_data_sets():
    m = models()
    other = ColumnResult("image_ret", m["s1"]["image_ret"].datasets[:1])
    with pytest.raises(ValueError, match="image_ret: a was scored on"):
        compare(m["s0"], {"image_ret": other})
    with pytest.raises(ValueError, match="no column in common"):
        compare({"image_ret": other}, {"visdoc": m["s1"]["visdoc"]})
