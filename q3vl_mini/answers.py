"""What a backbone says about pictures that it never saw: generated text, compared word for word with the truth."""

from collections.abc import Sequence

import torch

from .emoji_world import words
from .emoji_world.scenes import COLOURS
from .emoji_world.tasks import World, build
from .forward import measure, pad, visual_outputs
from .media import MediaBudget
from .records import Instance
from .templates import chat_prompt, prompt_ids


def answers(
    model, processor, questions: Sequence[Instance], max_new_tokens: int = 24, batch_size: int = 64
) -> list[str]:
    """Greedy answers to questions with pictures or clips, in the chat format without a system message."""
    tokenizer, said = processor.tokenizer, []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        names = [f"question {start + i}" for i in range(len(part))]
        prompts, visuals = [], []
        for question, name in zip(part, names, strict=True):
            [content], found = measure([question], MediaBudget(fps=2.0), processor, 4096, None, {}, [name])
            prompts.append(chat_prompt(content))
            visuals += found
        inputs = pad(prompt_ids(prompts, tokenizer, 4096, names), visuals, processor, "left")
        made = visual_outputs(model, inputs.pop("visuals"))
        with torch.no_grad():
            out = model.generate(**inputs, mm_encoder_outputs=made, max_new_tokens=max_new_tokens)
        said += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def answer_scores(model, processor, split: str = "validation", n: int = 150) -> dict[str, float]:
    """Shares of right answers on a split that no training showed.

    `names`: of single things, asked for what they are. `things`, `places`: of the two in a scene, those that its
    description names, and whose place it says. `counts`, `colours`: of the questions in the task image_qa whose answer
    is a number or a colour; guessing gives a quarter and a ninth. Of the split "test", names are in the unseen styles.
    """
    world = World(split, "answers", 0)
    keys = world.keys[:: max(1, len(world.keys) // n)]
    single = [{"image": world.single(key, tinted=0.0), "text": "What is this?"} for key in keys]
    named = [words.name(key) == a for key, a in zip(keys, answers(model, processor, single), strict=True)]
    scenes = [world.scene(2, tinted=0.0) for _ in range(n)]
    told = answers(model, processor, [{"image": scene, "text": "Describe the picture."} for scene in scenes])
    pairs = [(thing, text) for scene, text in zip(scenes, told, strict=True) for thing in scene.objects]
    asked = build("image_qa", split, 4 * n, 7)
    truth = [asked.corpus[labels.positives[0]]["text"] for labels in asked.relevance]
    rows = [i for i, t in enumerate(truth) if t in words.NUMBERS or t in COLOURS]
    said = dict(zip(rows, answers(model, processor, [asked.queries[i] for i in rows]), strict=True))
    return {
        "names": _share(named),
        "things": _share([words.name(thing.key) in text for thing, text in pairs]),
        "places": _share([words.place_of(thing) in text for thing, text in pairs]),
        "counts": _share([said[i] == truth[i] for i in rows if truth[i] in words.NUMBERS]),
        "colours": _share([said[i] == truth[i] for i in rows if truth[i] in COLOURS]),
    }


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 3)
