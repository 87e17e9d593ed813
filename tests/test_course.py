"""What the notebooks share: whose model is taken, figures with alt text, galleries that show what they are given."""

import io
import json
import sys
from base64 import b64decode
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from q3vl_mini import course
from q3vl_mini.config import data_dir
from q3vl_mini.course import artifact, gallery, show, stage_results
from q3vl_mini.emoji_world.tasks import build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from run_notebooks import execute  # noqa: E402


def test_the_model_of_ones_own_run_comes_before_the_shipped_one(tmp_path, monkeypatch, capsys):
    below = tmp_path / "notebooks"
    below.mkdir()
    monkeypatch.chdir(below)
    assert artifact("tiny", "s3") == data_dir() / "adapters" / "s3"
    (tmp_path / "runs/tiny/s3/model").mkdir(parents=True)
    assert artifact("tiny", "s3") == data_dir() / "adapters" / "s3"  # that stage is not finished
    (tmp_path / "runs/tiny/s3/metrics.json").write_text("{}")
    assert artifact("tiny", "s3") == tmp_path / "runs/tiny/s3/model"
    told = capsys.readouterr().out.splitlines()
    assert "shipped" in told[0] and "your run" in told[2] and str(tmp_path) not in "".join(told)
    with pytest.raises(FileNotFoundError, match="q3vl-mini run --preset colab"):
        artifact("colab", "s3")


def test_results_are_ones_own_or_the_shipped_ones(tmp_path, monkeypatch):
    shipped = stage_results("tiny")
    assert {"raw", "s0", "s1", "s2", "s3"} <= set(shipped["models"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tiny.json").write_text(json.dumps({"mine": 1}))
    assert stage_results("tiny") == {"mine": 1}
    with pytest.raises(FileNotFoundError, match="--preset full"):
        stage_results("full")


@pytest.fixture
def shown(monkeypatch):
    """What display was given: (picture, alt text)."""
    pictures = []

    def display(picture, metadata):
        pictures.append((Image.open(io.BytesIO(picture.data)), metadata["image/png"]["alt"]))

    monkeypatch.setattr(course, "display", display)
    return pictures


def test_a_figure_is_shown_once_with_its_alt_text_and_closed(shown):
    figure, axis = plt.subplots()
    axis.plot([0, 1])
    show(figure, "a rising line")
    [(picture, alt)] = shown
    assert alt == "a rising line" and np.asarray(picture.convert("L")).std() > 5
    assert not plt.fignum_exists(figure.number)


TRAINING = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
import matplotlib.pyplot as plt
from q3vl_mini.course import Place, gallery, show

curve, tiles = Place(), Place()
for step in (1, 2, 3):
    show(plt.figure(figsize=(step, 1), dpi=100), f"the curve at step {{step}}", curve)
    gallery([["a"] * step], alt=f"tiles at step {{step}}", place=tiles)
"""


@pytest.mark.slow  # a kernel of its own
def test_a_saved_notebook_holds_the_last_figure_of_each_place(tmp_path):
    cells = [nbformat.v4.new_code_cell(TRAINING) for _ in range(2)]
    path = tmp_path / "training.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    execute(path)
    for cell in nbformat.read(path, as_version=4).cells:  # run a second time, the cell draws into places of its own
        assert [output.output_type for output in cell.outputs] == ["display_data"] * 2
        alts = [output.metadata["image/png"]["alt"] for output in cell.outputs]
        assert alts == ["the curve at step 3", "tiles at step 3"]
        assert Image.open(io.BytesIO(b64decode(cell.outputs[0].data["image/png"]))).size == (300, 100)


def test_a_gallery_frames_what_is_right_and_what_is_wrong(shown, monkeypatch):
    figures = []
    monkeypatch.setattr(course, "show", lambda figure, alt, place: figures.append(figure))
    part = build("text_to_image", "validation", 3, 0)
    clip = build("video_retrieval", "validation", 2, 0).corpus[0]
    gallery(
        [[part.queries[0], (part.corpus[0], "cosine 0.5"), clip], ["a word"]], [[None, True, False], [None]], alt="x"
    )
    axes = np.array(figures[0].axes).reshape(2, 3)
    assert axes[0, 1].get_title() == "✓ cosine 0.5" and axes[0, 2].get_title() == "✗"
    assert axes[0, 1].spines["left"].get_edgecolor() == to_rgba("#009E73")
    assert axes[0, 2].spines["left"].get_edgecolor() == to_rgba("#D55E00")
    assert axes[1, 0].texts[0].get_text() == "a word" and not axes[1, 1].axison
    drawn = axes[0, 1].images[0].get_array()
    assert np.array_equal(drawn, np.asarray(part.corpus[0]["image"].render()))
    height, width = axes[0, 2].images[0].get_array().shape[:2]
    assert width == 3 * height  # first, middle and last frame


def test_the_style_has_colours_that_colour_blind_eyes_tell_apart():
    with plt.style.context("q3vl_mini.course"):
        cycle = [c["color"].lower().lstrip("#") for c in plt.rcParams["axes.prop_cycle"]]
        assert plt.rcParams["figure.facecolor"] == plt.rcParams["savefig.facecolor"] == "white"
    assert {"0072b2", "e69f00", "009e73", "d55e00", "cc79a7"} <= set(cycle)
