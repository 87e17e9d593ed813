"""What can be found: an instance with its words, and its picture for the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from PIL import Image

from ..emoji_world.scenes import Film, Page, Scene
from ..media import MediaBudget, load_image, load_video
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
    if "image" in item.instance:
        return webp([load_image(_larger(item.instance["image"], edge))], edge=edge)
    if "video" in item.instance:
        budget = MediaBudget(fps=4.0, max_frames=16)
        frames, times = load_video(_larger(item.instance["video"], edge), budget)
        frames = frames[len(frames) // 2 :][:1] if still else frames
        return webp(frames, seconds=frame_seconds(times), edge=edge)
    return None


@lru_cache(maxsize=64)
def model_view(item: Item) -> bytes | None:
    """The pixels that the models get as a lossless WebP, so that an item can be a query; None for a text."""
    if "image" in item.instance:
        return webp([load_image(item.instance["image"])], lossless=True)
    if "video" in item.instance:
        frames, times = load_video(item.instance["video"], MediaBudget(fps=2.0, max_frames=16))
        return webp(frames, seconds=frame_seconds(times), lossless=True)
    return None


def _larger(value: Any, edge: int) -> Any:
    """A drawing of Emoji World drawn at `edge` pixels instead of its own; anything else as it is."""
    if isinstance(value, Film):
        return replace(value, pixels=edge, fps=4.0)
    if isinstance(value, Scene):
        return replace(value, pixels=edge)
    if isinstance(value, Page):
        return replace(value, width=round(edge * value.width / value.height), height=edge)
    return value


def frame_seconds(times: Sequence[float]) -> float:
    """Seconds between two frames of a clip, from the mean times of its frame pairs (media.load_video)."""
    return (times[-1] - times[0]) / (2 * len(times) - 2) if len(times) > 1 else 0.5


def webp(frames: Any, *, seconds: float = 0.5, edge: int | None = None, lossless: bool = False) -> bytes:
    """Frames (T, H, W, 3) as one WebP file, endless if there are several; none larger than `edge` pixels a side."""
    pictures = [Image.fromarray(frame) for frame in frames]
    if edge is not None:
        for picture in pictures:
            picture.thumbnail((edge, edge))
    buffer = io.BytesIO()
    moving = dict(save_all=True, append_images=pictures[1:], duration=round(1000 * seconds), loop=0)
    # exact: transparent or not, every pixel as it is. method 0: as small as is quick
    pictures[0].save(buffer, "WEBP", lossless=lossless, exact=lossless, method=0, **(moving if pictures[1:] else {}))
    return buffer.getvalue()
