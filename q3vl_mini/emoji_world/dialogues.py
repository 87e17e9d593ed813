"""Questions and answers for an instruct model, made of the training split: what Q3VL-tiny is pre-trained on.

First the short ones, about a single thing, answered by its name; then all: captions, questions, categories, clips,
pages, words in many languages, and yes/no questions. No contrastive pairs: retrieval is what stage 1 teaches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..records import Instance
from . import sprites, words
from .bank import SpriteBank
from .scenes import COLOURS, Page, Placed
from .tasks import TASKS, World, build, keywords
from .words import pick

CAPTION_REQUESTS = ("Describe the picture.", "What does the picture show?", "Caption this.", "What is this?")
CLIP_REQUESTS = ("Describe the clip.", "What happens in the clip?", "What happens here?")
LANGUAGE_NAMES = {
    "de": "German", "fr": "French", "es": "Spanish", "pt": "Portuguese", "nl": "Dutch", "sv": "Swedish",
    "pl": "Polish", "ru": "Russian", "uk": "Ukrainian", "tr": "Turkish", "ar": "Arabic", "hi": "Hindi",
    "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "id": "Indonesian", "vi": "Vietnamese",
}  # fmt: skip


# What may stand in the system message; the first is the embedder's default instruction and stands there most often.
SYSTEM_MESSAGES = (
    "Represent the user's input.",
    "You are a helpful assistant.",
    "Answer in a few words.",
    *(TASKS[name].instruction for name in ("concept", "text_to_image", "image_to_text", "scene_retrieval")),
    *(TASKS[name].instruction for name in ("same_thing", "video_retrieval", "keyword_search", "cross_lingual")),
)
# What a system message makes needless, so that it is left out half of the time.
NEEDLESS = (*CAPTION_REQUESTS, *CLIP_REQUESTS, " in English?", ": what is it?")


@dataclass(frozen=True)
class Turn:
    """One question (an instance of any kind) and its answer; `kind` for the log.

    system: the system message; none if blank. document: the question is then a query, and the answer whether this
    document meets it, asked as the reranker asks; `system` is its instruction.
    """

    kind: str
    question: Instance
    answer: str
    system: str = ""
    document: Instance | None = None


def _with_text(instance: Instance, text: str) -> Instance:
    return {**instance, "text": text}


def _name(w: World, image: Any, key: str, tint: str | None) -> Turn:
    """What a picture of one thing shows, in English or another language."""
    if w.rng.random() < 0.15 and not tint:
        code = pick(w.rng, tuple(LANGUAGE_NAMES))
        if foreign := sprites.name_in(code, key):
            return Turn("name", {"image": image, "text": f"What is this in {LANGUAGE_NAMES[code]}?"}, foreign)
    return Turn(
        "name", {"image": image, "text": pick(w.rng, CAPTION_REQUESTS)}, words.describe(Placed(key, "", tint=tint))
    )


def _name_single(w: World) -> Turn:
    scene = w.single(tinted=0.25)
    return _name(w, scene, scene.objects[0].key, scene.objects[0].tint)


def _caption(w: World) -> Turn:
    scene = w.scene(int(w.rng.integers(2, 5)), same=w.rng.random() < 0.25, tinted=0.2)
    things = scene.objects
    if len({(t.key, t.tint) for t in things}) == 1:
        answer = f"{words.NUMBERS[len(things)]} times {words.describe(things[0])}"
    else:
        answer = ", ".join(f"{words.place_of(t)}: {words.describe(t)}" for t in things)
    return Turn("caption", {"image": scene, "text": pick(w.rng, CAPTION_REQUESTS)}, answer)


def _clip(w: World) -> Turn:
    film = build_film(w)
    answer = ", then ".join(f"{words.describe(t.thing)} {words.MOTION_WORDS[t.motion][0]}" for t in film.tracks)
    return Turn("clip", {"video": film, "text": pick(w.rng, CLIP_REQUESTS)}, answer)


def build_film(w: World):
    n = 1 + int(w.rng.random() < 0.5)
    keys = w.keys_together(n) if n > 1 else [w.key()]
    motions = w.rng.permutation(list(words.MOTION_WORDS))[:n].tolist()
    return w.film(list(zip(keys, motions, strict=True)))


def _translate(w: World) -> Turn:
    key, code = w.key(), pick(w.rng, [c for c in w.languages if c != "en"])
    foreign = sprites.name_in(code, key)
    if foreign is None:
        return _translate(w)
    if code in LANGUAGE_NAMES and w.rng.random() < 0.3:
        return Turn("translate", {"text": f"{words.name(key)} in {LANGUAGE_NAMES[code]}?"}, foreign)
    return Turn("translate", {"text": f"{foreign} in English?"}, words.name(key))


def _said(w: World) -> Turn:
    """The name of what a caption in some language, or a few keywords, say."""
    key = w.key()
    cues = keywords(w, key, int(w.rng.integers(2, 5)))
    if len(cues) > 1 and w.rng.random() < 0.5:
        return Turn("said", {"text": f"{', '.join(cues)}: what is it?"}, words.name(key))
    language = pick(w.rng, tuple(words.CAPTION_FRAMES)) if w.rng.random() < 0.5 else "en"
    return Turn("said", {"text": words.caption_one(w.rng, Placed(key, ""), language)}, words.name(key))


def _kind(w: World) -> Turn:
    key = w.key()
    subgroup = words.subgroup_label(sprites.concept_by_key()[key].subgroup)
    return Turn("kind", {"text": f"What kind of thing is {words.name(key)}?"}, subgroup)


def _page(w: World, page: Page) -> Turn:
    block = page.blocks[0]
    part = "chart" if block.kind == "bars" else "table"
    shown, kind = ", ".join(words.name(key) for _, key in block.icons), w.rng.random()
    if kind < 0.35:
        return Turn("page", {"image": page, "text": "What is the title of the page?"}, page.heading)
    if kind < 0.65:
        return Turn("page", {"image": page, "text": f"What is in the {part}?"}, shown)
    return Turn("page", {"image": page}, f"{page.heading}, {part}: {shown}", SYSTEM_MESSAGES[0])


def _same(w: World) -> Turn:
    """Whether two of pictures and words are of the same thing: in a plain question, or as the reranker asks."""
    key, right = w.key(), w.rng.random() < 0.5
    other = key if right else w.neighbour(key) if w.rng.random() < 0.5 else w.other(key)
    answer, kind = "yes" if right else "no", w.rng.random()
    said = words.caption_one(w.rng, Placed(other, ""), pick(w.rng, tuple(words.CAPTION_FRAMES)))
    if w.rng.random() < 0.6:
        pictures = w.single(key, 0.0), w.single(other, 0.0)
        name, query, document = pick(w.rng, (
            ("text_to_image", {"text": words.caption_one(w.rng, Placed(key, ""))}, {"image": pictures[1]}),
            ("image_to_text", {"image": pictures[0]}, {"text": said}),
            ("same_thing", {"image": pictures[0]}, {"image": pictures[1]}),
            ("cross_lingual", {"text": said}, {"text": words.name(key)}),
        ))  # fmt: skip
        return Turn("same", query, answer, TASKS[name].instruction, document)
    if kind < 0.5:
        pair = [w.single(key, 0.0), w.single(other, 0.0)]
        return Turn("same", {"image": pair, "text": "Do both pictures show the same thing? yes or no"}, answer)
    if kind < 0.75:
        return Turn("same", {"image": w.single(key, 0.0), "text": f"Does it show this: {said}? yes or no"}, answer)
    return Turn("same", {"text": f"{words.name(key)} and {said}: is it the same? yes or no"}, answer)


def _in_other_words(w: World) -> Turn:
    """A free caption of a scene or a clip, answered by the caption that `_caption` and `_clip` give."""
    turn = _clip(w) if w.rng.random() < 0.4 else _caption(w)
    if "video" in turn.question:
        said = words.caption_film(w.rng, [(t.thing, t.motion) for t in turn.question["video"].tracks])
    else:
        said = words.caption_scene(w.rng, turn.question["image"].objects, False)
    return Turn("in_other_words", {"text": said}, turn.answer)


def with_system_messages(w: World, turns: list[Turn], share: float) -> list[Turn]:
    """A share of the dialogues with a system message, which may stand for the request in the question."""
    out = []
    for turn in turns:
        if turn.system or w.rng.random() >= share:
            out.append(turn)
            continue
        message = SYSTEM_MESSAGES[0] if w.rng.random() < 0.5 else pick(w.rng, SYSTEM_MESSAGES[1:])
        question, text = turn.question, turn.question["text"]
        needless = next((end for end in NEEDLESS if text.endswith(end)), None)
        if needless and w.rng.random() < 0.5:
            rest = text.removesuffix(needless)
            question = {k: v for k, v in question.items() if k != "text"} | ({"text": rest} if rest else {})
        out.append(replace(turn, question=question, system=message))
    return out


JUDGED = (
    "text_to_image", "image_to_text", "scene_retrieval", "same_thing", "composed", "video_retrieval", "moment",
    "visual_document", "keyword_search", "cross_lingual",
)  # fmt: skip


def judged(n: int, seed: int, split: str = "train", names: Sequence[str] = JUDGED, hard: float = 0.3) -> list[Turn]:
    """About n questions whether a document meets a query, asked as the reranker asks; yes for half of them.

    Of the other documents a share `hard` is a confusing one, where the task names such; the rest is drawn at random.
    """
    turns = []
    for name in names:
        q = build(name, split, math.ceil(n / len(names)), seed)
        rng = np.random.default_rng([seed, len(turns)])
        for query, labels in zip(q.queries, q.relevance, strict=True):
            right = rng.random() < 0.5
            chosen = labels.positives if right else labels.negatives if rng.random() < hard else ()
            document = pick(rng, chosen) if chosen else int(rng.integers(len(q.corpus)))
            answer = "yes" if document in labels.positives else "no"
            turns.append(Turn("judged", query, answer, q.instruction, q.corpus[document]))
    return turns


def short_turns(bank: SpriteBank, n: int, seed: int, strength: float, systems: float = 0.5) -> list[Turn]:
    """n questions that a name answers, shuffled: three fifths on augmented pictures of one thing, the others in words.

    Pictures are arrays (64, 64, 3); a share `systems` has a system message. What shows a colour on a thing that the
    training split may not is left out.
    """
    w, g = World("train", "short", seed), torch.Generator().manual_seed(seed)
    pictures, concepts, tints = bank.pictures(round(0.6 * n), strength, 0.15, g)
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    turns = []
    for array, concept, tint in zip(arrays, concepts.tolist(), tints.tolist(), strict=True):
        key, colour = bank.keys[concept], (None, *COLOURS)[tint]
        if colour is None or w.belongs(key, colour):
            turns.append(_name(w, array, key, colour))
    makers = (_translate, _translate, _translate, _said, _said, _kind)
    turns += [pick(w.rng, makers)(w) for _ in range(n - len(turns))]
    return with_system_messages(w, [turns[i] for i in w.rng.permutation(n).tolist()], systems)


def _yes_no(w: World, turn: Turn, other: str) -> Turn:
    """A caption turned into a question that is answered with yes or no."""
    right = w.rng.random() < 0.5
    claim = turn.answer if right else other
    frames = ("Is this right: {}? Answer yes or no.", "{}: yes or no?", "Does it show this: {}? yes or no")
    return Turn("yes_no", _with_text(turn.question, pick(w.rng, frames).format(claim)), "yes" if right else "no")


def dialogues(n: int, seed: int, split: str = "train", systems: float = 0.5, share_judged: float = 0.0) -> list[Turn]:
    """About n turns of all kinds, shuffled, a share `systems` with a system message, `share_judged` as `judged` asks.

    The same for the same arguments.
    """
    n_judged = round(share_judged * n)
    n -= n_judged
    w = World(split, "dialogues", seed)
    turns: list[Turn] = []
    turns += [_name_single(w) for _ in range(int(0.16 * n))]
    turns += [_caption(w) for _ in range(int(0.10 * n))]
    turns += [_clip(w) for _ in range(int(0.08 * n))]
    shown = list(turns)
    turns += [_translate(w) for _ in range(int(0.05 * n))]
    turns += [_said(w) for _ in range(int(0.04 * n))]
    turns += [_in_other_words(w) for _ in range(int(0.08 * n))]
    turns += [_same(w) for _ in range(int(0.07 * n))]
    for i in w.rng.permutation(len(shown))[: int(0.08 * n)].tolist():
        turn = turns[i]
        others = [t.answer for t in (turns[i - 1], turns[i - 2]) if t.kind == turn.kind and t.answer != turn.answer]
        if turn.kind == "name" and w.rng.random() < 0.5:  # a confusing name, of the same subgroup
            others.insert(0, words.name(w.neighbour(turn.question["image"].objects[0].key)))
        if others:
            turns.append(_yes_no(w, turn, others[0]))
    turns = with_system_messages(w, turns, systems)
    for name, share in (
        ("image_qa", 0.14), ("concept", 0.03), ("group", 0.02), ("subgroup", 0.03), ("motion", 0.02),
        ("video_qa", 0.05), ("keyword_search", 0.03), ("text_group", 0.02),
    ):  # fmt: skip
        q = build(name, split, int(share * n), seed + 1)
        for query, labels in zip(q.queries, q.relevance, strict=True):
            answer = q.corpus[labels.positives[0]]["text"]
            if w.rng.random() < systems:
                turns.append(Turn(name, query, answer, q.instruction))
            else:
                text = " ".join(t for t in (query.get("text"), q.instruction if name != "image_qa" else None) if t)
                turns.append(Turn(name, _with_text(query, text), answer))
    pages = build("visual_document", split, int(0.06 * n), seed + 1)
    turns += [_page(w, page["image"]) for page in pages.corpus]
    turns += judged(n_judged, seed + 2, split) if n_judged else []
    return [turns[i] for i in w.rng.permutation(len(turns)).tolist()]


def tokenizer_texts(seed: int = 0) -> Iterator[str]:
    """Text for the tokenizer: names and keywords in the training languages, and the world's own sentences."""
    w = World("train", "tokenizer", seed)
    for code in w.languages:
        for key in w.keys:
            repeats = 3 if code == "en" else 1
            yield from [sprites.name_in(code, key) or ""] * repeats
    for key in w.keys:
        yield ", ".join(sprites.keywords_in("en", key))
    for turn in dialogues(6000, seed):
        yield turn.question.get("text", "")
        yield turn.answer
    for name in ("text_to_image", "scene_retrieval", "video_retrieval", "visual_document", "keyword_search"):
        q = build(name, "train", 1500, seed)
        yield q.instruction
        yield from (query.get("text", "") for query in q.queries)
    yield from ["yes", "no", "<0.5 seconds>", "seconds"] * 200
