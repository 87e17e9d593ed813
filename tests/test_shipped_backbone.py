"""Q3VL-tiny as shipped: loads like any Qwen3-VL, looks at the picture, and says what it never saw."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from q3vl_mini.backbone import load
from q3vl_mini.config import data_dir
from q3vl_mini.emoji_world import sprites, words
from q3vl_mini.emoji_world.scenes import COLOURS
from q3vl_mini.emoji_world.tasks import World, build
from q3vl_mini.forward import measure, pad, visual_outputs
from q3vl_mini.pretrain_language import BUDGET, picture_matters
from q3vl_mini.templates import chat_prompt, prompt_ids

FOLDER = data_dir() / "q3vl-tiny"


@pytest.fixture(scope="module")
def backbone():
    return load("q3vl-tiny", device="cpu")


def answers(backbone, questions) -> list[str]:
    """Greedy answers to questions about pictures of one size."""
    tokenizer, names = backbone.processor.tokenizer, [f"question {i}" for i in range(len(questions))]
    prompts, visuals = [], []
    for question, name in zip(questions, names, strict=True):
        [content], found = measure([question], BUDGET, backbone.processor, 4096, None, {}, [name])
        prompts.append(chat_prompt(content))
        visuals += found
    inputs = pad(prompt_ids(prompts, tokenizer, 4096, names), visuals, backbone.processor, "left")
    made = visual_outputs(backbone.model, inputs.pop("visuals"))
    with torch.no_grad():
        out = backbone.model.generate(**inputs, mm_encoder_outputs=made, max_new_tokens=24)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


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


def test_it_names_single_things_in_styles_that_no_training_saw(backbone):
    world = World("test", "naming", 0)
    keys = [k for k in world.keys if all(sprites.has_style(s, k) for s in sprites.TEST_STYLES)][::8]
    scenes = [world.single(k, tinted=0.0) for k in keys]
    said = answers(backbone, [{"image": s, "text": "What is this?"} for s in scenes])
    right = [words.name(k) == a for k, a in zip(keys, said, strict=True)]
    assert sum(right) / len(right) > 0.1, list(zip(map(words.name, keys), said, strict=True))


def test_it_describes_scenes_of_things_that_no_training_picture_shows_together(backbone):
    world = World("validation", "describing", 0)
    scenes = [world.scene(2, tinted=0.0) for _ in range(60)]
    said = answers(backbone, [{"image": s, "text": "Describe the picture."} for s in scenes])
    named = [words.name(t.key) in text for s, text in zip(scenes, said, strict=True) for t in s.objects]
    placed = [words.place_of(t) in text for s, text in zip(scenes, said, strict=True) for t in s.objects]
    assert sum(named) / len(named) > 0.3, said[:10]
    assert sum(placed) / len(placed) > 0.8, said[:10]


def test_it_counts_and_sees_colours_in_scenes_it_never_saw_better_than_by_guessing(backbone):
    quadruple = build("image_qa", "validation", 300, 7)
    said = answers(backbone, quadruple.queries)
    truth = [quadruple.corpus[labels.positives[0]]["text"] for labels in quadruple.relevance]
    for kind, bar in ((words.NUMBERS, 0.5), (COLOURS, 0.2)):  # guessing gives a quarter, and a ninth
        asked = [(a, t) for a, t in zip(said, truth, strict=True) if t in kind]
        assert sum(a == t for a, t in asked) / len(asked) > bar, asked
