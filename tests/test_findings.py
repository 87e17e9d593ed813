"""What is said of a finding: differences over seeds and queries, and a page that says what the results hold."""

import importlib
import sys

import numpy as np
import pytest

from q3vl_mini.config import data_dir
from q3vl_mini.evaluate import ColumnResult, DatasetResult

ROOT = data_dir().parent


@pytest.fixture
def seeds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "findings")
    yield importlib.import_module("seeds")
    for name in ("seeds", "page"):
        sys.modules.pop(name, None)


def scored(values) -> ColumnResult:
    values = np.asarray(values, dtype=float)
    return ColumnResult("image_ret", (DatasetResult("x", "image_ret", "hit@1", values, 10, 0.1),))


def test_a_difference_that_every_query_and_seed_shows_has_no_doubt(seeds):
    worse = [scored(np.linspace(0, 0.5, 40)) for _ in range(3)]
    better = [scored(np.linspace(0, 0.5, 40) + 0.25) for _ in range(3)]
    found = seeds.paired(better, worse)
    assert found.difference == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)
    assert found.by_seed == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_that_of_drawing_seeds_and_then_queries(seeds):
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 60)), rng.random((3, 60)) - np.array([[0.0], [0.1], [0.4]])
    found = seeds.paired([scored(x) for x in a], [scored(x) for x in b])
    drawn = []
    for _ in range(4000):  # the slow way: one sample at a time, with other random numbers
        queries = rng.integers(0, 60, 60)
        chosen = rng.integers(0, 3, 3)
        drawn.append(np.mean([a[s, queries].mean() - b[s, queries].mean() for s in chosen]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_queries_alone_would_be_too_sure_where_seeds_differ(seeds):
    nothing, some, much = scored([0.0] * 50), scored([0.05] * 50), scored([0.6] * 50)
    found = seeds.paired([some, some, much], [nothing, nothing, nothing])
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.1, 0.05, 0.15, (0.1, 0.1, 0.1)), "shown"),
        ((-0.1, -0.15, -0.05, (-0.1, -0.1, -0.1)), "not shown"),
        ((0.1, -0.01, 0.2, (0.1, 0.1, 0.1)), "undecided"),
        ((0.1, 0.05, 0.15, (0.1, 0.1)), "undecided"),  # two seeds
        ((0.1, 0.01, 0.3, (0.2, 0.2, -0.1)), "undecided"),  # one disagrees
    ],
)
def test_a_claim_is_shown_by_three_seeds_that_agree(seeds, difference, said):
    assert seeds.verdict(seeds.Difference(*difference)) == said


def test_a_claim_may_allow_a_loss(seeds):
    loses_little = seeds.Difference(-0.002, -0.004, 0.001, (-0.002, -0.002, -0.003))
    assert seeds.verdict(loses_little, above=-0.01) == "shown"
    assert seeds.verdict(loses_little) == "undecided"


def test_models_of_different_seeds_are_no_pair(seeds):
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        seeds.paired([scored([1.0]), scored([0.0])], [scored([1.0])])


def test_the_page_says_what_the_results_hold(seeds):
    page = importlib.import_module("page")
    assert page.page() == page.PAGE.read_text(), "run benchmarks/findings/page.py"
    for name in page.FIGURES:
        assert (seeds.RESULTS / f"{name}.png").is_file()
