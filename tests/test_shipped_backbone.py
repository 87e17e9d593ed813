"""Q3VL-tiny as shipped: loads like any Qwen3-VL, looks at the picture, and names what it never saw drawn so."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from q3vl_mini.backbone import load
from q3vl_mini.config import data_dir
from q3vl_mini.emoji_world import sprites, words
from q3vl_mini.emoji_world.tasks import World
from q3vl_mini.forward import measure, pad, visual_outputs
from q3vl_mini.pretrain_language import BUDGET, picture_matters
from q3vl_mini.templates import chat_prompt, prompt_ids

FOLDER = data_dir() / "q3vl-tiny"


@pytest.fixture(scope="module")
def backbone():
    return load("q3vl-tiny", device="cpu")


def answers(backbone, questions) -> list[str]:
    """Greedy answers, one question at a time as a user asks."""
    out = []
    tokenizer = backbone.processor.tokenizer
    for question in questions:
        [content], visuals = measure([question], BUDGET, backbone.processor, 4096, None, {}, ["question"])
        ids = prompt_ids([chat_prompt(content)], tokenizer, 4096, ["question"])
        inputs = pad(ids, visuals, backbone.processor, "left")
        made = visual_outputs(backbone.model, inputs.pop("visuals"))
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            text = backbone.model.generate(**inputs, mm_encoder_outputs=made, max_new_tokens=12)
        out.append(tokenizer.decode(text[0, length:], skip_special_tokens=True))
    return out


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


def test_it_names_single_things_drawn_in_styles_it_never_saw(backbone):
    world = World("test", "naming", 0)
    keys = [k for k in world.keys if all(sprites.has_style(s, k) for s in sprites.TEST_STYLES)][::25]
    scenes = [world.single(k, tinted=0.0) for k in keys]
    said = answers(backbone, [{"image": s, "text": "What is this?"} for s in scenes])
    right = [words.name(k) == a for k, a in zip(keys, said, strict=True)]
    assert sum(right) / len(right) > 0.1, list(zip(map(words.name, keys), said, strict=True))
