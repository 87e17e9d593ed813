"""The first filter of synthesis: which pictures and clips of a seed pool are worth an annotator's time (report, 3).

Pictures by their size and shape; clips also by their length, by cuts between scenes, and by how long nothing moves. The
report names these criteria and no thresholds: the numbers here are this project's choice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from .media import load_image, open_video
from .records import Clip, Rejected

LOOKS = 4.0  # frames a second at which a clip is looked at
THUMBNAIL = 32  # pixels of a side: what changes at this size is a scene, not grain


@dataclass(frozen=True)
class Quality:
    """What is kept.

    min_side: pixels of the shorter side. max_aspect: longer side over shorter. min_seconds: of a clip. max_cuts:
    scene cuts in a clip that shall show one scene. cut: a change of all pixels, on average and as a share of the range,
    that counts as a cut. still: a change that counts as none. max_still: share of a clip in which nothing changes.
    """

    min_side: int = 224
    max_aspect: float = 3.0
    min_seconds: float = 2.0
    max_cuts: int = 0
    cut: float = 0.2
    still: float = 0.002
    max_still: float = 0.9


def check_image(value: Any, quality: Quality) -> dict[str, Any]:
    """Width and height of any image that media.load_image reads; Rejected with the reason if it is not kept."""
    try:
        height, width = load_image(value).shape[:2]
    except ValueError as error:
        raise Rejected("unreadable", str(error)) from error
    _check_shape(width, height, quality)
    return {"width": width, "height": height}


def _check_shape(width: int, height: int, quality: Quality) -> None:
    short, long = sorted((width, height))
    if long > quality.max_aspect * short:
        raise Rejected("too long and thin", f"{width} x {height} pixels")
    if short < quality.min_side:
        raise Rejected("too small", f"{width} x {height} pixels")


def check_video(value: Any, quality: Quality, one_scene: bool = True) -> dict[str, Any]:
    """Width, height, seconds, cuts and still share of a clip; Rejected with the reason if it is not kept.

    value: a path, bytes of a file, a Clip, or an object that renders one. one_scene: whether cuts count against it.
    """
    times, looks = [], []
    for time, frame in sampled(value, LOOKS):
        times.append(time)
        looks.append(frame.to_ndarray(format="rgb24", width=THUMBNAIL, height=THUMBNAIL))
    if not times:
        raise Rejected("unreadable", "no frame")
    width, height, seconds = frame.width, frame.height, times[-1] + 1 / LOOKS
    _check_shape(width, height, quality)
    if len(times) < 2 or seconds < quality.min_seconds:
        raise Rejected("too short", f"{seconds:.1f} seconds")
    changes = changes_between(np.stack(looks))
    cuts, still = int((changes > quality.cut).sum()), float((changes < quality.still).mean())
    if still > quality.max_still:
        raise Rejected("nothing moves", f"still for a share of {still:.2f}")
    if one_scene and cuts > quality.max_cuts:
        raise Rejected("several scenes", f"{cuts} cuts")
    return {"width": width, "height": height, "seconds": seconds, "cuts": cuts, "still": still}


def changes_between(frames: np.ndarray) -> np.ndarray:
    """The mean absolute change from each frame (T, H, W, 3), uint8, to the next, as a share of the range: (T - 1,)."""
    return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3)) / 255


def sampled(
    value: Any, fps: float, start: float = 0.0, end: float = math.inf
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time in seconds, frame) of a video from `start` to before `end`, at most `fps` a second; memory holds one.

    Raises:
        Rejected: "unreadable".
    """
    due = start
    for time, frame in _decoded(value):
        if time >= end:
            return
        if time >= due - 1e-6:
            due = max(due + 1 / fps, time)
            yield time, frame


def _decoded(value: Any) -> Iterator[tuple[float, av.VideoFrame]]:
    if hasattr(value, "render"):
        value = value.render()
    if isinstance(value, Clip):
        for i, frame in enumerate(value.frames):
            yield i / value.fps, av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return
    try:
        with open_video(value) as container:
            rate = float(container.streams.video[0].average_rate or 1)
            for i, frame in enumerate(container.decode(video=0)):
                yield (i / rate if frame.time is None else frame.time), frame
    except Exception as error:  # a file may be made so that FFmpeg or PyAV fails in any way
        raise Rejected("unreadable", str(error)) from error
