"""Files of visitors: what they are is told by their content, and only their decoded pixels or words go on.

A name or an ending is never believed, a file is never kept as it came, and what is read is bounded in bytes, pixels
and frames.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from ..records import Clip, Instance
from .items import frame_seconds

MB = 2**20
IMAGE_BYTES, VIDEO_BYTES, TEXT_BYTES = 20 * MB, 50 * MB, 64 * 1024
IMAGE_PIXELS, VIDEO_PIXELS, VIDEO_SECONDS = 50_000_000, 1920 * 1200, 120
TEXT_CHARACTERS = 2_000
QUERY_FILES = 4
EDGE = 1024  # pixels a side that are kept of a picture
CLIP_EDGE = 256
FPS, MAX_FRAMES = 2.0, 32
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
VIDEO_SIGNATURES = ((4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "))  # MP4 and MOV, Matroska and WebM, AVI
ACCEPTED = "a picture (PNG, JPEG, WebP, GIF, BMP, TIFF), a clip (MP4, MOV, WebM, MKV, AVI) or a text in UTF-8"


@dataclass(frozen=True)
class Upload:
    """What a file holds. kind: "picture", "clip" or "text". title: the file's name without its folder and ending."""

    kind: str
    title: str
    instance: Instance


def read_upload(path: str | Path) -> Upload:
    """A file as pixels or words.

    A moving picture (GIF, WebP) is a clip. Pictures are kept at up to EDGE pixels a side, clips at up to CLIP_EDGE, FPS
    frames a second and MAX_FRAMES frames.

    Raises:
        ValueError: fit to be shown to the visitor: names the file, says what is wrong and what to do.
    """
    path = Path(path)
    name, title = printable(path.name)[:80], printable(path.stem)[:80]
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{name} is empty; choose another file")
    with path.open("rb") as file:
        start = file.read(16)
    if any(start[at : at + len(mark)] == mark for at, mark in VIDEO_SIGNATURES):
        _require_size(name, size, VIDEO_BYTES, "a clip")
        return Upload("clip", title, {"video": _read_clip(path, name)})
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; make it smaller") from error
    except OSError:  # no picture
        return Upload("text", title, {"text": _read_text(path, name, size)})
    with image:
        _require_size(name, size, IMAGE_BYTES, "a picture")
        if image.width * image.height > IMAGE_PIXELS:
            raise ValueError(f"{name} has {image.width} x {image.height} pixels; make it smaller")
        try:
            if getattr(image, "n_frames", 1) > 1:
                return Upload("clip", title, {"video": _moving(image)})
            image.load()  # here, where its formats are few
            return Upload("picture", title, {"image": _shrunk(image, EDGE)})
        except Exception as error:  # a file may be made so that its decoder fails in any way
            raise ValueError(f"{name} is damaged or not a real picture; open and save it again, or drop it") from error


def read_query(text: str | None, files: Sequence[str | Path]) -> Instance:
    """Words and files of a search box as one instance. ValueError as `read_upload`, for nothing, and for too much."""
    if len(files) > QUERY_FILES:
        raise ValueError(f"{len(files)} files are more than a query may have; take {QUERY_FILES} at most")
    instance: dict[str, list] = {}
    texts = [text.strip()[:TEXT_CHARACTERS]] if text and text.strip() else []
    for upload in map(read_upload, files):
        for kind, value in upload.instance.items():
            instance.setdefault(kind, []).append(value)
    texts += instance.pop("text", [])
    if texts:
        instance["text"] = texts
    if not instance:
        raise ValueError("type some words or add a picture or a clip")
    return instance


def printable(name: str) -> str:
    """A name without control characters and halves of characters."""
    return "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Cs"))


def _require_size(name: str, size: int, limit: int, what: str) -> None:
    if size > limit:
        raise ValueError(f"{name} has {size / MB:.1f} MB; {what} may have {limit / MB:.0f} MB: make it smaller")


def _shrunk(image: Image.Image, edge: int) -> Image.Image:
    """The picture upright, as RGB over white, at most `edge` pixels a side."""
    from ..media import load_image  # here and below, because its imports take seconds: the page does not wait for them

    image = Image.fromarray(load_image(ImageOps.exif_transpose(image)))
    image.thumbnail((edge, edge))
    return image


def _moving(image: Image.Image) -> Clip:
    """A moving picture as a clip. A frame that stays longer than others counts as several."""
    frames, seconds, size = [], 0.0, None
    for number in range(image.n_frames):
        image.seek(number)
        image.load()
        until = seconds + max(image.info.get("duration", 100), 20) / 1000
        if len(frames) / FPS < until:
            frame = _shrunk(image.convert("RGBA"), CLIP_EDGE)
            size = size or frame.size
            wanted = int(np.ceil(until * FPS - 1e-6)) - len(frames)
            frames += [np.asarray(frame if frame.size == size else frame.resize(size))] * wanted
        seconds = until
        if len(frames) >= MAX_FRAMES:
            break
    return Clip(np.stack(frames[:MAX_FRAMES]), FPS)


def _read_clip(path: Path, name: str) -> Clip:
    from ..media import MediaBudget, load_video, open_video

    content, damaged = path.read_bytes(), f"{name} is damaged or has no pictures; convert it to MP4, or drop it"
    try:
        with open_video(content) as container:
            stream = container.streams.video[0]
            width, height = stream.width or 0, stream.height or 0
            seconds = (container.duration or 0) / av.time_base
    except Exception as error:  # as above
        raise ValueError(damaged) from error
    if width * height > VIDEO_PIXELS or seconds > VIDEO_SECONDS:
        told = f"{width} x {height} pixels and {seconds:.0f} s"
        raise ValueError(f"{name} has {told}; a clip may have full HD and {VIDEO_SECONDS} s: make it smaller")
    try:
        frames, times = load_video(content, MediaBudget(fps=FPS, max_frames=MAX_FRAMES))
    except ValueError as error:
        raise ValueError(damaged) from error
    small = [np.asarray(_shrunk(Image.fromarray(frame), CLIP_EDGE)) for frame in frames]
    return Clip(np.stack(small), 1 / max(frame_seconds(times), 0.02))


def _read_text(path: Path, name: str, size: int) -> str:
    refused = ValueError(f"{name} is none of what can be read: {ACCEPTED}")
    if size > TEXT_BYTES:
        raise ValueError(f"{refused} of up to {TEXT_BYTES // 1024} kB")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise refused from None
    if not text or any(ord(c) < 32 and c not in "\t\n\r\f" for c in text):
        raise refused
    return text[:TEXT_CHARACTERS]
