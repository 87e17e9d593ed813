"""The shipped gallery: things, scenes, clips and pages of Emoji World in the test styles, the same on every machine."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..config import data_dir
from ..emoji_world import tasks, words
from ..emoji_world.scenes import MOTIONS, Film, Page, Scene
from ..emoji_world.sprites import concept_by_key
from ..emoji_world.words import NUMBERS, describe, pick, place_of, with_article
from .items import Item
from .shelf import Shelf

GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")  # things that everybody knows
# What the example queries ask for: a concept and its tint.
FEATURED = (
    ("1f6b2", None), ("1f3b8", None), ("1f42b", None), ("1f43c", None), ("1f427", None), ("1f955", None),
    ("1f680", None), ("1f3b8", "blue"), ("1f6b2", "red"), ("1f427", "purple"), ("1f955", "pink"), ("1f43c", "green"),
)  # fmt: skip


class FamiliarWorld(tasks.World):
    """The test split with familiar things alone: no flags, signs or faces."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in super().keys if concept_by_key()[key].group in GROUPS)


def gallery(folder: str | Path) -> Shelf:
    """The gallery as a shelf that keeps its vectors in `folder`; those of the default model are shipped."""
    return Shelf("Gallery", make_gallery(), folder, data_dir() / "gallery")


def make_gallery(pictures: int = 220, scenes: int = 60, clips: int = 40, pages: int = 40, seed: int = 0) -> list[Item]:
    """So many items of each kind, drawn as no training shows them; the same for the same arguments."""
    world = FamiliarWorld("test", "demo", seed)
    singles = [_tinted(world.single(key), tint) for key, tint in FEATURED[:pictures]]
    while len(singles) < pictures:
        key = world.key()
        if key not in dict(FEATURED):
            singles.append(world.single(key))
    drawn = [("picture", scene_title(scene), {"image": scene}) for scene in singles]
    for _ in range(scenes):
        same = world.rng.random() < 0.25
        scene = world.scene(int(world.rng.integers(2, 5 if same else 4)), same=same)
        drawn.append(("scene", scene_title(scene), {"image": scene}))
    for n in range(clips):
        keys = world.keys_together(2) if n % 2 else [world.key()]
        film = world.film([(key, pick(world.rng, MOTIONS)) for key in keys])
        drawn.append(("clip", film_title(film), {"video": film}))
    documents = tasks.build("visual_document", "test", 2 * pages, seed).corpus[:pages]
    drawn += [("page", page_title(document["image"]), document) for document in documents]
    return [Item(f"{kind}-{n:04d}", kind, title, instance) for n, (kind, title, instance) in enumerate(drawn)]


def _tinted(scene: Scene, tint: str | None) -> Scene:
    return replace(scene, objects=tuple(replace(thing, tint=tint) for thing in scene.objects))


def scene_title(scene: Scene) -> str:
    """'red apple'; 'three times red apple'; 'a cat at the top left, a red apple at the bottom right'."""
    things = scene.objects
    if len(things) == 1:
        return describe(things[0])
    if len({(thing.key, thing.tint) for thing in things}) == 1:
        return f"{NUMBERS[len(things)]} times {describe(things[0])}"
    return ", ".join(f"{with_article(describe(thing))} at the {place_of(thing)}" for thing in things)


def film_title(film: Film) -> str:
    """'a cat moves to the left, then a tree grows'."""
    return ", then ".join(
        f"{with_article(describe(track.thing))} {words.MOTION_WORDS[track.motion][0]}" for track in film.tracks
    )


def page_title(page: Page) -> str:
    """'Harvest report 2012: chart of cat, tree and boat; picture of sun'."""
    called = {"bars": "chart of", "table": "table of", "icons": "picture of"}
    parts = []
    for block in page.blocks:
        if block.kind in called:
            names = [words.name(key) for _, key in block.icons]
            listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            parts.append(f"{called[block.kind]} {listed}")
    return f"{page.heading}: {'; '.join(parts)}"
