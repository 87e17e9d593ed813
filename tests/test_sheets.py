"""A contact sheet shows what there is."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from q3vl_mini.records import Clip, Quadruple, Relevance
from q3vl_mini.sheets import SHADES, contact_sheet


@dataclass(frozen=True)
class Flat:
    """A drawing of one colour."""

    colour: tuple[int, int, int]

    def render(self) -> Image.Image:
        return Image.new("RGB", (96, 96), self.colour)


@pytest.fixture
def coloured() -> Quadruple:
    """One query picture, its positive and its negative, each of one colour, in 96 x 96 pixels."""
    corpus = [{"image": Flat((4, 5, 6))}, {"image": Flat((7, 8, 9))}]
    relevance = [Relevance((0,), (1,), scores=(0.75,))]
    queries = [{"image": Flat((1, 2, 3)), "text": "a"}]
    return Quadruple("c", "image_ret", "Find the picture.", queries, corpus, relevance)


def test_a_contact_sheet_shows_query_positive_and_negative_from_left_to_right(coloured):
    sheet = np.asarray(contact_sheet(coloured))
    left = []
    for colour in ((1, 2, 3), (4, 5, 6), (7, 8, 9)):
        y, x = np.nonzero((sheet == colour).all(-1))
        assert len(x) == 96 * 96
        assert (np.ptp(x), np.ptp(y)) == (95, 95)
        left.append(x.min())
    assert left == sorted(left)
    for shade in SHADES.values():
        assert (sheet == shade).all(-1).any()


def test_a_contact_sheet_shows_four_frames_of_a_clip():
    frames = np.stack([np.full((96, 96, 3), 10 * i, np.uint8) for i in range(8)])
    quadruple = Quadruple("c", "video_ret", "Find.", [{"video": Clip(frames, 2.0)}], [{"text": "x"}], [Relevance((0,))])
    sheet = np.asarray(contact_sheet(quadruple))
    shown = [i for i in range(8) if (sheet == 10 * i).all(-1).sum() > 96 * 90]
    assert len(shown) == 4 and shown[0] == 0 and shown[-1] == 7


def test_a_contact_sheet_draws_long_texts_and_other_scripts():
    def ink(text: str) -> np.ndarray:
        queries = [{"text": text}]
        sheet = contact_sheet(Quadruple("t", "text_ret", "Find.", queries, [{"text": "x"}], [Relevance((0,))]))
        return np.asarray(sheet.crop((0, 85, 430, sheet.height)))  # the query without title

    for word in ("λόγος", "слово", "كلمة"):
        assert (ink(word) < 100).any()
        assert not np.array_equal(ink(word), ink("\uffff" * len(word)))  # not a row of boxes
    assert ink("word " * 60).shape[0] > ink("word").shape[0] + 50  # wrapped
    assert ink("word " * 6000).shape[0] == ink("word " * 600).shape[0]  # and cut
    assert ink("x" * 300).shape[0] > ink("x").shape[0] + 50


def test_a_contact_sheet_has_as_many_rows_as_asked_for_and_the_same_again():
    numbers = [{"text": str(i)} for i in range(30)]
    quadruple = Quadruple("words", "text_ret", "Find it.", numbers, numbers, [Relevance((i,)) for i in range(30)])
    heights = [contact_sheet(quadruple, rows=n).height for n in (1, 2, 3)]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 40
    assert contact_sheet(quadruple).tobytes() == contact_sheet(quadruple).tobytes()
    assert contact_sheet(quadruple, seed=1).tobytes() != contact_sheet(quadruple).tobytes()
