"""media.py: what is read, how it is sampled and fitted, against the checkpoint's own processors."""

import io
import re
import struct
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from q3vl_mini import media
from q3vl_mini.media import MediaBudget, Visual, load_image, load_video, prepare
from q3vl_mini.records import Clip

BUDGET = MediaBudget()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture in which a wrong order of patches or channels shows, without the ringing of noise."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return (np.stack([y, x, (x + y) / 2], axis=-1) * 255).astype(np.uint8)


def by_processor(processor, pixels: np.ndarray, budget: MediaBudget):
    size = {"shortest_edge": budget.image_min_tokens * 1024, "longest_edge": budget.image_max_tokens * 1024}
    return processor.image_processor(Image.fromarray(pixels), size=size, return_tensors="pt")


def video_by_processor(processor, frames: np.ndarray, indices: list[int], fps: float, budget: MediaBudget):
    size = {"shortest_edge": budget.video_min_tokens * 2048, "longest_edge": budget.video_max_tokens * 2048}
    metadata = [{"fps": fps, "total_num_frames": len(frames), "frames_indices": list(indices)}]
    return processor.video_processor(
        [torch.from_numpy(frames[indices]).permute(0, 3, 1, 2)],
        size=size,
        video_metadata=metadata,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )


def write_video(target, frames: np.ndarray, fps: int, format: str = "mp4") -> None:
    with av.open(target, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def counting_frames(n: int, size: int = 64) -> np.ndarray:
    """Frame i is grey of brightness 10 * i, so that a decoded frame tells its number."""
    return np.stack([np.full((size, size, 3), 10 * i, np.uint8) for i in range(n)])


@dataclass(frozen=True)
class Drawing:
    """A hashable drawable; drawing it counts."""

    size: int
    drawn: list = None

    def __hash__(self):
        return hash(self.size)

    def __eq__(self, other):
        return isinstance(other, Drawing) and self.size == other.size

    def render(self):
        if self.drawn is not None:
            self.drawn.append(1)
        return Image.fromarray(smooth(self.size, self.size))


# --- images ---


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (256, 32)])
def test_an_image_of_legal_size_has_the_processors_pixel_values(processor, size):
    pixels = noise(*size, 3)
    ours, theirs = prepare(pixels, "image", BUDGET, processor), by_processor(processor, pixels, BUDGET)
    assert ours.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert (ours.pixel_values - theirs["pixel_values"]).abs().max() < 1e-6
    mirrored = prepare(np.ascontiguousarray(pixels[:, ::-1]), "image", BUDGET, processor)
    assert (mirrored.pixel_values - theirs["pixel_values"]).abs().max() > 0.1  # the comparison would see it


@pytest.mark.parametrize("size", [(40, 40), (100, 77), (333, 500), (20, 700), (64, 65)])
def test_an_image_of_any_size_is_resized_as_the_processor_does(processor, size):
    budget = MediaBudget(image_max_tokens=60)
    pixels = smooth(*size)
    ours, theirs = prepare(pixels, "image", budget, processor), by_processor(processor, pixels, budget)
    assert ours.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert (ours.pixel_values - theirs["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize("limits", [(4, 4), (4, 16), (1, 50), (30, 1800)])
def test_every_image_keeps_its_budget(processor, limits):
    budget = MediaBudget(image_min_tokens=limits[0], image_max_tokens=limits[1])
    for size in [(1, 1), (8, 8), (64, 64), (31, 900), (10, 1000), (1500, 20), (700, 800)]:
        n_tokens = prepare(smooth(*size), "image", budget, processor).n_tokens
        assert n_tokens <= limits[1], size
        # the processor rounds down to multiples of 32 where the budget is tight; else the minimum holds
        assert n_tokens >= min(limits[0], limits[1] // 2), size


@pytest.mark.parametrize(("width", "height"), [(2000, 5), (1, 10_000)])
def test_an_aspect_ratio_beyond_200_names_item_and_remedy(processor, width, height):
    with pytest.raises(ValueError, match=rf"item 17, image 0: {width} x {height} pixels .*crop it or add a border"):
        prepare(smooth(height, width), "image", BUDGET, processor, where="item 17, image 0")


def test_an_image_is_the_same_from_pil_array_path_bytes_and_drawing(tmp_path):
    pixels = smooth(64, 64)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for value in (
        Image.fromarray(pixels),
        pixels,
        pixels / 255.0,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        (tmp_path / "a.png").read_bytes(),
        Drawing(64),
    ):
        np.testing.assert_array_equal(load_image(value), pixels)


def test_transparency_lies_over_white_in_every_mode_that_has_it():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.info["transparency"] = 0
    for image in (rgba, grey, palette, np.array(rgba)):
        assert load_image(image)[3, 3].tolist() == [255, 255, 255]
    assert load_image(rgba)[0, 0].tolist() == [255, 0, 0]
    assert np.array(rgba.convert("RGB"))[3, 3].tolist() == [255, 0, 0]  # what a bare convert makes of it


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "F", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    white = {"I;16": 65535, "I": 65535, "F": 255.0, "1": 1, "L": 255, "P": 0}.get(mode)
    if white is None:
        image = Image.new("RGB", (4, 4), "white").convert(mode)
    else:
        image = Image.new(mode, (4, 4), white)
    if mode == "P":
        image.putpalette([255, 255, 255])
    pixels = load_image(image)
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
    assert pixels.min() >= 250


def test_a_photograph_is_turned_upright_by_its_exif_tag(tmp_path):
    pixels = smooth(32, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_values_without_a_range_of_their_own_keep_their_brightness():
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.int32), (4, 1))  # white is 255
    for values in (grey, grey * 257, grey.astype(np.float32), grey / np.float32(255), (grey * 257).astype(np.float32)):
        pixels = load_image(Image.fromarray(values))[..., 0].astype(int)
        assert np.abs(pixels - grey).max() <= 1, (values.dtype, values.max())
    for wrong in (-1, 70_000, np.nan, np.inf):
        with pytest.raises(ValueError, match="item 3: .*values from .*bring them between 0 and 255"):
            load_image(Image.fromarray(np.full((4, 4), wrong, np.float32)), "item 3")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_files_of_every_kind_show_the_colours_that_they_were_saved_with():
    picture = Image.fromarray(smooth(40, 60))
    sixteen = np.tile(np.linspace(0, 65535, 60).astype(np.uint16), (40, 1))
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    for content, expected, off in [
        (saved(picture, "PNG"), np.asarray(picture), 0),
        (saved(picture.convert("CMYK"), "JPEG", quality=95), np.asarray(picture), 4),
        (saved(picture.quantize(256), "GIF"), np.asarray(picture), 12),
        (saved(Image.fromarray(sixteen), "PNG"), np.repeat(sixteen[..., None] // 256, 3, axis=2), 0),
        (saved(Image.fromarray(sixteen), "TIFF"), np.repeat(sixteen[..., None] // 256, 3, axis=2), 0),
        (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.asarray(frames[0]), 0),
        (saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), np.asarray(frames[0]), 0),
    ]:
        difference = load_image(content).astype(int) - expected.astype(int)
        assert np.abs(difference).mean() <= off and np.abs(difference).mean(axis=(0, 1)).max() <= 2 * off


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8))


@pytest.mark.parametrize(
    "image, message",
    [
        (b"", "cannot identify"),
        (saved(NOISE, "PNG")[:4000], "truncated"),
        (saved(NOISE, "JPEG")[:2000], "truncated"),
        (Image.new("RGB", (0, 9)), "0 x 9 pixels, and at least 1"),
        (Image.new("1", (30_000, 3_000)), "30000 x 3000 pixels, .* at most 89478485 are read"),
        (saved(Image.new("1", (30_000, 3_000)), "PNG"), "30000 x 3000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "cannot identify"),
    ],
    ids=["empty", "PNG cut off", "JPEG cut off", "no pixels", "bomb", "bomb file", "EPS", "SVG"],
)
def test_what_must_not_be_opened_is_named(image, message):
    with pytest.raises(ValueError, match=f"item 3: cannot read .*{message}.*replace the file or drop it"):
        load_image(image, "item 3")


def test_a_drawing_that_fails_is_named(processor):
    class Broken:
        def render(self):
            raise FileNotFoundError("there is no file 'm.pdf'")

    with pytest.raises(ValueError, match="item 3, image 0: there is no file 'm.pdf'"):
        prepare(Broken(), "image", BUDGET, processor, where="item 3, image 0")


@pytest.mark.parametrize(
    "value, message",
    [
        ("https://example.org/cat.png", "nothing is fetched here; download it"),
        ("nowhere.png", "there is no file 'nowhere.png'; check the path"),
        (b"not a picture", "cannot read 13 bytes as an image .*replace the file or drop it"),
        (np.zeros((3, 64, 64), np.uint8), r"an image array is .*got \(3, 64, 64\)"),
        (np.full((4, 4, 3), 7.0), r"a float image has values in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "uint8 or float, got int64"),
        (7, "got int"),
    ],
)
def test_what_is_no_image_is_named_with_the_remedy(processor, value, message):
    with pytest.raises(ValueError, match="item 3, image 1: .*" + message):
        prepare(value, "image", BUDGET, processor, where="item 3, image 1")


def test_a_processor_with_another_geometry_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "patch_size", 14)
    with pytest.raises(ValueError, match="'patch_size': 14.*use the processor of a Qwen3-VL checkpoint"):
        prepare(smooth(64, 64), "image", BUDGET, processor)


# --- videos ---


@pytest.mark.parametrize("n, size", [(4, (64, 64)), (6, (96, 64)), (5, (64, 64)), (4, (70, 90))])
def test_a_video_has_the_processors_pixel_values(processor, n, size):
    frames = np.stack([np.roll(smooth(*size), 7 * i, axis=1) for i in range(n)])
    ours = prepare(Clip(frames, fps=1.0), "video", BUDGET, processor)
    theirs = video_by_processor(processor, frames, list(range(n)), 1.0, BUDGET)
    assert ours.grid_thw == tuple(theirs["video_grid_thw"][0].tolist())
    assert (ours.pixel_values - theirs["pixel_values_videos"]).abs().max() < 1e-5
    swapped = prepare(Clip(frames[::-1].copy(), fps=1.0), "video", BUDGET, processor)
    assert (swapped.pixel_values - theirs["pixel_values_videos"]).abs().max() > 0.1  # order of time shows


def test_a_video_of_one_frame_is_a_pair_of_it(processor):
    one, two = (prepare(Clip(np.stack([smooth(64, 64)] * n), 1.0), "video", BUDGET, processor) for n in (1, 2))
    assert one.grid_thw == (1, 4, 4) and one.timestamps == (0.0,)  # the processor refuses it
    assert torch.equal(one.pixel_values, two.pixel_values)


@pytest.mark.parametrize("total, fps, rate", [(80, 8.0, 1.0), (300, 30.0, 1.0), (16, 8.0, 4.0), (1000, 10.0, 2.0)])
def test_frames_are_sampled_as_the_video_processor_samples(processor, monkeypatch, total, fps, rate):
    monkeypatch.setattr(processor.video_processor, "min_frames", 2)
    monkeypatch.setattr(processor.video_processor, "max_frames", 64)
    theirs = processor.video_processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), fps=rate)
    assert media.sample_frames(total, fps, MediaBudget(fps=rate)) == theirs.tolist()


def test_sampling_keeps_its_limits():
    assert len(media.sample_frames(100_000, 25.0, BUDGET)) == 64
    assert media.sample_frames(100, 100.0, BUDGET) == [0, 99]  # one second: still two frames
    assert media.sample_frames(1, 25.0, BUDGET) == [0]
    assert media.sample_frames(3, 0.3, MediaBudget(fps=0.3)) == [0, 1, 2]  # 3 / 0.3 * 0.3 is below 3 in floats


def test_times_of_frame_pairs_are_the_processors(processor):
    clip = Clip(counting_frames(20), fps=4.0)
    frames, times = load_video(clip, MediaBudget(fps=1.0))
    indices = media.sample_frames(20, 4.0, MediaBudget(fps=1.0))
    assert len(indices) == 5  # odd: the last frame is repeated
    assert times == pytest.approx(processor._calculate_timestamps(list(indices), 4.0))
    np.testing.assert_array_equal(frames[:, 0, 0, 0] // 10, [*indices, indices[-1]])


@pytest.mark.parametrize("tokens", [4, 40, 4500])
def test_every_video_keeps_its_budget_over_all_frame_pairs(processor, tokens):
    budget = MediaBudget(video_max_tokens=tokens, fps=1.0)
    for n, size in [(2, (300, 400)), (64, (64, 64)), (7, (200, 60)), (64, (12, 640)), (1, (1000, 1000))]:
        visual = prepare(Clip(np.zeros((n, *size, 3), np.uint8), 1.0), "video", budget, processor)
        assert visual.n_tokens <= tokens, (n, size)
        assert len(visual.timestamps) == visual.grid_thw[0]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_file_is_decoded_at_the_sampled_frames(tmp_path, container):
    path = tmp_path / "video.bin"
    write_video(str(path), counting_frames(24), fps=8, format=container)
    for value in (path, str(path), path.read_bytes()):
        frames, times = load_video(value, MediaBudget(fps=2.0))
        assert np.abs(frames.mean(axis=(1, 2, 3)) / 10 - media.sample_frames(24, 8.0, MediaBudget(fps=2.0))).max() < 0.5
        assert times == pytest.approx([2.5 / 8, 11.5 / 8, 20.5 / 8], abs=0.07)


def test_a_video_of_a_turned_phone_stands_upright(tmp_path):
    frames = np.stack([smooth(64, 96)] * 4)
    buffer = io.BytesIO()
    write_video(buffer, frames, fps=4)
    data = bytearray(buffer.getvalue())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes from version to the matrix
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # turn it clockwise
    upright, _ = load_video(bytes(data), BUDGET)
    assert upright.shape[1:] == (96, 64, 3)
    assert np.abs(upright[0].astype(int) - np.rot90(frames[0], -1)).mean() < 8


def test_a_list_of_frames_counts_as_sampled_at_the_budgets_rate():
    frames = list(counting_frames(4))
    for value in (frames, [Image.fromarray(f) for f in frames], np.stack(frames)):
        pixels, times = load_video(value, MediaBudget(fps=2.0))
        np.testing.assert_array_equal(pixels, np.stack(frames))
        assert times == (0.25, 1.25)


@pytest.mark.parametrize(
    "value, message",
    [
        ("https://example.org/a.mp4", "nothing is fetched here"),
        (b"not a video", "cannot read 11 bytes as a video .*convert it with ffmpeg or drop it"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n", "cannot read"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot read"),
        ([], "an empty list"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)], "frames of several sizes"),
        ([np.zeros((4, 4, 3), np.uint8), "gone.png"], "frame 1: there is no file"),
        (7, "got int"),
    ],
)
def test_what_is_no_video_is_named_with_the_remedy(processor, value, message):
    with pytest.raises(ValueError, match="item 3, video 0.*" + message):
        prepare(value, "video", BUDGET, processor, where="item 3, video 0")


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
def test_a_file_cut_off_in_the_middle_is_named_or_ends_with_its_last_frame(container, processor, tmp_path):
    write_video(str(tmp_path / "a"), counting_frames(24), fps=8, format=container)
    data, lengths = (tmp_path / "a").read_bytes(), []
    for fifth in range(1, 6):
        try:
            frames, _ = load_video(data[: fifth * len(data) // 5], MediaBudget(fps=8.0), "item 3")
            lengths.append(len(frames))
        except ValueError as error:
            assert re.match("item 3: cannot read", str(error))
    assert lengths == sorted(lengths) and lengths[-1] == 24
    assert len(lengths) > 1 or container == "mp4"  # whose index is at its end
    with pytest.raises(ValueError, match="item 0, video 0: cannot read"):
        prepare(data[:20], "video", BUDGET, processor, where="item 0, video 0")


def test_a_film_of_sound_alone_is_named(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as film:
        stream = film.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        film.mux([*stream.encode(silence), *stream.encode(None)])
    with pytest.raises(ValueError, match="item 3: "):
        load_video(tmp_path / "a.mp4", BUDGET, "item 3")


def test_a_playlist_opens_no_other_file(tmp_path):
    write_video(str(tmp_path / "a.ts"), counting_frames(8), fps=8, format="mpegts")
    assert load_video(tmp_path / "a.ts", BUDGET)[0].shape == (2, 64, 64, 3)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with av.open(str(tmp_path / name)) as container:  # what FFmpeg alone makes of it
            assert container.streams.video
        with pytest.raises(ValueError, match="item 3: cannot read"):
            load_video(tmp_path / name, BUDGET, "item 3")


def test_a_film_is_measured_before_its_frames_are_kept(monkeypatch):
    buffer = io.BytesIO()
    write_video(buffer, counting_frames(8), fps=8)
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 2 * 64 * 64 - 1)
    with pytest.raises(ValueError, match="item 3: .*2 frames of 64 x 64 pixels, and at most 8191 pixels in all"):
        load_video(buffer.getvalue(), BUDGET, "item 3")


def test_frames_of_a_clip_are_bytes_and_not_shares():
    with pytest.raises(ValueError, match=r"frames of uint8, got float32; .*\(255 \* x\).round\(\)"):
        Clip(np.zeros((2, 8, 8, 3), np.float32), 1.0)


# --- budgets, keys and laziness ---


def test_visuals_that_share_a_prompt_share_its_length():
    assert BUDGET.shared(images=1, videos=1, max_length=8192) is BUDGET
    shared = BUDGET.shared(images=10, videos=0, max_length=8192)
    assert 700 < shared.image_max_tokens < 800  # 8192 tokens less some for words, over ten
    tight = BUDGET.shared(images=8, videos=8, max_length=8192)
    total = 8 * (tight.image_max_tokens + 2) + 8 * (tight.video_max_tokens + 32 * media.PAIR_OVERHEAD)
    assert total + media.TEXT_ROOM <= 8192
    assert BUDGET.shared(images=1000, videos=0, max_length=512).image_max_tokens == 1


def test_a_budget_that_cannot_be_kept_is_refused():
    for wrong in (dict(image_min_tokens=5, image_max_tokens=4), dict(fps=0), dict(min_frames=9, max_frames=8)):
        with pytest.raises(ValueError, match="expected"):
            MediaBudget(**wrong)


def test_a_known_visual_is_neither_drawn_nor_opened(processor, tmp_path, monkeypatch):
    drawn = []
    first = prepare(Drawing(64, drawn), "image", BUDGET, processor)
    store = {first.key: Visual("image", first.grid_thw, None, first.key)}
    again = prepare(Drawing(64, drawn), "image", BUDGET, None, store.get)
    assert again is store[first.key] and drawn == [1]
    assert prepare(Drawing(96, drawn), "image", BUDGET, processor, store.get).n_tokens == 9 and drawn == [1, 1]

    path = tmp_path / "a.png"
    Image.fromarray(smooth(64, 64)).save(path)
    first = prepare(path, "image", BUDGET, processor)
    monkeypatch.setattr(Image, "open", None)
    assert prepare(str(path), "image", BUDGET, None, {first.key: "known"}.get) == "known"


def test_keys_are_equal_for_equal_pixels_only(processor, tmp_path):
    pixels = smooth(64, 64)
    key = prepare(pixels, "image", BUDGET, processor).key
    assert prepare(Image.fromarray(pixels), "image", BUDGET, processor).key == key
    assert prepare(pixels.copy(), "image", BUDGET, processor).key == key
    other = pixels.copy()
    other[0, 0, 0] += 1
    budget = MediaBudget(image_max_tokens=9)
    different = [
        prepare(other, "image", BUDGET, processor).key,
        prepare(smooth(64, 96), "image", BUDGET, processor).key,
        prepare(pixels, "image", budget, processor).key,
        prepare([pixels], "video", BUDGET, processor).key,
        prepare(Clip(np.stack([pixels]), 2.0), "video", BUDGET, processor).key,
        prepare(Clip(np.stack([pixels] * 4), 2.0), "video", BUDGET, processor).key,
        prepare(Clip(np.stack([pixels] * 4), 4.0), "video", BUDGET, processor).key,
    ]
    assert len({key, *different}) == len(different)  # of one frame, the video at 1 fps and at 2 fps is the same


def test_a_file_that_was_rewritten_is_read_again(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(smooth(64, 64)).save(path)
    first = prepare(path, "image", BUDGET, processor).key
    Image.fromarray(noise(64, 64, 3)).save(path)
    assert prepare(path, "image", BUDGET, processor).key != first


def test_a_drawing_that_cannot_be_hashed_is_known_by_its_pixels(processor):
    class Unhashable(Drawing):
        __hash__ = None

    first = prepare(Unhashable(64), "image", BUDGET, processor)
    assert prepare(Unhashable(64), "image", BUDGET, processor).key == first.key
    assert prepare(Unhashable(64), "image", BUDGET, processor, {first.key: "known"}.get) == "known"


def test_one_field_holds_none_one_or_many():
    picture, clip = Image.new("RGB", (8, 8)), Clip(np.zeros((2, 8, 8, 3), np.uint8), 1.0)
    assert media.as_list(None, "image") == [] and media.as_list([], "video") == []
    assert media.as_list(picture, "image") == [picture]
    assert media.as_list([picture, picture], "image") == [picture, picture]
    assert media.as_list([picture, picture], "video") == [[picture, picture]]  # the frames of one video
    assert media.as_list([[picture, picture], clip], "video") == [[picture, picture], clip]
    assert media.as_list(["a.mp4", "b.mp4"], "video") == ["a.mp4", "b.mp4"]
    assert media.as_list(["1.png", "2.png"], "video") == [["1.png", "2.png"]]
