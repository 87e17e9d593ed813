"""When two documents are the same but for small things: normalised text, and a hash of what is seen.

A picture's fingerprint says, in a raster of 16 x 16, where it gets darker to the right and downwards (a difference
hash), and the colours of 8 x 8 parts. It stays nearly the same when a picture is resized or compressed again.
"""

import hashlib
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from PIL import Image

from .media import EDGE, MediaBudget, as_list, fitted_size, load_image, load_video
from .pages import PdfPage
from .records import MODALITIES, Instance, is_empty

RASTER = 16
STEP = 6  # grey levels of 255 that count as darker: less is what compression leaves on a flat ground
BITS = 2 * RASTER * RASTER
NEAR_BITS = 48  # of the 512 that near duplicates may differ in
NEAR_SHARE = 0.25  # of the bits set in either: a page of text, or a drawing of few lines, sets few
NEAR_COLOUR = 16  # levels of 255 that a part's mean colour may differ by
KEY = 64  # characters of a text that its key shows


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """`edges`: 512 bits, packed, uint8 (64,). `colours`: means of 8 x 8 parts, uint8 (192,)."""

    edges: np.ndarray
    colours: np.ndarray

    def is_near(self, other: "Fingerprint") -> bool:
        """True for near duplicates: at most NEAR_BITS, NEAR_SHARE and NEAR_COLOUR apart."""
        differing = int(np.bitwise_count(self.edges ^ other.edges).sum())
        set_in_either = int(np.bitwise_count(self.edges | other.edges).sum())
        colours = np.abs(self.colours.astype(int) - other.colours)
        return differing <= min(NEAR_BITS, NEAR_SHARE * set_in_either) and int(colours.max()) <= NEAR_COLOUR


def fingerprint(image: Any) -> Fingerprint:
    """The fingerprint of any image that media.load_image reads."""
    picture = Image.fromarray(load_image(image))
    grey = picture.convert("L").resize((RASTER + 1, RASTER + 1), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=int)  # (17, 17)
    right = levels[:-1, :-1] - levels[:-1, 1:] > STEP
    down = levels[:-1, :-1] - levels[1:, :-1] > STEP
    colours = np.asarray(picture.resize((8, 8), Image.Resampling.BOX))
    return Fingerprint(np.packbits(np.concatenate([right.ravel(), down.ravel()])), colours.ravel())


def near_pairs(fingerprints: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """All pairs of positions i < j whose pictures are near duplicates."""
    if len(fingerprints) < 2:
        return []
    edges = np.stack([f.edges for f in fingerprints])
    index = faiss.IndexBinaryFlat(BITS)
    index.add(edges)
    limits, _, found = index.range_search(edges, NEAR_BITS + 1)  # the radius is exclusive
    pairs = ((i, int(j)) for i in range(len(edges)) for j in found[limits[i] : limits[i + 1]] if i < j)
    return sorted((i, j) for i, j in pairs if fingerprints[i].is_near(fingerprints[j]))


class _Spaces(dict):
    """For str.translate: a space for what is no letter, mark or number."""

    def __missing__(self, code: int) -> int:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else ord(" ")
        return self[code]


_SPACES = _Spaces()


def normal_text(text: str) -> str:
    """The text without case, accents' encoding, punctuation and repeated spaces; signs alone stay as they are."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = folded.translate(_SPACES).split()
    return " ".join(words) or folded.strip()


@dataclass(frozen=True, eq=False)
class Seen:
    """What a look at a picture or video found. `tokens`: visual tokens within the budget; `whole`: at its own size."""

    digest: str
    fingerprint: Fingerprint
    width: int
    height: int
    whole: int
    tokens: int


def look(value: Any, kind: str, budget: MediaBudget) -> Seen:
    """Open an image or video as media.prepare would. Raises ValueError or OSError if it cannot be read."""
    if kind == "image":
        frames = load_image(value)[None]  # (1, H, W, 3)
        shown = frames[0]
    else:
        frames, _ = load_video(value, budget)  # (T, H, W, 3)
        four = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
        shown = np.concatenate([np.concatenate(four[:2], axis=1), np.concatenate(four[2:], axis=1)])
    n, height, width = frames.shape[:3]
    rows, columns = fitted_size(n, height, width, kind, budget)
    pairs = max(1, n // 2)
    whole = pairs * max(1, round(height / EDGE)) * max(1, round(width / EDGE))
    tokens = pairs * (rows // EDGE) * (columns // EDGE)
    digest = hashlib.blake2b(repr(frames.shape).encode() + frames.tobytes(), digest_size=16).hexdigest()
    return Seen(digest, fingerprint(shown), width, height, whole, tokens)


class Likeness:
    """Recognises instances: `exact` keys are equal for the same texts and pixels, `near` keys for near duplicates too.

    Every picture and video is opened once, by `see`, and only what was seen of it is kept.
    """

    def __init__(self, budget: MediaBudget):
        self.budget = budget
        self._seen: dict[Hashable, Seen] = {}
        self._alive: list[Any] = []  # what is known by its id, which another object would get if it were freed
        self._near: dict[str, str] | None = None  # digest -> the least digest of its near duplicates

    def see(self, instance: Instance) -> list[Seen]:
        """What looking at the instance's visuals found. Raises ValueError or OSError if one cannot be read."""
        return [self._look(kind, value) for kind, value in _parts(instance) if kind != "text"]

    def exact(self, instance: Instance) -> tuple:
        """Equal for instances of the same content; what an instance's instruction says does not count."""
        return tuple((k, text_key(v.strip()) if k == "text" else self._look(k, v).digest) for k, v in _parts(instance))

    def near(self, instance: Instance) -> tuple:
        """Equal for instances that are the same but for case, signs, size or compression."""
        if self._near is None:
            self._near = self._near_digests()
        return tuple(
            (k, text_key(normal_text(v)) if k == "text" else self._near[self._look(k, v).digest])
            for k, v in _parts(instance)
        )

    def _look(self, kind: str, value: Any) -> Seen:
        by_value = isinstance(value, (str, Path, bytes, PdfPage))
        key = kind, value if by_value else id(value)
        if key not in self._seen:
            self._seen[key] = look(value, kind, self.budget)
            self._alive += [] if by_value else [value]
            self._near = None
        return self._seen[key]

    def _near_digests(self) -> dict[str, str]:
        groups, seen = Groups(), {s.digest: s for s in self._seen.values()}
        digests = sorted(seen)
        for i, j in near_pairs([seen[d].fingerprint for d in digests]):
            groups.join((digests[i], digests[j]))
        least: dict[Hashable, str] = {}
        for digest in digests:
            least.setdefault(groups.find(digest), digest)
        return {digest: least[groups.find(digest)] for digest in digests}


def text_key(text: str) -> str:
    """What stands for a text: itself if it is short, else its beginning and a hash, so that keys fit into memory."""
    if len(text) <= KEY:
        return text
    return f"{text[:KEY]} {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _parts(instance: Instance) -> list[tuple[str, Any]]:
    return [(kind, v) for kind in MODALITIES for v in as_list(instance.get(kind), kind) if not is_empty(v)]


class Groups:
    """Things joined pair by pair; what is joined, directly or through others, is one group (union-find)."""

    def __init__(self):
        self._above: dict[Hashable, Hashable] = {}

    def find(self, thing: Hashable) -> Hashable:
        """The thing that stands for its group."""
        path = []
        while (above := self._above.setdefault(thing, thing)) != thing:
            path.append(thing)
            thing = above
        for passed in path:
            self._above[passed] = thing
        return thing

    def join(self, things: Iterable[Hashable]) -> None:
        """Put all of them into one group."""
        roots = [self.find(thing) for thing in things]
        for root in roots[1:]:
            self._above[self.find(root)] = self.find(roots[0])
