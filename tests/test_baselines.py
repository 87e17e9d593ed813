"""The plain baselines: BM25 by its formula, word for word; pictures by colours and by pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from q3vl_mini.baselines import Bm25, Pictures, ThroughTraining, colour_histogram, pixels, score_with, words
from q3vl_mini.evaluate import score_quadruple, score_rows
from q3vl_mini.records import Quadruple, Relevance

TEXTS = ["the red cat sat", "a red red house", "the old cat and the dog", "green ships"]
DOCUMENTS = [{"text": text} for text in TEXTS]


def test_bm25_is_its_formula():
    k1, b = 1.2, 0.75
    split = [text.split() for text in TEXTS]
    mean = sum(map(len, split)) / len(split)
    for query in ("red cat", "the cat the", "blue"):
        expected = []
        for document in split:
            score = 0.0
            for word in query.split():
                n = sum(word in other for other in split)
                tf = document.count(word)
                idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
                score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean))
            expected.append(score)
        np.testing.assert_allclose(Bm25(DOCUMENTS).scores({"text": query}), expected, atol=1e-12)


def test_words_of_scripts_without_spaces_are_pairs_of_signs():
    assert words({"text": "Der rote Käse!"}) == ["der", "rote", "käse"]
    assert words({"text": "検索する"}) == ["検索", "索す", "する"]
    assert words({"image": "x.png"}) == []


def stripes(colour, across):
    picture = np.full((40, 40, 3), 255, np.uint8)
    picture[(slice(8, 16), slice(None)) if across else (slice(None), slice(8, 16))] = colour
    return {"image": Image.fromarray(picture)}


def test_a_histogram_sees_colours_and_pixels_see_shapes():
    documents = [stripes((200, 0, 0), True), stripes((0, 0, 200), False)]
    query = stripes((200, 0, 0), False)  # the colour of the first, the shape of the second
    by_colour, by_shape = (Pictures(documents, f).scores(query) for f in (colour_histogram, pixels))
    assert by_colour[0] > by_colour[1] and by_shape[1] > by_shape[0]
    assert by_colour[0] == pytest.approx(1) and by_shape[1] < 1.0001
    with pytest.raises(ValueError, match="has no picture"):
        Pictures([{"text": "a"}], pixels)


def test_words_find_pictures_through_those_of_the_training_queries():
    train = Quadruple(
        "train", "image_ret", "Find.", [{"text": "bar lying"}, {"text": "bar standing"}],
        [stripes((0, 0, 0), True), stripes((0, 0, 0), False)], [Relevance((0,)), Relevance((1,))],
    )  # fmt: skip
    documents = [stripes((40, 40, 40), False), stripes((40, 40, 40), True)]
    scorer = ThroughTraining(train, documents, pixels, k=1)
    assert np.argmax(scorer.scores({"text": "lying thing"})) == 1
    assert np.argmax(scorer.scores({"text": "standing thing"})) == 0
    assert not scorer.scores({"text": "unknown"}).any()


def test_scores_of_any_kind_are_measured_like_cosines():
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=(30, 8)), rng.normal(size=(20, 8))
    relevance = [Relevance((i % 20,), candidates=None if i % 3 else tuple(range(i % 20 + 1))) for i in range(30)]
    items = [{"text": "x"}] * 30
    quadruple = Quadruple("q", "text_ret", "Find.", items, items[:20], relevance)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, corpus)]
    ours, theirs = score_rows(quadruple, list(unit[0] @ unit[1].T)), score_quadruple(queries, corpus, quadruple)
    np.testing.assert_allclose(ours.values, theirs.values)
    assert (ours.n_candidates, ours.chance) == (theirs.n_candidates, theirs.chance)
    with pytest.raises(ValueError, match="expected 30 rows of 20 scores"):
        score_rows(quadruple, [np.zeros(3)] * 30)


def test_a_baseline_has_a_score():
    queries = [{"text": text.upper()} for text in TEXTS]
    quadruple = Quadruple("q", "text_ret", "Find.", queries, DOCUMENTS, [Relevance((i,)) for i in range(4)])
    assert score_with(Bm25(DOCUMENTS), quadruple).score == 1
    assert score_with(Bm25(DOCUMENTS), quadruple, "hit@1").metric == "hit@1"
