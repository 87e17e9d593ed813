"""The seed pool: emoji drawn in five independent styles, with names and keywords in many languages.

Sources, authors and licences: data_samples/README.md. Three styles are for training; two test
styles are never seen by any training. Taught in notebooks/03.
"""

import io
import json
import lzma
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import resvg_py
from PIL import Image

from ..config import data_dir
from .restyle import restyled

TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat")
TEST_STYLES = ("noto-v1", "emojione")
STYLES = TRAIN_STYLES + TEST_STYLES

# Languages whose words no training ever shows: they ask how far a language carries over.
UNSEEN_LANGUAGES = ("gu", "hy", "it", "ms", "my", "no", "sk", "ur")


@dataclass(frozen=True)
class Concept:
    """One emoji as an idea: its code points (`key`), English name, group and subgroup."""

    key: str
    emoji: str
    name: str
    group: str
    subgroup: str


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts, in the order of the Unicode emoji list; each is drawn in every training style."""
    text = (data_dir() / "emoji_world" / "concepts.json").read_text(encoding="utf-8")
    return tuple(Concept(**c) for c in json.loads(text))


@cache
def concept_by_key() -> dict[str, Concept]:
    return {c.key: c for c in concepts()}


@cache
def _annotations() -> dict[str, dict[str, dict]]:
    return json.loads(lzma.decompress((data_dir() / "emoji_world" / "annotations.json.xz").read_bytes()))


def languages() -> tuple[str, ...]:
    """Codes of the languages that have names and keywords, `UNSEEN_LANGUAGES` included."""
    return tuple(sorted(_annotations()))


def name_in(language: str, key: str) -> str | None:
    """The concept's name in a language, None where CLDR has none; English falls back on the Unicode name."""
    row = _annotations()[language].get(key)
    return row["name"] if row else (concept_by_key()[key].name if language == "en" else None)


def keywords_in(language: str, key: str) -> tuple[str, ...]:
    """CLDR's keywords of a concept in a language, without its name; may be empty."""
    row = _annotations()[language].get(key)
    return tuple(k for k in row["keywords"] if k != row["name"]) if row else ()


@cache
def _bodies(style: str) -> dict[str, dict]:
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; the styles are {', '.join(STYLES)}")
    return json.loads(lzma.decompress((data_dir() / "emoji_world" / "sprites" / f"{style}.json.xz").read_bytes()))


def has_style(style: str, key: str) -> bool:
    """Whether the concept is drawn in this style (the test styles lack the newer emoji)."""
    return key in _bodies(style)


def svg(style: str, key: str, house: int = 0) -> str:
    """The SVG document of a concept in a style; KeyError where the style has no such drawing.

    house: 0 is the style's own design, another number a seed of one that changes it (restyle.py).
    """
    icon = _bodies(style)[key]
    left, top, width, height = icon["box"]
    body = restyled(icon["body"], width, house) if house else icon["body"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


@lru_cache(maxsize=16_384)
def sprite(style: str, key: str, size: int) -> np.ndarray:
    """A style's own drawing as premultiplied RGBA, uint8 (size, size, 4), read-only and cached."""
    return drawn(style, key, size)


def drawn(style: str, key: str, size: int, house: int = 0) -> np.ndarray:
    """A drawing as premultiplied RGBA, uint8 (size, size, 4), read-only; `house` as for `svg`.

    Premultiplied, because then pasting is one multiplication and blending at edges is exact.
    """
    png = resvg_py.svg_to_bytes(svg_string=svg(style, key, house), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):  # a drawing that is not square keeps its proportions
        square = Image.new("RGBA", (size, size))
        image.thumbnail((size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    rgba = np.asarray(image).astype(np.uint16)
    rgba[..., :3] = rgba[..., :3] * rgba[..., 3:] // 255
    out = rgba.astype(np.uint8)
    out.setflags(write=False)
    return out
