"""Scenes, clips and pages, composed of sprites and drawn on demand at any size.

Every picture is a small frozen record of what is drawn, so its labels are exact, it can be hashed,
compared and stored, and the same scene can be drawn at 64 or at 1024 pixels. Sizes and positions are
fractions of the side; `render()` draws. Taught in notebooks/03.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..records import Clip
from .augment import redraw
from .sprites import drawn, sprite

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (240, 200, 20),
    "green": (46, 150, 60),
    "blue": (38, 90, 210),
    "purple": (130, 60, 180),
    "pink": (240, 120, 180),
    "brown": (120, 75, 40),
    "grey": (125, 125, 125),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "grey": (190, 190, 195),
    "pink": (250, 215, 225),
    "yellow": (252, 244, 200),
    "green": (205, 235, 205),
    "blue": (205, 225, 250),
    "purple": (226, 212, 246),
}
PATTERNS = ("plain", "graded", "striped", "dotted")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "spin", "appear", "vanish", "still")
HAND_STRENGTH = 0.8  # how far another hand departs from the style's own drawing, 0 to 1
_INK = (40, 40, 48)


@dataclass(frozen=True)
class Placed:
    """A concept in a picture: style, centre (x, y) and size as fractions of the side, optional tint.

    hand: 0 is the style's own drawing; another number is a seed by which it is drawn otherwise, so that training shows
    more variety than three styles have: an odd one by another house (restyle.py), an even one bent and recoloured
    (augment.redraw).
    """

    key: str
    style: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.9
    tint: str | None = None
    hand: int = 0


@lru_cache(maxsize=4_096)
def _drawing(key: str, style: str, pixels: int, tint: str | None, hand: int, turns: int) -> np.ndarray:
    """A drawing by `hand`, tinted and turned by `turns` eighths of a circle; premultiplied uint8 (n, n, 4)."""
    other_house = hand % 2 == 1
    rgba = drawn(style, key, pixels, hand) if other_house else sprite(style, key, pixels)
    if tint:
        grey = rgba[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        alpha = rgba[..., 3].astype(np.float32)
        shade = (0.3 * alpha + 0.7 * grey)[..., None] / 255
        rgba = np.concatenate([shade * np.array(COLOURS[tint], np.float32), alpha[..., None]], -1).astype(np.uint8)
    if hand and not other_house:
        rgba = _redrawn(rgba, hand, keep_colour=tint is not None)
    if turns % 8:
        rgba = np.asarray(Image.fromarray(rgba).rotate(-45 * turns, Image.Resampling.BILINEAR))
    return rgba


def _redrawn(rgba: np.ndarray, hand: int, keep_colour: bool) -> np.ndarray:
    """A drawing (n, n, 4) as another hand would draw it: the same for the same `hand`, about as large, not mirrored."""
    x = torch.from_numpy(rgba.copy()).permute(2, 0, 1)[None].float() / 255
    g, flip = torch.Generator().manual_seed(hand), torch.tensor([False])
    out = redraw(x, len(rgba), HAND_STRENGTH, g, flip, torch.tensor([keep_colour]), shrunk=0.0)
    return (out.clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


@lru_cache(maxsize=2_000)
def _background(width: int, height: int, colour: str, pattern: str) -> np.ndarray:
    """A plain or patterned background, uint8 (height, width, 3)."""
    base = np.array(BACKGROUNDS[colour], np.float32)
    tone = base * 0.86 if base.mean() > 80 else base + 50  # the pattern's second colour
    y, x = np.mgrid[:height, :width].astype(np.float32) * (4 / width)  # a pattern repeats four times a side
    weight = {
        "plain": lambda: np.zeros((height, width), np.float32),
        "graded": lambda: y / y.max(),
        "striped": lambda: ((x + y) % 1 < 0.3).astype(np.float32),
        "dotted": lambda: ((x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.035).astype(np.float32),
    }[pattern]()[..., None]
    out = (base * (1 - weight) + tone * weight).astype(np.uint8)
    out.setflags(write=False)
    return out


def _paste(canvas: np.ndarray, drawing: np.ndarray, cx: float, cy: float) -> None:
    """Blend a premultiplied drawing onto the canvas (H, W, 3), centred at pixel (cx, cy), clipped at the edges."""
    n = len(drawing)
    left, top = round(cx - n / 2), round(cy - n / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, canvas.shape[1]), min(top + n, canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = drawing[y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas[y0:y1, x0:x1]
    blended = part[..., :3] + under.astype(np.uint16) * (255 - part[..., 3:].astype(np.uint16)) // 255
    under[...] = np.minimum(blended, 255)  # rotation rounds colour above alpha now and then


def _place(canvas: np.ndarray, thing: Placed, side: int, *, scale: float = 1.0, turns: int = 0) -> None:
    pixels = max(6, round(thing.size * side * scale / 2) * 2)
    _paste(
        canvas, _drawing(thing.key, thing.style, pixels, thing.tint, thing.hand, turns), thing.x * side, thing.y * side
    )


@dataclass(frozen=True)
class Scene:
    """A square picture of some objects on a background; `clutter` are faint things that mean nothing."""

    objects: tuple[Placed, ...]
    background: str = "white"
    pattern: str = "plain"
    pixels: int = 64
    clutter: tuple[Placed, ...] = ()

    def array(self) -> np.ndarray:
        """The picture as uint8 (pixels, pixels, 3)."""
        canvas = _background(self.pixels, self.pixels, self.background, self.pattern).copy()
        for thing in self.clutter:
            _place(canvas, thing, self.pixels)
        if self.clutter:  # faint: halfway back to the background
            ground = _background(self.pixels, self.pixels, self.background, self.pattern)
            canvas = ((canvas.astype(np.uint16) + 2 * ground.astype(np.uint16)) // 3).astype(np.uint8)
        for thing in self.objects:
            _place(canvas, thing, self.pixels)
        return canvas

    def render(self) -> Image.Image:
        return Image.fromarray(self.array())


@dataclass(frozen=True)
class Crop:
    """A square part of a scene around (x, y), `extent` wide as a fraction of the side, drawn at `pixels`."""

    scene: Scene
    x: float
    y: float
    extent: float = 0.5
    pixels: int = 64

    def render(self) -> Image.Image:
        side = round(self.pixels / self.extent)
        whole = Scene(self.scene.objects, self.scene.background, self.scene.pattern, side, self.scene.clutter).array()
        left = min(max(round(self.x * side - self.pixels / 2), 0), side - self.pixels)
        top = min(max(round(self.y * side - self.pixels / 2), 0), side - self.pixels)
        return Image.fromarray(whole[top : top + self.pixels, left : left + self.pixels])


@dataclass(frozen=True)
class Track:
    """An object of a film and what it does between `start` and `end`, both as fractions of the film."""

    thing: Placed
    motion: str = "still"
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Film:
    """A clip: objects that move, grow, turn, appear. `seconds` long at `fps` frames a second."""

    tracks: tuple[Track, ...]
    background: str = "white"
    pattern: str = "plain"
    pixels: int = 64
    seconds: float = 4.0
    fps: float = 2.0

    def render(self) -> Clip:
        n = max(2, round(self.seconds * self.fps))
        frames = np.stack([self.frame(i / (n - 1)) for i in range(n)])
        return Clip(frames, self.fps)

    def frame(self, time: float) -> np.ndarray:
        """The picture at a time from 0 to 1, uint8 (pixels, pixels, 3)."""
        canvas = _background(self.pixels, self.pixels, self.background, self.pattern).copy()
        for track in self.tracks:
            done = min(max((time - track.start) / max(track.end - track.start, 1e-6), 0.0), 1.0)
            state = _moved(track.thing, track.motion, done)
            if state:
                thing, scale, turns = state
                _place(canvas, thing, self.pixels, scale=scale, turns=turns)
        return canvas


@dataclass(frozen=True)
class Frame:
    """A single picture of a film, at `time` as a fraction of it."""

    film: Film
    time: float = 0.5

    def render(self) -> Image.Image:
        return Image.fromarray(self.film.frame(self.time))


def _moved(thing: Placed, motion: str, done: float) -> tuple[Placed, float, int] | None:
    """(object, scale, eighths of a turn) after a share `done` of a motion; None while it is not there."""
    if motion in ("left", "right", "up", "down"):
        travel = 0.6 * (done - 0.5) * (-1 if motion in ("left", "up") else 1)
        x, y = (thing.x + travel, thing.y) if motion in ("left", "right") else (thing.x, thing.y + travel)
        return replace(thing, x=x, y=y), 1.0, 0
    if motion == "grow":
        return thing, 0.4 + 0.8 * done, 0
    if motion == "shrink":
        return thing, 1.2 - 0.8 * done, 0
    if motion == "spin":
        return thing, 1.0, round(8 * done)
    if motion in ("appear", "vanish"):
        return (thing, 1.0, 0) if (done >= 0.5) == (motion == "appear") else None
    return thing, 1.0, 0


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Block:
    """A part of a page. kind: 'words' (lines of text), 'icons' (a row of drawings), 'bars' (a chart: one
    bar an icon), 'table' (rows of icon, word, number). `values` are bar heights or table numbers."""

    kind: str
    texts: tuple[str, ...] = ()
    icons: tuple[tuple[str, str], ...] = ()  # (style, key)
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Page:
    """A visual document: a heading and blocks below each other, `width` x `height` pixels."""

    heading: str
    blocks: tuple[Block, ...]
    accent: str = "blue"
    width: int = 160
    height: int = 192

    def render(self) -> Image.Image:
        unit = self.width / 160
        image = Image.new("RGB", (self.width, self.height), "white")
        draw = ImageDraw.Draw(image)
        bar = round(30 * unit)
        draw.rectangle((0, 0, self.width, bar), fill=COLOURS[self.accent])
        size = round(18 * unit)
        while size > 6 and draw.textlength(self.heading, font=_font(size)) > self.width - 10 * unit:
            size -= 1
        draw.text((5 * unit, bar / 2), self.heading, fill="white", font=_font(size), anchor="lm")
        top, share = bar + 3 * unit, (self.height - bar - 6 * unit) / len(self.blocks)
        canvas = np.asarray(image).copy()
        for i, block in enumerate(self.blocks):
            canvas = self._draw(canvas, block, top + i * share, share, unit)
        return Image.fromarray(canvas)

    def _draw(self, canvas: np.ndarray, block: Block, top: float, tall: float, unit: float) -> np.ndarray:
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        icons: list[tuple[tuple[str, str], float, float, float]] = []  # (style, key), x, y, side
        if block.kind == "words":
            step = min(tall / max(len(block.texts), 1), 20 * unit)
            for i, line in enumerate(block.texts):
                draw.text((6 * unit, top + i * step), line, fill=_INK, font=_font(max(7, round(step * 0.7))))
        elif block.kind == "icons":
            side = min(tall, self.width / max(len(block.icons), 1)) * 0.88
            for i, icon in enumerate(block.icons):
                icons.append((icon, self.width * (i + 0.5) / len(block.icons), top + tall / 2, side))
        elif block.kind == "bars":
            side = min(tall * 0.4, self.width / len(block.icons) * 0.8)
            floor, room = top + tall - side, tall - side - 3 * unit
            for i, (icon, value) in enumerate(zip(block.icons, block.values, strict=True)):
                x = self.width * (i + 0.5) / len(block.icons)
                high = room * value / max(block.values)
                draw.rectangle((x - 9 * unit, floor - high, x + 9 * unit, floor), fill=COLOURS[self.accent])
                icons.append((icon, x, floor + side / 2, side))
        else:
            row = tall / len(block.icons)
            for i, icon in enumerate(block.icons):
                y = top + (i + 0.5) * row
                icons.append((icon, 5 * unit + row / 2, y, row * 0.9))
                font = _font(max(7, round(min(row * 0.5, 13 * unit))))
                draw.text((10 * unit + row, y), block.texts[i], fill=_INK, font=font, anchor="lm")
                draw.text((self.width - 6 * unit, y), str(block.values[i]), fill=_INK, font=font, anchor="rm")
                draw.line((4 * unit, top + i * row, self.width - 4 * unit, top + i * row), fill=(200, 200, 205))
        canvas = np.asarray(image).copy()
        for (style, key), x, y, side in icons:
            _paste(canvas, sprite(style, key, max(6, round(side / 2) * 2)), x, y)
        return canvas
