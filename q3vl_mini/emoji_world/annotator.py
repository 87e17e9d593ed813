"""An annotator that needs no model: it answers from what the generator knows of its own scenes and films.

It stands where a vision-language model stands at full scale (endpoint.OpenAIAnnotator), so that synthesis can be shown
and tested offline. It sees no pixels: what it says of a picture is right because it was drawn so.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from . import sprites, words
from .scenes import Film, Scene
from .tasks import World, ask
from .words import MOTION_WORDS, pick


class EmojiAnnotator:
    """Captions, image_cls, image_qa and image_ret of Scenes; captions, video_cls and video_ret of Films.

    Called like any annotator, (messages, schema) -> str; schema["title"] is the task. The same asset and task get the
    same answer.
    """

    def __call__(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> str:
        [value] = [part[part["type"]] for part in messages[1]["content"] if part["type"] != "text"]
        task = schema["title"]
        w = World("train", f"annotator/{task}", zlib.crc32(repr(value).encode()))
        kind = "image" if isinstance(value, Scene) else "video" if isinstance(value, Film) else None
        answers = {"caption": _caption, "image_cls": _name, "image_qa": _question, "image_ret": _search}
        answers |= {"video_cls": _motion, "video_ret": _search}
        if kind is None or task not in answers or (task != "caption" and not task.startswith(kind)):
            raise ValueError(f"EmojiAnnotator has no answer to {task!r} about a {type(value).__name__}")
        description = {} if task == "caption" else {"description": _said(w, value)}
        return json.dumps(description | answers[task](w, value), ensure_ascii=False)


def _said(w: World, value: Scene | Film) -> str:
    if isinstance(value, Scene):
        return words.caption_scene(w.rng, value.objects, False)
    return words.caption_film(w.rng, [(track.thing, track.motion) for track in value.tracks])


def _caption(w: World, value: Scene | Film) -> dict[str, str]:
    thing = value.objects[0] if isinstance(value, Scene) else value.tracks[0].thing
    subgroup = sprites.concept_by_key()[thing.key].subgroup
    return {"caption": _said(w, value), "category": words.subgroup_label(subgroup)}


def _name(w: World, scene: Scene) -> dict[str, str]:
    thing = max(scene.objects, key=lambda thing: thing.size)
    wrong = words.name(w.neighbour(thing.key))
    return {"task_type": "object", "label": words.name(thing.key), "misleading_label": wrong}


def _question(w: World, scene: Scene) -> dict[str, str]:
    while (asked := ask(w, scene)) is None:  # a kind of question that does not fit this scene
        pass
    question, right, wrong = asked
    return {
        "task_type": "visual_reasoning",
        "question": question,
        "positive_answer": right,
        "hard_negative_answer": wrong,
    }


def _motion(w: World, film: Film) -> dict[str, str]:
    motion = film.tracks[0].motion
    other = pick(w.rng, [m for m in MOTION_WORDS if m != motion])
    right, wrong = (f"something {MOTION_WORDS[m][0]}" for m in (motion, other))
    return {"task_type": "activity", "label": right, "misleading_label": wrong}


def _search(w: World, value: Scene | Film) -> dict[str, str]:
    kind = "description" if isinstance(value, Scene) else "entity_action"
    return {"task_type": kind, "query": _said(w, value)}
