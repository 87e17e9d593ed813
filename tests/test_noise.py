"""Annotation noise comes at the stated rates, and the truth stays beside it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from q3vl_mini.emoji_world.scenes import Crop, Film, Placed, Scene, Track
from q3vl_mini.noise import add_noise, near_duplicate
from q3vl_mini.records import Clip, Quadruple, Relevance, validate


def texts(n: int, documents: int | None = None, n_negatives: int = 3) -> Quadruple:
    """n text queries; query i has document i, or i modulo `documents`, and the next ones as negatives."""
    m = documents or n
    relevance = [Relevance((i % m,), tuple((i + j + 1) % m for j in range(min(n_negatives, m - 1)))) for i in range(n)]
    queries, corpus = [{"text": f"q{i}"} for i in range(n)], [{"text": f"d{i}"} for i in range(m)]
    return Quadruple("words", "text_ret", "Find it.", queries, corpus, relevance)


def test_noise_has_the_stated_rates_and_the_truth_is_kept():
    clean = texts(200)
    noisy = add_noise(clean, wrong=0.15, duplicates=0.3, seed=5)
    validate(noisy)
    truth = noisy.meta["truth"]
    mislabelled = [i for i in range(200) if not set(noisy.relevance[i].positives) & set(truth[i])]
    assert len(mislabelled) == 30
    assert all(noisy.relevance[i] == clean.relevance[i] for i in range(200) if i not in mislabelled)
    assert len(noisy.corpus) == 260 and noisy.corpus[:200] == clean.corpus
    copies = [(i, d) for i in range(200) for d in truth[i] if d >= 200]
    assert [d for _, d in sorted(copies, key=lambda c: c[1])] == list(range(200, 260))
    for i, document in copies:
        original, copy = clean.corpus[i]["text"], noisy.corpus[document]["text"]
        assert copy != original and copy.lower().strip("!.?") == original.lower()
        assert truth[i] == (i, document)
    labelled = {d for r in noisy.relevance for d in (*r.positives, *r.negatives)}
    assert not labelled & set(range(200, 260))  # nobody labelled a copy
    assert noisy.meta["noise"] == {"wrong": 0.15, "duplicates": 0.3, "seed": 5}


def test_noise_is_deterministic_and_zero_noise_changes_nothing():
    clean = texts(50)
    first, second = (add_noise(clean, wrong=0.2, duplicates=0.2, seed=1) for _ in range(2))
    assert first == second != add_noise(clean, wrong=0.2, duplicates=0.2, seed=2)
    same = add_noise(clean, wrong=0, duplicates=0, seed=1)
    assert (same.corpus, same.relevance) == (clean.corpus, clean.relevance)
    assert same.meta["truth"] == tuple((i,) for i in range(50))


def test_a_copy_is_true_for_every_query_of_its_original():
    noisy = add_noise(texts(12, documents=3), wrong=0, duplicates=1, seed=0)
    assert len(noisy.corpus) == 6  # a copy a document, not a copy a query
    for i, rows in enumerate(noisy.meta["truth"]):
        assert rows[0] == i % 3 and noisy.corpus[rows[1]]["text"].lower().strip("!.?") == f"d{i % 3}"


def test_noise_keeps_scores_candidates_and_earlier_truth_consistent():
    graded = [Relevance((i, (i + 1) % 9), scores=(0.5, 0.25), candidates=(i, (i + 1) % 9)) for i in range(9)]
    noisy = add_noise(replace(texts(9), relevance=graded), wrong=1, duplicates=0, seed=0)
    validate(noisy)
    assert all(len(r.positives) == len(r.scores) == 1 and len(r.candidates) == 3 for r in noisy.relevance)
    again = add_noise(noisy, wrong=1, duplicates=0, seed=1)
    assert again.meta["truth"] == noisy.meta["truth"] == tuple(r.positives for r in graded)
    validate(add_noise(texts(9, n_negatives=8), wrong=1, duplicates=0, seed=0))  # the wrong one is no negative any more
    with pytest.raises(ValueError, match="query 0: every document is relevant"):
        add_noise(texts(1), wrong=1, duplicates=0, seed=0)
    with pytest.raises(ValueError, match="wrong=1.5"):
        add_noise(texts(9), wrong=1.5, duplicates=0, seed=0)


def test_a_near_duplicate_shows_the_same_in_other_clothes():
    rng = np.random.default_rng(0)
    scene = Scene((Placed("2b50", "noto"),), "pink", "dotted")
    copy = near_duplicate({"image": scene, "text": "A star."}, rng)
    assert copy["image"].objects == scene.objects and copy["text"] == "A STAR"
    assert copy["image"].background != "pink" and copy["image"].pattern != "dotted"
    crop = near_duplicate({"image": Crop(scene, 0.2, 0.3)}, rng)["image"]
    assert (crop.x, crop.y) == (0.2, 0.3) and crop.scene.background != "pink"
    films = [Film((Track(Placed("2b50", "noto"), "left"),))]
    assert near_duplicate({"video": films}, rng)["video"][0].tracks == films[0].tracks
    assert near_duplicate({"text": "星"}, rng) == {"text": "星!"}  # a script without case
    stored = {"image": Image.new("RGB", (2, 2)), "video": Clip(np.zeros((2, 4, 4, 3), np.uint8), 2.0)}
    assert near_duplicate(stored, rng) == stored
    assert near_duplicate({"image": "Picture.png"}, rng) == {"image": "Picture.png"}  # a path is not text
