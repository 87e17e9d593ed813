"""Q3VL-tiny as shipped: loads like any Qwen3-VL and looks at the picture."""

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from q3vl_mini.backbone import load
from q3vl_mini.config import data_dir
from q3vl_mini.pretrain_language import picture_matters

FOLDER = data_dir() / "q3vl-tiny"


@pytest.fixture(scope="module")
def backbone():
    return load("q3vl-tiny", device="cpu")


def test_it_loads_with_plain_transformers_and_is_small():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration" and type(processor).__name__ == "Qwen3VLProcessor"
    assert (FOLDER / "model.safetensors").stat().st_size <= 25_000_000
    for word in ("yes", "no"):
        assert processor.tokenizer.tokenize(word) == [word]


def test_the_right_picture_makes_the_answer_likelier_than_another_one(backbone):
    losses = picture_matters(backbone.model, backbone.processor, n=200)
    assert losses["own_picture"] + 0.3 < losses["other_picture"], losses
