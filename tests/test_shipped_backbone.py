"""Q3VL-tiny as shipped: loads like any Qwen3-VL, looks at the picture, and says what it never saw."""

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from q3vl_mini.answers import answer_scores
from q3vl_mini.backbone import load
from q3vl_mini.config import data_dir
from q3vl_mini.pretrain_judge import first_of
from q3vl_mini.pretrain_language import BUDGET, picture_matters
from q3vl_mini.reranker import Reranker

FOLDER = data_dir() / "q3vl-tiny"


@pytest.fixture(scope="module")
def backbone():
    return load("q3vl-tiny", device="cpu")


@pytest.fixture(scope="module", params=["validation", "test"])
def scores(request, backbone):
    return {"split": request.param, **answer_scores(backbone.model, backbone.processor, request.param)}


def test_it_loads_with_plain_transformers_and_is_small():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration" and type(processor).__name__ == "Qwen3VLProcessor"
    assert (FOLDER / "model.safetensors").stat().st_size <= 25_000_000
    for word in ("yes", "no"):
        assert processor.tokenizer.tokenize(word) == [word]


@pytest.mark.slow
def test_the_right_picture_makes_the_answer_likelier_than_another_one(backbone):
    losses = picture_matters(backbone.model, backbone.processor, n=200)
    assert losses["own_picture"] + 0.3 < losses["other_picture"], losses


@pytest.mark.slow
def test_it_names_single_things_also_in_styles_that_no_training_saw(scores):
    assert scores["names"] > {"validation": 0.4, "test": 0.2}[scores["split"]], scores


@pytest.mark.slow
def test_it_describes_scenes_of_things_that_no_training_picture_shows_together(scores):
    assert scores["things"] > {"validation": 0.3, "test": 0.2}[scores["split"]], scores
    assert scores["places"] > 0.8, scores


@pytest.mark.slow
def test_it_counts_and_sees_colours_in_scenes_it_never_saw_better_than_by_guessing(scores):
    assert scores["counts"] > 0.5 and scores["colours"] > 0.5, scores  # guessing gives a quarter, and a ninth


@pytest.mark.slow
@pytest.mark.parametrize("split", ["validation", "test"])
def test_it_judges_which_of_sixteen_documents_meets_a_query(backbone, split):
    found = first_of(Reranker.from_backbone(backbone, budget=BUDGET), n=20, split=split)
    assert found["first_of_16"] > 0.5, found  # guessing gives a sixteenth
