"""Single things as whole batches in torch: drawn, tinted and augmented faster than one scene at a time."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import sprites
from .augment import augment
from .scenes import COLOURS

MIRRORED = ("left", "right", "clock", "leftwards", "rightwards")
FLIPPABLE_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects", "people-body")


def flippable(concept: sprites.Concept) -> bool:
    """Whether a mirrored drawing still shows the same concept."""
    words = re.split(r"\W+", concept.name)
    return concept.group in FLIPPABLE_GROUPS and not any(w in MIRRORED for w in words)


def drawings(style: str, keys: Sequence[str], pixels: int = 64, house: int = 0) -> Tensor:
    """All drawings of a style as uint8 (N, pixels, pixels, 4); by houses that differ from thing to thing if not 0."""
    seeds = [house and 1_000_003 * house + i for i in range(len(keys))]
    arrays = [sprites.drawn(style, k, pixels, seed) for k, seed in zip(keys, seeds, strict=True)]
    return torch.stack([torch.from_numpy(array.copy()) for array in arrays])


def tint(rgba: Tensor, colours: Tensor) -> Tensor:
    """Sprites (B, H, W, 4) recoloured by one RGB each (B, 3), as scenes.py tints them."""
    x = rgba.float()
    grey = (x[..., :3] * torch.tensor([0.299, 0.587, 0.114])).sum(-1)
    shade = (0.3 * x[..., 3] + 0.7 * grey)[..., None] / 255
    return torch.cat([shade * colours[:, None, None, :], x[..., 3:]], -1).to(torch.uint8)


class SpriteBank:
    """The drawings of some concepts in some styles, and each by `houses` others (restyle.py), at 64 x 64 pixels."""

    def __init__(self, styles: Sequence[str], keys: Sequence[str], houses: int = 0, seed: int = 1):
        self.keys, self.styles = tuple(keys), tuple(styles)
        shape = (len(styles) * (1 + houses), len(keys), 64, 64, 4)
        self.rgba = torch.empty(shape, dtype=torch.uint8)
        for i, style in enumerate(styles):
            self.rgba[i] = drawings(style, keys)
        if houses:
            self.redraw(seed)
        self.flippable = torch.tensor([flippable(sprites.concept_by_key()[key]) for key in keys])
        self.palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def redraw(self, seed: int) -> None:
        """Draw what other houses drew by new ones; the same for the same seed (at least 1)."""
        n = len(self.styles)
        for i in range(n, len(self.rgba)):
            self.rgba[i] = drawings(self.styles[i % n], self.keys, house=seed * len(self.rgba) + i)

    def drawn(self, things: Sequence[tuple[str, str | None]], strength: float, g: torch.Generator) -> list[np.ndarray]:
        """An augmented picture of each thing, a concept and its colour or None, as uint8 (64, 64, 3)."""
        place = {key: i for i, key in enumerate(self.keys)}
        concept = torch.tensor([place[key] for key, _ in things])
        style = torch.randint(len(self.rgba), (len(things),), generator=g)
        tints = torch.tensor([1 + list(COLOURS).index(colour) if colour else 0 for _, colour in things])
        x = self._augmented(style, concept, tints, strength, g)
        return list((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    def _augmented(self, style: Tensor, concept: Tensor, tints: Tensor, strength: float, g: torch.Generator) -> Tensor:
        """Float (n, 3, 64, 64) in [0, 1] of places in `styles` and `keys` and of tints as in `pictures`, each (n,)."""
        rgba, chosen = self.rgba[style, concept], tints > 0
        rgba[chosen] = tint(rgba[chosen], self.palette[tints[chosen] - 1])
        return augment(rgba, rgba.shape[1], strength, g, self.flippable[concept], keep_colour=chosen)

    def pictures(self, n: int, strength: float, tinted: float, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """n augmented pictures of one thing each, a share `tinted` of them recoloured.

        Returns float (n, 3, 64, 64) in [0, 1], the concept's place in `keys` (n,), and its tint (n,): 0 for none, or
        1 + the colour's place in COLOURS.
        """
        n_styles, n_concepts = self.rgba.shape[:2]
        style = torch.randint(n_styles, (n,), generator=g)
        concept = torch.randint(n_concepts, (n,), generator=g)
        tints = torch.zeros(n, dtype=torch.long)
        chosen = torch.rand(n, generator=g) < tinted
        tints[chosen] = torch.randint(1, 1 + len(COLOURS), (int(chosen.sum()),), generator=g)
        return self._augmented(style, concept, tints, strength, g), concept, tints
