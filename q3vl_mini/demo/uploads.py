"""Files of visitors: what they are is told by their content, and only their decoded pixels or words go on.

A name or an ending is never believed, a file is never kept as it came, and what is read is bounded in bytes, pixels
and frames.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence

from ..records import Clip, Instance
from .items import frame_seconds

MB = 2**20
IMAGE_BYTES, VIDEO_BYTES, TEXT_BYTES = 20 * MB, 50 * MB, 64 * 1024
IMAGE_PIXELS, VIDEO_PIXELS, VIDEO_SECONDS = 50_000_000, 1920 * 1200, 120
VIDEO_FRAMES = 60 * VIDEO_SECONDS  # whatever a file says of its length
MOVING_PIXELS = 2**28  # of all frames that are decoded of a moving picture, which takes seconds
ASPECT = 200  # times the shorter side; the models take nothing longer
TEXT_CHARACTERS = 2_000
QUERY_FILES = 4
EDGE = 1024  # pixels a side that are kept of a picture
CLIP_EDGE = 256
FPS, MAX_FRAMES = 2.0, 32
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOVING_FORMATS = ("PNG", "WEBP", "GIF")  # further pictures of others are pages, or what phones put into a JPEG (MPO)
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

    A moving picture (GIF, WebP, PNG) is a clip; of other files the first picture counts. Pictures are kept at up to
    EDGE pixels a side, clips at up to CLIP_EDGE, FPS frames a second and MAX_FRAMES frames.

    Raises:
        ValueError: fit to be shown to the visitor: names the file, says what is wrong and what to do.
    """
    path = Path(path)
    name = printable(path.name)[:80]
    upload = _read(path, name, printable(path.stem)[:80])
    height, width = _size(upload)
    if max(height, width) > ASPECT * min(height, width):
        raise ValueError(f"{name} is {width} x {height} pixels when it is made smaller, too long and thin; crop it")
    return upload


def _size(upload: Upload) -> tuple[int, int]:
    """Height and width of what is kept of a picture or clip; of a text those of a square."""
    if upload.kind == "text":
        return 1, 1
    if upload.kind == "picture":
        return upload.instance["image"].size[::-1]
    return upload.instance["video"].frames.shape[1:3]


def _read(path: Path, name: str, title: str) -> Upload:
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
        moves = image.format in MOVING_FORMATS and getattr(image, "is_animated", False)
        if image.width * image.height > (VIDEO_PIXELS if moves else IMAGE_PIXELS):
            raise ValueError(f"{name} has {image.width} x {image.height} pixels; make it smaller")
        try:
            if moves:
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
    """A moving picture as a clip, of a long or large one its beginning. A frame that stays counts as several."""
    frames, seconds, size, decoded = [], 0.0, None, 0
    for shown in ImageSequence.Iterator(image):  # to count its frames first, Pillow would read them all
        if shown.width * shown.height > VIDEO_PIXELS:  # a later frame of a GIF may be larger
            raise ValueError(f"a frame of {shown.width} x {shown.height} pixels")
        shown.load()
        decoded += shown.width * shown.height
        until = seconds + max(shown.info.get("duration", 100), 20) / 1000
        if len(frames) / FPS < until:
            frame = _shrunk(shown.convert("RGBA"), CLIP_EDGE)
            size = size or frame.size
            wanted = int(np.ceil(until * FPS - 1e-6)) - len(frames)
            frames += [np.asarray(frame if frame.size == size else frame.resize(size))] * wanted
        seconds = until
        if len(frames) >= MAX_FRAMES or decoded > MOVING_PIXELS:
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
            frames = sum(packet.size > 0 for packet in islice(container.demux(stream), VIDEO_FRAMES + 1))
    except Exception as error:  # as above
        raise ValueError(damaged) from error
    if width * height > VIDEO_PIXELS or seconds > VIDEO_SECONDS or frames > VIDEO_FRAMES:
        told = f"{width} x {height} pixels, {seconds:.0f} s and {'many' if frames > VIDEO_FRAMES else frames} frames"
        most = f"full HD, {VIDEO_SECONDS} s and {VIDEO_FRAMES} frames"
        raise ValueError(f"{name} has {told}; a clip may have {most}: make it smaller")
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
