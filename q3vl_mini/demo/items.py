"""What can be found: an instance with its words, and its picture for the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ..emoji_world.scenes import Film, Page, Scene
from ..records import Instance

EDGE = 192  # pixels of a picture on the page
KINDS = ("picture", "scene", "clip", "page", "text")


@dataclass(frozen=True, eq=False)
class Item:
    """Something that a search can find.

    id: unique in its collection. kind: one of KINDS. title: what it shows, in words; it is also the picture's
    alternative text. instance: what the models get.
    """

    id: str
    kind: str
    title: str
    instance: Instance


@lru_cache(maxsize=4096)
def thumbnail(item: Item, edge: int = EDGE, still: bool = False) -> bytes | None:
    """A WebP picture for the page, at most `edge` pixels a side; None for a text. A clip moves, unless `still`."""
    if "text" in item.instance:
        return None
    frames, seconds = _frames(item.instance, 4.0, edge)
    return webp(frames[len(frames) // 2 :][:1] if still else frames, seconds, edge)


@lru_cache(maxsize=64)
def model_view(item: Item) -> bytes | None:
    """The pixels that the models get as a lossless WebP, so that an item can be a query; None for a text."""
    return None if "text" in item.instance else webp(*_frames(item.instance, 2.0), lossless=True)


def _frames(instance: Instance, fps: float, edge: int | None = None) -> tuple[Sequence[np.ndarray], float]:
    """Frames (H, W, 3) of a picture (one) or a clip (at `fps`, 16 at most), and the seconds between two.

    A drawing of Emoji World is drawn at `edge` pixels if that is given. It needs no media.py, whose imports take
    seconds: the gallery is on the page before.
    """
    [value] = instance.values()
    if hasattr(value, "render"):
        drawn = _resized(value, fps, edge).render()
        return ([np.asarray(drawn)], 0.0) if "image" in instance else (drawn.frames, 1 / drawn.fps)
    from ..media import MediaBudget, load_image, load_video

    if "image" in instance:
        return [load_image(value)], 0.0
    frames, times = load_video(value, MediaBudget(fps=fps, max_frames=16))
    return frames, frame_seconds(times)


def _resized(value: Any, fps: float, edge: int | None) -> Any:
    if isinstance(value, Film):
        return replace(value, pixels=edge or value.pixels, fps=fps)
    if isinstance(value, Scene):
        return replace(value, pixels=edge or value.pixels)
    if isinstance(value, Page) and edge is not None:
        return replace(value, width=round(edge * value.width / value.height), height=edge)
    return value


def frame_seconds(times: Sequence[float]) -> float:
    """Seconds between two frames of a clip, from the mean times of its frame pairs (media.load_video)."""
    return (times[-1] - times[0]) / (2 * len(times) - 2) if len(times) > 1 else 0.5


def webp(frames: Sequence[np.ndarray], seconds: float, edge: int | None = None, lossless: bool = False) -> bytes:
    """Frames (H, W, 3) as one WebP file, endless if there are several; none larger than `edge` pixels a side."""
    pictures = [Image.fromarray(frame) for frame in frames]
    if edge is not None:
        for picture in pictures:
            picture.thumbnail((edge, edge))
    buffer = io.BytesIO()
    moving = dict(save_all=True, append_images=pictures[1:], duration=round(1000 * seconds), loop=0)
    # method 0: less small, but quick
    pictures[0].save(buffer, "WEBP", lossless=lossless, method=0, **(moving if pictures[1:] else {}))
    return buffer.getvalue()
