"""Other houses' designs: the same thing in the same place, otherwise filled, shaded and outlined."""

import random
import re

import numpy as np
import pytest
import torch

from q3vl_mini.emoji_world import sprites
from q3vl_mini.emoji_world.bank import SpriteBank
from q3vl_mini.emoji_world.restyle import COLOUR, Palette, flattened, restyled, rgb, shaded

KEYS = [c.key for c in sprites.concepts()][::25]


@pytest.fixture(scope="module", params=sprites.TRAIN_STYLES)
def pairs(request):
    """(own drawing, another house's) of some things in a style, int arrays (N, 64, 64, 4)."""
    own = [sprites.drawn(request.param, key, 64) for key in KEYS]
    other = [sprites.drawn(request.param, key, 64, house=1 + i) for i, key in enumerate(KEYS)]
    return np.stack(own).astype(int), np.stack(other).astype(int)


def test_another_house_keeps_the_shape_and_changes_the_look(pairs):
    own, other = ((x[..., 3] > 127) for x in pairs)
    overlap = (own & other).sum((1, 2)) / (own | other).sum((1, 2))
    assert np.median(overlap) > 0.9 and (overlap > 0.6).mean() > 0.97
    change = np.abs(pairs[0] - pairs[1]).sum(-1).mean((1, 2))
    assert np.median(change) > 15 and (change > 0).mean() > 0.97


def test_the_same_house_draws_the_same_and_another_one_otherwise():
    style, key = sprites.TRAIN_STYLES[0], KEYS[3]
    assert sprites.svg(style, key, house=5) == sprites.svg(style, key, house=5) != sprites.svg(style, key, house=6)
    assert sprites.svg(style, key, house=0) == sprites.svg(style, key)


def test_every_fill_that_is_referred_to_exists():
    for style in sprites.TRAIN_STYLES:
        for i, key in enumerate(KEYS):
            text = sprites.svg(style, key, house=100 + i)
            assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(re.findall(r'id="([^"]+)"', text))


def test_a_colour_becomes_the_same_colour_everywhere_in_a_drawing():
    body = '<path fill="#ff0000" d="M0 0h9v9z"/><path fill="#00f" d="M1 1h2v2z"/><path fill="#ff0000" d="M5 5h2v2z"/>'
    for seed in range(30):
        fills = COLOUR.findall(re.sub(r"<defs>.*</defs>| stroke=\"[^\"]*\"", "", restyled(body, 10, seed)))
        assert len(set(fills)) <= 2
    first, second = Palette(random.Random(0)), Palette(random.Random(1))
    assert first("#ff0000") == first("#FF0000") != second("#ff0000")


def test_gradients_become_one_of_their_colours_unless_they_fade():
    gradient = (
        '<linearGradient id="a"><stop stop-color="#111111"/><stop offset="1" stop-color="#eeeeee"/></linearGradient>'
    )
    fading = '<radialGradient id="b"><stop stop-color="#111111" stop-opacity="0"/></radialGradient>'
    body = f'{gradient}{fading}<path fill="url(#a)" d="M0 0"/><path fill="url(#b)" d="M0 0"/>'
    out = flattened(body, random.Random(0))
    assert re.search(r'<path fill="#(111111|eeeeee)"', out) and '<path fill="url(#b)"' in out


def test_shading_goes_towards_black_and_white():
    assert rgb("#fff") == (1, 1, 1) and shaded("#808080", -1) == "#000000" and shaded("#808080", 1) == "#ffffff"
    assert rgb(shaded("#806040", -0.5)) == pytest.approx([x / 2 for x in rgb("#806040")], abs=0.01)


def test_what_cuts_out_a_part_is_left_as_it_is():
    body = (
        '<clipPath id="c"><path d="M0 0h5v5z"/></clipPath><g clip-path="url(#c)"><path fill="#f00" d="M0 0h9v9z"/></g>'
    )
    for seed in range(10):
        assert '<clipPath id="c"><path d="M0 0h5v5z"/></clipPath>' in restyled(body, 10, seed)


def test_a_bank_shows_its_styles_and_the_other_houses_and_draws_these_anew():
    bank = SpriteBank(["noto", "twemoji"], KEYS[:4], houses=2)
    assert bank.rgba.shape == (6, 4, 64, 64, 4)
    assert torch.equal(bank.rgba[1, 2], torch.from_numpy(sprites.sprite("twemoji", KEYS[2], 64).copy()))
    assert len({row.numpy().tobytes() for row in bank.rgba[:, 0]}) == 6
    first = bank.rgba.clone()
    bank.redraw(2)
    assert torch.equal(bank.rgba[:2], first[:2]) and not torch.equal(bank.rgba[2:], first[2:])
    bank.redraw(1)
    assert torch.equal(bank.rgba, first)
