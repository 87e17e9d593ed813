"""Contact sheets: some queries of a sub-dataset with their documents, as a picture to look at."""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from .media import MediaBudget, as_list, load_image, load_video
from .records import Instance, Quadruple, as_instance, is_empty

EDGE, GAP, QUERY_WIDTH, DOCUMENT_WIDTH = 96, 10, 420, 220  # pixels
SHOWN = {"positive": 2, "negative": 3}  # at most, a query
SHADES = {"query": (235, 240, 250), "positive": (226, 244, 228), "negative": (250, 230, 228)}
INK = (30, 30, 36)


def contact_sheet(quadruple: Quadruple, rows: int = 8, seed: int = 0) -> Image.Image:
    """A picture of `rows` queries drawn at random, each with positives and negatives, under the instruction.

    A clip is shown as four frames from its first to its last. Text is set in DejaVu Sans, which has Latin, Greek,
    Cyrillic, Arabic and more; scripts that it lacks, CJK and the Indic ones, show as boxes. Taught in notebooks/03.
    """
    rng = np.random.default_rng([seed, 4])
    chosen = sorted(rng.permutation(len(quadruple))[:rows].tolist())
    shown = {
        kind: min(most, max(len(getattr(quadruple.relevance[i], f"{kind}s")) for i in chosen))
        for kind, most in SHOWN.items()
    }
    width = QUERY_WIDTH + 2 * GAP + sum(shown.values()) * (DOCUMENT_WIDTH + GAP)
    counts = f"{len(quadruple)} queries, {len(quadruple.corpus)} documents"
    head = [_text_piece(f"{quadruple.name} ({quadruple.task}): {counts}", width - 2 * GAP, 14)]
    head.append(_text_piece(quadruple.instruction, width - 2 * GAP, 20))
    strips = [_stack(head, width, "white"), *(_sheet_row(quadruple, i, width, shown) for i in chosen)]
    return _stack(strips, width, "white", margin=0)


def _sheet_row(quadruple: Quadruple, i: int, width: int, shown: Mapping[str, int]) -> Image.Image:
    labels = quadruple.relevance[i]
    tiles = [(GAP, _tile(quadruple.queries[i], f"query {i}", "query", QUERY_WIDTH))]
    left = QUERY_WIDTH + 2 * GAP
    for kind, documents in (("positive", labels.positives), ("negative", labels.negatives)):
        for n, document in enumerate(documents[: shown[kind]]):
            title = f"{kind} {n + 1} of {len(documents)}"
            if kind == "positive" and labels.scores is not None:
                title += f", score {labels.scores[n]:.2f}"
            x = left + n * (DOCUMENT_WIDTH + GAP)
            tiles.append((x, _tile(quadruple.corpus[document], title, kind, DOCUMENT_WIDTH)))
        left += shown[kind] * (DOCUMENT_WIDTH + GAP)
    strip = Image.new("RGB", (width, max(tile.height for _, tile in tiles) + GAP), "white")
    for x, tile in tiles:
        strip.paste(tile, (x, 0))
    return strip


def _tile(instance: Instance, title: str, kind: str, width: int) -> Image.Image:
    """One instance as a panel: its title, pictures, frames of its clips, texts."""
    instance, room = as_instance(instance), width - 2 * GAP
    pictures = [load_image(value, title) for value in as_list(instance.get("image"), "image")]
    for value in as_list(instance.get("video"), "video"):
        frames, _ = load_video(value, MediaBudget(min_frames=4, max_frames=4), title)  # at most (4, H, W, 3)
        pictures += list(frames)
    pieces = [_text_piece(title, room, 12, SHADES[kind])]
    per_line = room // (EDGE + 4)
    for start in range(0, len(pictures), per_line):
        pieces.append(_strip(pictures[start : start + per_line], room, kind))
    texts = [text for text in as_list(instance.get("text"), "text") if not is_empty(text)]
    pieces += [_text_piece(text, room, 15, SHADES[kind]) for text in texts]
    return _stack(pieces, width, SHADES[kind])


def _strip(pictures: list[np.ndarray], width: int, kind: str) -> Image.Image:
    edge = EDGE if len(pictures) > 1 else min(2 * EDGE, max(EDGE, *pictures[0].shape[:2]))  # a page needs more room
    thumbnails = []
    for picture in map(Image.fromarray, pictures):
        scale = edge / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        thumbnails.append(picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC))
    strip = Image.new("RGB", (width, max(thumbnail.height for thumbnail in thumbnails)), SHADES[kind])
    for n, thumbnail in enumerate(thumbnails):
        strip.paste(thumbnail, (n * (EDGE + 4), 0))
    return strip


def _stack(pieces: list[Image.Image], width: int, colour: Any, margin: int = GAP) -> Image.Image:
    sheet = Image.new("RGB", (width, sum(piece.height + margin // 2 for piece in pieces) + margin), colour)
    top = margin // 2
    for piece in pieces:
        sheet.paste(piece, (margin, top))
        top += piece.height + margin // 2
    return sheet


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _text_piece(text: str, width: int, size: int, ground: Any = "white", max_lines: int = 8) -> Image.Image:
    lines = _wrapped(text, _font(size).getlength, width, width // size)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1].rstrip() + " …"]
    piece = Image.new("RGB", (width, round(1.3 * size * max(len(lines), 1))), ground)
    for n, line in enumerate(lines):
        ImageDraw.Draw(piece).text((0, round(1.3 * size * n)), line, fill=INK, font=_font(size))
    return piece


def _wrapped(text: str, length: Callable[[str], float], width: float, longest: int) -> list[str]:
    """Lines of at most `width`; words over `longest` signs, and scripts without spaces, break anywhere."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for piece in re.findall(rf"\S{{1,{longest}}}\s*", paragraph):
            if line and length((line + piece).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += piece
        lines.append(line.rstrip())
    return lines
