"""The adapters in data_samples: each is the model that its card says, and embedders find what the backbone does not."""

import numpy as np
import pytest

from q3vl_mini import evaluate
from q3vl_mini.backbone import load
from q3vl_mini.config import data_dir
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import first_of_candidates

ADAPTERS = data_dir() / "adapters"


def hit_at_10(embedder) -> float:
    quadruple = build("scene_retrieval", "validation", 200, 3)
    [(_, queries, corpus)] = evaluate.encoded(embedder, [quadruple], batch_size=100)
    return evaluate.score_quadruple(queries, corpus, quadruple, metric="hit@10").score


@pytest.fixture(scope="module")
def raw():
    return hit_at_10(Embedder("q3vl-tiny", template="released"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["s0", "s1", "s2", "s3"])
def test_a_shipped_embedder_finds_scenes_that_the_backbone_does_not(raw, stage):
    assert hit_at_10(Embedder(ADAPTERS / stage)) > raw + 0.1


@pytest.mark.parametrize("stage", ["s0", "s1", "s2", "s3", "reranker"])
def test_a_card_says_what_it_is(stage):
    card = load(ADAPTERS / stage, device="cpu").card
    assert card["stage"] == stage and card["template"] == "released" and card["preset"] == "tiny"
    assert card["role"] == ("reranker" if stage == "reranker" else "embedder")


def test_int8_codes_of_s3_use_the_learned_step():
    embedder = Embedder(ADAPTERS / "s3")
    steps = [embedder.quantizers.of(d, "int8").step.item() for d in (embedder.dim, 64)]
    codes = embedder.encode(["a red apple", "two dogs"], precision="int8")
    vectors = embedder.encode(["a red apple", "two dogs"])
    expected = np.clip(np.round(vectors / steps[0]), -128, 127)
    assert np.abs(codes - expected).max() <= 1 and steps[0] > 0 and steps[0] != steps[1]


def test_the_shipped_reranker_scores_pairs_between_0_and_1_and_ranks_by_score():
    reranker, quadruple = Reranker(ADAPTERS / "reranker"), build("text_to_image", "validation", 10, 3)
    query, documents = quadruple.queries[0], quadruple.corpus[:8]
    scores = reranker.score(query, documents, instruction=quadruple.instruction)
    assert np.all((scores > 0) & (scores < 1)) and len(set(scores.tolist())) == 8
    ranked = reranker.rank(query, documents, instruction=quadruple.instruction)
    assert [row["corpus_id"] for row in ranked] == np.argsort(-scores, kind="stable").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["same_thing", "image_to_text"])
def test_the_shipped_reranker_puts_the_positive_first_of_eight(task):
    share = first_of_candidates(Reranker(ADAPTERS / "reranker"), build(task, "validation", 60, 3), batch_size=60)
    assert share > 0.5  # guessing gives an eighth
