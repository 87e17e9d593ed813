"""Pictures and videos: reading, sampling, fitting to a token budget, and the layout that the vision tower takes.

One visual token covers 32 x 32 pixels: of an image, or of a pair of a video's frames. Pixels are what the
checkpoint's own image and video processors make of them (tests/test_media.py), at a fraction of their time. A visual
whose features are known already is not drawn, decoded or resized again.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_smart_resize

from .records import Clip, is_empty
from .vision import patchify

EDGE = 32  # pixels of a visual token's edge: patch 16, merge 2
PIXELS = EDGE * EDGE
PAIR_OVERHEAD = 12  # tokens that the prompt adds to each frame pair: its time, vision_start and vision_end
TEXT_ROOM = 256  # tokens of a prompt that visuals never take
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tiff", ".tif")
VIDEO_FILES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# What is opened, whatever a file is called: no format that starts another program (EPS) or names other files
# (playlists), and nothing that FFmpeg would draw from words.
IMAGE_FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS",
)  # fmt: skip
VIDEO_FORMATS = (
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "apng", "webp_pipe",
    "h264", "hevc", "av1", "ivf", "m4v", "dv", "mxf", "mjpeg", "jpeg_pipe",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # of a picture, 256 MB as RGB: where Pillow begins to warn of decompression bombs
MAX_VIDEO_PIXELS = 2**30  # of all sampled frames together, 3 GB: 64 frames of 4096 x 4096


@dataclass(frozen=True)
class MediaBudget:
    """How large a visual may get, in visual tokens, and how densely a video is sampled.

    A picture below the minimum is enlarged, one above the maximum made smaller, keeping its aspect ratio up to
    multiples of 32 pixels. A video's limits hold for all of its frame pairs together. The defaults are the released
    code's for images, and the report's training budget for videos (1 fps, 64 frames, 4500 tokens).
    """

    image_min_tokens: int = 4
    image_max_tokens: int = 1800
    video_min_tokens: int = 4
    video_max_tokens: int = 4500
    fps: float = 1.0
    min_frames: int = 2
    max_frames: int = 64

    def __post_init__(self):
        for kind in ("image", "video"):
            low, high = getattr(self, f"{kind}_min_tokens"), getattr(self, f"{kind}_max_tokens")
            if not 1 <= low <= high:
                raise ValueError(f"{kind} tokens {low} to {high}; expected 1 <= minimum <= maximum")
        if not self.fps > 0 or not 1 <= self.min_frames <= self.max_frames or self.max_frames < 2:
            raise ValueError(
                f"fps {self.fps}, frames {self.min_frames} to {self.max_frames}; expected fps > 0, "
                "1 <= min_frames <= max_frames and max_frames >= 2"
            )

    def shared(self, images: int, videos: int, max_length: int) -> "MediaBudget":
        """The budget of each visual where several share one prompt of `max_length` tokens.

        Unchanged while the maxima fit together, less TEXT_ROOM tokens for words; else all maxima shrink by one
        factor, never below one token.
        """
        pairs = videos * ((self.max_frames + 1) // 2)
        room = max_length - TEXT_ROOM - PAIR_OVERHEAD * pairs - 2 * images
        wanted = images * self.image_max_tokens + videos * self.video_max_tokens
        if wanted <= room:
            return self
        factor = max(room, 0) / wanted
        image_max = max(1, int(self.image_max_tokens * factor)) if images else self.image_max_tokens
        video_max = max(1, int(self.video_max_tokens * factor)) if videos else self.video_max_tokens
        return replace(
            self,
            image_min_tokens=min(self.image_min_tokens, image_max),
            image_max_tokens=image_max,
            video_min_tokens=min(self.video_min_tokens, video_max),
            video_max_tokens=video_max,
        )


@dataclass(frozen=True, eq=False)
class Visual:
    """A measured image or video.

    grid_thw: frame pairs (1 for an image), height and width in patches of 16 pixels. timestamps: seconds, one a
    frame pair; None for an image. key: equal for equal visuals under equal budgets, to look features up.
    pixel_values: float32 (t * h * w, 1536) in the layout of Qwen3-VL's processor; None where features are known.
    """

    kind: str
    grid_thw: tuple[int, int, int]
    timestamps: tuple[float, ...] | None
    key: Hashable
    pixel_values: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Visual tokens: a quarter of the patches."""
        t, h, w = self.grid_thw
        return t * h * w // 4


def prepare(
    value: Any,
    kind: str,
    budget: MediaBudget,
    processor: Any,
    known: Callable[[Hashable], Visual | None] = lambda key: None,
    where: str = "item",
) -> Visual:
    """Measure one image or video, and lay its pixels out unless `known(key)` has it.

    The key comes from the object itself if it is hashable and has `.render()`, from path, time and size of a file,
    and from a hash of bytes or of decoded pixels otherwise. So a known drawing is not drawn and a known file not
    opened.

    Args:
        value: an image (PIL, array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), path, bytes of a file, or an object
            with `.render() -> PIL.Image`) or a video (path, bytes of a file, frames as a list of images or an array
            (T, H, W, 3), Clip, or an object with `.render() -> Clip`). A list of frames counts as sampled already.
        kind: "image" or "video".
        processor: the checkpoint's Qwen3VLProcessor. where: what errors call the value, e.g. "item 17, image 0".

    Raises:
        ValueError: starting with `where`, with what was given and what to do. URLs are never fetched.

    Taught in notebooks/02.
    """
    if kind not in ("image", "video"):
        raise ValueError(f'{where}: kind {kind!r}; expected "image" or "video"')
    identity = _cheap_identity(value, where)
    if identity is not None and (visual := known((kind, identity, budget))) is not None:
        return visual
    _require_geometry(processor.image_processor if kind == "image" else processor.video_processor)
    if kind == "image":
        pixels, timestamps = load_image(value, where)[None], None  # (1, H, W, 3)
    else:
        pixels, timestamps = load_video(value, budget, where)  # (2 * pairs, H, W, 3)
    if identity is None:
        identity = _digest(pixels.tobytes(), repr((pixels.shape, timestamps)).encode())
        if (visual := known((kind, identity, budget))) is not None:
            return visual
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # (T, 3, H, W)
    frames = _fit(frames, kind, budget, where).float() / 255
    patches, grid = _patches(frames, kind)
    return Visual(kind, grid, timestamps, (kind, identity, budget), patches)


def _cheap_identity(value: Any, where: str) -> Hashable | None:
    """What tells a value from others without decoding it; None if only its pixels do."""
    if hasattr(value, "render"):
        try:
            hash(value)
        except TypeError:
            return None
        return value
    if isinstance(value, (str, Path)):
        stat = _existing_file(value, where).stat()
        return "file", os.path.abspath(value), stat.st_mtime_ns, stat.st_size
    if isinstance(value, (bytes, bytearray)):
        return _digest(value)
    return None


def _digest(*chunks: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def _require_geometry(processor: Any) -> None:
    found = {name: getattr(processor, name, None) for name in ("patch_size", "merge_size", "temporal_patch_size")}
    statistics = [*processor.image_mean, *processor.image_std]
    if found != {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2} or statistics != [0.5] * 6:
        raise ValueError(
            f"{type(processor).__name__} has {found}, mean {processor.image_mean} and std {processor.image_std}; "
            "expected 16, 2, 2 and 0.5 throughout; use the processor of a Qwen3-VL checkpoint"
        )


def _existing_file(path: str | Path, where: str) -> Path:
    if isinstance(path, str) and "://" in path[:12]:
        raise ValueError(f"{where}: {path!r} is an address, and nothing is fetched here; download it and give the path")
    if not os.path.isfile(path):
        raise ValueError(f"{where}: there is no file {str(path)!r}; check the path")
    return Path(path)


def load_image(value: Any, where: str = "image") -> np.ndarray:
    """Any image as uint8 (H, W, 3): upright by its EXIF tag, transparency over white, 16 bits cut to 8.

    Of a moving picture the first frame. Arrays are uint8, or floats in [0, 1]. Modes without a range of their own (I
    and F) hold values up to 1 (F alone), 255 or 65535; the least of these that they keep to is their white. See
    `prepare` for kinds and errors. Taught in notebooks/02.
    """
    value = _rendered(value, where)
    if isinstance(value, np.ndarray):
        return _array_image(value, where)
    if isinstance(value, (bytes, bytearray)):
        source, name = io.BytesIO(value), f"{len(value)} bytes"
    elif isinstance(value, (str, Path)):
        source = name = _existing_file(value, where)
    elif isinstance(value, Image.Image):
        source, name = None, f"{value.mode} image of {value.size[0]} x {value.size[1]}"
    else:
        raise ValueError(
            f"{where}: an image is a PIL image, an array, a path, bytes of a file or an object with render(), got "
            f"{type(value).__name__}"
        )
    try:
        return np.array(_rgb(value if source is None else _opened(source)))
    except Exception as error:  # a file may be made so that its decoder fails in any way
        raise ValueError(f"{where}: cannot read {name} as an image ({error}); replace the file or drop it") from error


def _rendered(value: Any, where: str) -> Any:
    if not hasattr(value, "render"):
        return value
    try:
        return value.render()
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


@cache
def _readable_formats() -> list[str]:
    """Those of IMAGE_FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _opened(source: Any) -> Image.Image:
    with warnings.catch_warnings():  # of many pixels, which are refused below, and of tags that are not read
        warnings.simplefilter("ignore")
        return Image.open(source, formats=_readable_formats())


def _rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, and at least 1 and at most {MAX_PIXELS} are read")
    if image.getexif().get(0x0112, 1) != 1:  # the orientation of the camera
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values without a range of their own as uint8, by the least usual white that none exceeds."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:  # also true for nan
        raise ValueError(f"values from {low} to {high}; bring them between 0 and 255")
    if values.dtype.kind == "f" and high <= 1:
        values = values * 255.0
    return (values // 256 if high > 255 else values.round()).astype(np.uint8)


def _array_image(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{where}: an image array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (0 <= array.min() and array.max() <= 1):  # also true for nan
            raise ValueError(f"{where}: a float image has values in [0, 1], got {array.min()} to {array.max()}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: an image array is uint8 or float, got {array.dtype}; convert it")
    if array.shape[2] == 4:
        return np.array(_rgb(Image.fromarray(array)))
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.array(array)


def load_video(value: Any, budget: MediaBudget, where: str = "video") -> tuple[np.ndarray, tuple[float, ...]]:
    """The sampled frames of any video, uint8 (2 * pairs, H, W, 3), and the time of each pair in seconds.

    budget.fps frames a second, spread evenly from the first to the last; an odd number is made even by repeating the
    last. A pair's time is the mean of its frames' times. See `prepare` for kinds and errors. Taught in notebooks/02.
    """
    value = _rendered(value, where)
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    if isinstance(value, Clip):
        fps, total, read = value.fps, len(value.frames), lambda wanted: value.frames[wanted]
    elif isinstance(value, (list, tuple)) and len(value) > 0:
        fps, total = budget.fps, len(value)
        read = lambda wanted: _same_sized([load_image(value[i], f"{where}, frame {i}") for i in wanted], where)  # noqa: E731
    elif isinstance(value, (bytes, bytearray, str, Path)):
        if not isinstance(value, (bytes, bytearray)):
            _existing_file(value, where)
        fps, total = _probe(value, where)
        read = lambda wanted: _decode(value, wanted, where)  # noqa: E731
    else:
        raise ValueError(
            f"{where}: a video is a path, bytes of a file, a list of frames, a Clip or an object with render(), got "
            f"{'an empty list' if isinstance(value, (list, tuple)) else type(value).__name__}"
        )
    indices = sample_frames(total, fps, budget)
    indices += indices[-1:] * (len(indices) % 2)
    times = [i / fps for i in indices]
    pairs = tuple((first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True))
    return read(indices), pairs


def sample_frames(total: int, fps: float, budget: MediaBudget) -> list[int]:
    """Which of `total` frames at `fps` a second to keep, evenly spread: the rule of Qwen3-VL's video processor.

    As many as budget.fps asks for, but at least min_frames, and at most max_frames and one token a frame pair.
    Taught in notebooks/02.
    """
    wanted = int(min(total / fps * budget.fps + 1e-6, budget.max_frames))
    wanted = min(max(wanted, budget.min_frames), budget.max_frames, 2 * budget.video_max_tokens, total)
    return np.linspace(0, total - 1, wanted).round().astype(int).tolist()


def _same_sized(frames: list[np.ndarray], where: str) -> np.ndarray:
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"{where}: frames of several sizes {sorted(sizes)[:3]}; resize them to one size")
    return np.stack(frames)


def open_video(source: Any) -> "av.container.InputContainer":
    """A path or bytes as a container of VIDEO_FORMATS; FFmpeg alone would follow playlists to other files and fetch."""
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else f"file:{source}"
    return av.open(file, options={"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": "file"})


def _unreadable(source: Any, error: Exception, where: str) -> ValueError:
    name = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else str(source)
    return ValueError(f"{where}: cannot read {name} as a video ({error}); convert it with ffmpeg or drop it")


def _probe(source: Any, where: str) -> tuple[float, int]:
    """Frames a second and their number, counted by packets: the header's count is often absent."""
    try:
        with open_video(source) as container:
            stream = container.streams.video[0]
            total = sum(1 for packet in container.demux(stream) if packet.size)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
    except Exception as error:  # a file may be made so that FFmpeg or PyAV fails in any way
        raise _unreadable(source, error, where) from error
    if total == 0 or not fps > 0:
        raise _unreadable(source, ValueError(f"{total} frames at {fps} a second"), where)
    return fps, total


def _decode(source: Any, wanted: Sequence[int], where: str) -> np.ndarray:
    """The frames at the sorted positions `wanted`, (T, H, W, 3); a video that ends early repeats its last frame."""
    frames: list[np.ndarray] = []
    last = None
    try:
        with open_video(source) as container:
            container.streams.video[0].thread_type = "AUTO"
            for i, frame in enumerate(container.decode(video=0)):
                last = frame
                if frame.width * frame.height * len(wanted) > MAX_VIDEO_PIXELS:
                    size = f"{len(wanted)} frames of {frame.width} x {frame.height}"
                    raise ValueError(f"{size} pixels, and at most {MAX_VIDEO_PIXELS} pixels in all are read")
                if i == wanted[len(frames)]:
                    picture = _upright(frame)
                    frames += [picture] * sum(j == i for j in wanted)
                if len(frames) == len(wanted):
                    break
            if len(frames) < len(wanted) and last is not None:
                frames += [_upright(last)] * (len(wanted) - len(frames))
    except Exception as error:  # a file may be made so that FFmpeg or PyAV fails in any way
        raise _unreadable(source, error, where) from error
    if not frames:
        raise _unreadable(source, ValueError("no frame can be decoded"), where)
    return _same_sized(frames, where)


def _upright(frame: "av.VideoFrame") -> np.ndarray:
    """A decoded frame as (H, W, 3), turned by the display matrix that phones write."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))


def fitted_size(
    frames: int, height: int, width: int, kind: str, budget: MediaBudget, where: str = "item"
) -> tuple[int, int]:
    """Height and width that a visual gets within the budget, multiples of 32: what the checkpoint's processor gives.

    frames: of a sampled video, an even number; 1 for an image. Raises ValueError for a shape that has no such size.
    """
    pairs = 1 if kind == "image" else frames // 2
    try:
        if kind == "image":
            limits = dict(min_pixels=budget.image_min_tokens * PIXELS, max_pixels=budget.image_max_tokens * PIXELS)
            size = image_smart_resize(height, width, factor=EDGE, **limits)
        else:
            limits = dict(min_pixels=budget.video_min_tokens * PIXELS, max_pixels=budget.video_max_tokens * PIXELS)
            limits = {name: 2 * pixels for name, pixels in limits.items()}  # of two frames
            size = video_smart_resize(frames, height, width, temporal_factor=2, factor=EDGE, **limits)
    except ValueError as error:
        raise ValueError(f"{where}: {width} x {height} pixels ({error}); crop it or add a border") from error
    limit = (budget.image_max_tokens if kind == "image" else budget.video_max_tokens) // pairs
    if size[0] * size[1] > limit * PIXELS:  # so long and thin that the processor's rounding overshoots
        return (EDGE, limit * EDGE) if height < width else (limit * EDGE, EDGE)
    return size


def _fit(frames: Tensor, kind: str, budget: MediaBudget, where: str) -> Tensor:
    """Frames (T, 3, H, W), uint8, at the size that they get within the budget."""
    n, _, height, width = frames.shape
    size = fitted_size(n, height, width, kind, budget, where)
    if size == (height, width):
        return frames
    return resize(frames, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _patches(frames: Tensor, kind: str) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (T, 3, H, W) in [0, 1] as patches (t * h * w, 1536) and their grid."""
    if kind == "image":
        patches, grid = patchify(frames)
        return patches, (1, *grid[0, 1:].tolist())
    patches, grid = patchify(frames, temporal=1)  # (T * h * w, 3 * 256)
    h, w = grid[0, 1:].tolist()
    pairs = len(frames) // 2
    patches = patches.view(pairs, 2, h * w, 3, -1).permute(0, 2, 3, 1, 4)  # a patch holds both frames of a channel
    return patches.reshape(pairs * h * w, -1), (pairs, h, w)


def as_list(value: Any, kind: str) -> list[Any]:
    """The images or videos of one field of an instance: none, one, or a list.

    A list of PIL images, arrays (H, W, ...) or paths of image files in a video field is one video, its frames.
    """
    if is_empty(value):
        return []
    if not isinstance(value, (list, tuple)):
        return [value]
    if kind == "video" and _is_frame(value[0]):
        return [value]
    return list(value)


def _is_frame(value: Any) -> bool:
    if isinstance(value, (str, Path)):
        return str(value).lower().endswith(IMAGE_FILES)
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim < 4)
