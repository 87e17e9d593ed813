"""Queries to begin with, in several languages and modalities, and the instructions that fit them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..emoji_world.scenes import Placed, Scene
from ..emoji_world.sprites import concept_by_key, name_in
from ..emoji_world.tasks import TASKS
from .items import Item

PICTURE, SCENE, SAME, CHANGED, CLIP, PAGE = INSTRUCTIONS = tuple(
    TASKS[name].instruction
    for name in ("text_to_image", "scene_retrieval", "same_thing", "composed", "video_retrieval", "visual_document")
)
GUITAR, CAMEL, BICYCLE, PANDA, PENGUIN = "1f3b8", "1f42b", "1f6b2", "1f43c", "1f427"
NAMED = (("de", "German", GUITAR), ("es", "Spanish", CAMEL), ("ru", "Russian", BICYCLE), ("tr", "Turkish", PENGUIN),
         ("ja", "Japanese", PANDA), ("ar", "Arabic", PANDA))  # fmt: skip
DESCRIBED = (("scene-0242", SCENE), ("clip-0308", CLIP))


@dataclass(frozen=True)
class Example:
    """A query to try. label: on its button. picture: drawn in a style that the gallery does not have, or None."""

    label: str
    text: str
    instruction: str
    picture: Item | None = None


def examples(items: Sequence[Item]) -> list[Example]:
    """Queries for a gallery; the first is the one for a first visit. What asks for items that are not there is left
    out."""
    titles = {item.id: item.title for item in items}
    out = [Example("a bicycle", "a picture of a bicycle", PICTURE)]
    out += [Example(f"{name_in(code, key)} ({language})", name_in(code, key), PICTURE) for code, language, key in NAMED]
    out.append(Example("this guitar, by another hand", "", SAME, drawn(GUITAR)))
    out.append(Example("this panda, but green", "the same in green", CHANGED, drawn(PANDA)))
    out += [Example(titles[id], titles[id], instruction) for id, instruction in DESCRIBED if id in titles]
    if "page-0331" in titles:
        heading = titles["page-0331"].partition(":")[0]
        out.append(Example(f"the page “{heading}”", f"the page titled {heading}", PAGE))
    return out


def drawn(key: str) -> Item:
    """A thing in a style that the gallery does not have."""
    scene = Scene((Placed(key, "noto"),))
    return Item(f"example-{key}", "picture", concept_by_key()[key].name, {"image": scene})
