"""mmeb_v2.py: the layout of MMEB-V2's result files, and the figures in them."""

import json

import numpy as np
import pytest
import pytrec_eval

from q3vl_mini.evaluate import score_quadruple
from q3vl_mini.mmeb_v2 import PLACES, Ranking, rank, rankings, score_dict, write_mmeb_v2
from q3vl_mini.records import Quadruple, Relevance


def quadruple(name, task, labels, n=12, candidates=None):
    documents = [{"text": f"document {i}"} for i in range(n)]
    relevance = [Relevance(tuple(positives), candidates=candidates) for positives in labels]
    return Quadruple(name, task, "Find it.", [{"text": f"query {i}"} for i in range(len(labels))], documents, relevance)


class Encoder:
    """Random vectors, the same for the same text."""

    def encode(self, items, instruction=None, batch_size=32):
        seeds = [sum(map(ord, item["text"])) for item in items]
        return np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])


BENCHMARK = [
    quadruple("concept", "image_cls", [[0], [1], [5]]),
    quadruple("group", "image_cls", [[2], [3]]),
    quadruple("scenes", "image_ret", [[i] for i in range(6)], candidates=(0, 1, 2, 3, 4, 5)),
    quadruple("moment", "video_mret", [[4], [7]]),
    quadruple("pages", "visdoc", [[0, 3], [5, 6, 7, 8, 9, 10]]),
    quadruple("words", "text_ret", [[0]]),
]


def test_files_are_where_mmeb_v2_has_them(tmp_path):
    report = write_mmeb_v2(rankings(Encoder(), BENCHMARK), tmp_path, "org/s3", {"embedding_dimension": 8})
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"image/concept", "image/group", "image/scenes", "video/moment", "visdoc/pages"}  # no place for text alone
    assert files == {f"{place}_{end}" for place in places for end in ("score.json", "pred.jsonl")} | {
        "org_s3.json",
        "summary.json",
    }
    content = json.loads(report.read_text())
    assert content["metadata"]["model_name"] == "org/s3" and content["metadata"]["embedding_dimension"] == 8
    assert "not MMEB-V2" in content["metadata"]["benchmark"]
    for place in places:
        modality, dataset = place.split("/")
        assert content["metrics"][modality][dataset] == json.loads((tmp_path / f"{place}_score.json").read_text())


def test_the_summary_is_the_mean_of_data_sets_by_modality_and_meta_task(tmp_path):
    write_mmeb_v2(rankings(Encoder(), BENCHMARK), tmp_path, "s3")

    def score(place, metric):
        return json.loads((tmp_path / f"{place}_score.json").read_text())[metric]

    summary = json.loads((tmp_path / "summary.json").read_text())
    concept, group, scenes = (score(f"image/{name}", "hit@1") for name in ("concept", "group", "scenes"))
    assert summary["image"] == pytest.approx(
        {"all": (concept + group + scenes) / 3, "CLS": (concept + group) / 2, "RET": scenes}
    )
    assert summary["visdoc"]["all"] == score("visdoc/pages", "ndcg_linear@5")
    assert set(summary["video"]) == {"all", "MRET"}


def test_predictions_rank_every_candidate_once(tmp_path):
    write_mmeb_v2(rankings(Encoder(), BENCHMARK), tmp_path, "s3")
    rows = [json.loads(line) for line in (tmp_path / "image/scenes_pred.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [[str(i)] for i in range(6)]
    assert all(sorted(row["prediction"]) == list("012345") and row["rel_scores"] is None for row in rows)
    rows = [json.loads(line) for line in (tmp_path / "visdoc/pages_pred.jsonl").read_text().splitlines()]
    assert all(len(set(row["prediction"])) == 12 for row in rows)


@pytest.mark.parametrize("q", BENCHMARK[:5], ids=lambda q: q.name)
def test_the_main_metrics_are_those_of_this_project(q):
    encoder = Encoder()
    queries, corpus = encoder.encode(q.queries), encoder.encode(q.corpus)
    scores = score_dict(rank(q, queries, corpus))
    for ours, theirs in (("hit@1", "hit@1"), ("hit@10", "hit@10"), ("ndcg@5", "ndcg_linear@5"), ("mrr@10", "mrr@10")):
        assert scores[theirs] == pytest.approx(score_quadruple(queries, corpus, q, metric=ours).score)


def test_equal_scores_earn_nothing():
    q = quadruple("ties", "image_cls", [[0], [3]])
    scores = score_dict(rank(q, np.ones((2, 4)), np.ones((12, 4))))
    assert scores["hit@10"] == 0 and scores["mrr@10"] == 0


def random_rankings(seed, queries=20, documents=15):
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(documents)]
    predictions = [list(rng.permutation(names)) for _ in range(queries)]
    labels = [list(rng.choice(names, rng.integers(1, 8), replace=False)) for _ in range(queries)]
    return Ranking("random", "image_ret", predictions, labels)


def test_ndcg_recall_precision_and_mrr_are_those_of_trec_eval():
    ranking = random_rankings(0)
    qrels = {str(i): {name: 1 for name in labels} for i, labels in enumerate(ranking.labels)}
    run = {str(i): {d: -float(place) for place, d in enumerate(p)} for i, p in enumerate(ranking.predictions)}
    measures = {"ndcg_cut.1,5,10", "recall.1,5,10", "P.1,5,10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    scores = score_dict(ranking)
    for k in (1, 5, 10):
        for ours, name in (("ndcg_linear", "ndcg_cut"), ("recall", "recall"), ("precision", "P")):
            expected = np.mean([row[f"{name}_{k}"] for row in theirs.values()])
            assert scores[f"{ours}@{k}"] == pytest.approx(expected), (ours, k)
        assert scores[f"ndcg_exponential@{k}"] == scores[f"ndcg_linear@{k}"]
    assert scores["num_pred"] == scores["num_data"] == 20


def test_map_and_f1_equal_a_loop_over_the_list():
    ranking = random_rankings(1)
    scores = score_dict(ranking)
    for k in (1, 5, 10):
        maps, f1s = [], []
        for prediction, labels in zip(ranking.predictions, ranking.labels, strict=True):
            hits, total = 0, 0.0
            for place, name in enumerate(prediction[:k], start=1):
                if name in labels:
                    hits += 1
                    total += hits / place
            maps.append(total / min(len(labels), k))
            p, r = hits / k, hits / len(labels)
            f1s.append(2 * p * r / (p + r) if hits else 0)
        assert scores[f"map@{k}"] == pytest.approx(np.mean(maps))
        assert scores[f"f1@{k}"] == pytest.approx(np.mean(f1s))


def test_every_column_with_pictures_has_a_place():
    from q3vl_mini.evaluate import COLUMNS

    assert set(PLACES) == {c for c in COLUMNS if c.startswith(("image", "video", "visdoc"))}


def test_nothing_to_write_is_said(tmp_path):
    with pytest.raises(ValueError, match="no rankings of a column"):
        write_mmeb_v2(rankings(Encoder(), BENCHMARK[-1:]), tmp_path, "s3")
