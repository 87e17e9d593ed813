"""Words for what is drawn: phrases, captions, questions and their answers, from many templates.

Enough wordings, in several languages, that a model cannot win by recognising a template. Names in other
languages are CLDR's; the frames around them are our own. Taught in notebooks/03.
"""

import numpy as np

from .scenes import Placed
from .sprites import concept_by_key, name_in

PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "big")
NUMBERS = ("no", "one", "two", "three", "four")
GROUPS = {
    "smileys-emotion": "smileys and emotions",
    "people-body": "people and bodies",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities and events",
    "objects": "everyday objects",
    "symbols": "signs and symbols",
    "flags": "flags",
}
CAPTION_FRAMES = {
    "en": (
        "{a}", "a picture of {a}", "{a}, drawn", "an icon that shows {a}", "this is {a}", "here you see {a}",
        "an emoji: {n}", "a small drawing of {a}", "the symbol for {n}", "{n}",
    ),
    "de": ("{n}", "ein Bild: {n}", "eine Zeichnung: {n}", "hier sieht man: {n}"),
    "fr": ("{n}", "une image : {n}", "un dessin : {n}", "on voit ici : {n}"),
    "es": ("{n}", "una imagen: {n}", "un dibujo: {n}", "aquí se ve: {n}"),
    "pt": ("{n}", "uma imagem: {n}", "um desenho: {n}"),
    "nl": ("{n}", "een plaatje: {n}", "een tekening: {n}"),
    "sv": ("{n}", "en bild: {n}", "en teckning: {n}"),
    "pl": ("{n}", "obrazek: {n}", "rysunek: {n}"),
    "ru": ("{n}", "картинка: {n}", "рисунок: {n}"),
    "uk": ("{n}", "картинка: {n}", "малюнок: {n}"),
    "tr": ("{n}", "bir resim: {n}", "bir çizim: {n}"),
    "ar": ("{n}", "صورة: {n}", "رسم: {n}"),
    "hi": ("{n}", "एक चित्र: {n}"),
    "zh": ("{n}", "一张图片：{n}", "图中是{n}"),
    "ja": ("{n}", "{n}の絵", "{n}の画像"),
    "ko": ("{n}", "그림: {n}", "{n} 그림"),
    "id": ("{n}", "gambar {n}"),
    "vi": ("{n}", "hình ảnh: {n}"),
}  # fmt: skip
MOTION_WORDS = {
    "left": ("moves to the left", "goes left", "slides leftwards"),
    "right": ("moves to the right", "goes right", "slides rightwards"),
    "up": ("moves up", "rises", "goes to the top"),
    "down": ("moves down", "sinks", "goes to the bottom"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes tiny"),
    "spin": ("spins", "turns around", "rotates"),
    "appear": ("appears", "shows up", "comes into view"),
    "vanish": ("vanishes", "disappears", "goes away"),
    "still": ("stays still", "does not move", "keeps its place"),
}


def pick(rng: np.random.Generator, options):
    """One of a sequence, as the element itself (numpy's choice turns strings into numpy strings)."""
    return options[int(rng.integers(len(options)))]


def subgroup_label(subgroup: str) -> str:
    """'animal-mammal' as words: 'animal mammal'."""
    return subgroup.replace("-", " ")


def name(key: str) -> str:
    """The English name without its colon: 'woman: blond hair' reads 'woman blond hair'."""
    return concept_by_key()[key].name.replace(":", "").replace("“", "").replace("”", "").lower()


def with_article(noun: str) -> str:
    if noun.split()[-1].endswith("s") and not noun.endswith(("ss", "us", "is")) or noun[0].isdigit():
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def describe(thing: Placed, size: bool = False) -> str:
    """'small blue cat': an object by its attributes; the size in a word where asked."""
    words = [SIZES[thing.size > 0.32]] if size else []
    return " ".join([*words, *([thing.tint] if thing.tint else []), name(thing.key)])


def place_of(thing: Placed) -> str:
    return PLACES[2 * (thing.y > 0.5) + (thing.x > 0.5)]


def caption_one(rng: np.random.Generator, thing: Placed, language: str = "en") -> str:
    """A caption of a single object in a language."""
    if language != "en" and (translated := name_in(language, thing.key)):
        return pick(rng, CAPTION_FRAMES.get(language, ("{n}",))).format(n=translated)
    noun = describe(thing)
    return pick(rng, CAPTION_FRAMES["en"]).format(n=noun, a=with_article(noun))


def caption_scene(rng: np.random.Generator, things: tuple[Placed, ...], sizes: bool) -> str:
    """A caption of a scene: counts where all objects are alike, else what is where."""
    if len(things) == 1:
        return caption_one(rng, things[0])
    if len({(t.key, t.tint) for t in things}) == 1:
        noun = describe(things[0])
        frames = ("{c} times {n}", "{n}, {c} of them", "{c} pictures of {n}", "there are {c}: {n}")
        return pick(rng, frames).format(c=NUMBERS[len(things)], n=noun)
    nouns = [with_article(describe(t, sizes)) for t in things]
    style = int(rng.integers(4))
    if style == 0:
        return ", ".join(f"{n} at the {place_of(t)}" for n, t in zip(nouns, things, strict=True))
    if style == 1:
        return " and ".join(f"{n} in the {place_of(t)} corner" for n, t in zip(nouns, things, strict=True))
    if style == 2:
        parts = [f"{place_of(t)}: {describe(t, sizes)}" for t in things]
        return "; ".join(parts)
    return "a scene with " + ", ".join(nouns[:-1]) + " and " + nouns[-1]


def caption_film(rng: np.random.Generator, events: list[tuple[Placed, str]]) -> str:
    """A sentence for a clip: who does what, in the order in which it happens."""
    said = [f"{with_article(describe(t))} {pick(rng, MOTION_WORDS[m])}" for t, m in events]
    if len(said) == 1:
        return pick(rng, ("{}", "a clip in which {}", "{} in this video")).format(said[0])
    return pick(rng, ("first {}, then {}", "{}, and after that {}", "{} before {}")).format(
        said[0], said[1] if len(said) == 2 else ", then ".join(said[1:])
    )
