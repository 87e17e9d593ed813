"""What is said of a finding: differences over seeds and queries, and a page that says what the results hold."""

import importlib
import sys

import numpy as np
import pytest
from scipy import stats

from q3vl_mini.config import data_dir, load_preset, override, save_config
from q3vl_mini.data import Batch
from q3vl_mini.evaluate import ColumnResult, DatasetResult
from q3vl_mini.report import write_json

ROOT = data_dir().parent


@pytest.fixture
def seeds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "findings")
    yield importlib.import_module("seeds")
    for name in ("seeds", "page", "instructions", "stages", "teacher", "choices", "terms"):
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


def test_the_interval_of_one_seed_is_the_bootstrap_of_its_queries(seeds):
    a, b = np.random.default_rng(1).random((2, 60))
    found = seeds.paired([scored(a)], [scored(b)])
    theirs = stats.bootstrap((a - b,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.01)


def test_the_interval_of_seeds_is_students_where_queries_leave_no_doubt(seeds):
    by_seed = [0.05, 0.1, 0.6]
    found = seeds.paired([scored([x] * 50) for x in by_seed], [scored([0.0] * 50)] * 3)
    theirs = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.01)


def test_nineteen_of_twenty_intervals_hold_the_truth(seeds):
    """Three seeds of a recipe that is 0.1 better, with chance of their own, of the queries and of both together."""
    rng, held, held_by_drawing = np.random.default_rng(0), [], []
    for _ in range(300):
        queries, trained = rng.normal(0.1, 0.1, 40), rng.normal(0, 0.1, (3, 1))
        better = [scored(x) for x in queries + trained + rng.normal(0, 0.1, (3, 40))]
        found = seeds.paired(better, [scored([0.0] * 40)] * 3, n_resamples=400)
        held.append(found.low < 0.1 < found.high)
        draws = np.stack([x.resample(400) for x in better])  # the wrong variant: three seeds drawn from three
        low, high = np.quantile([draws[rng.integers(0, 3, 3), r].mean() for r in range(400)], [0.025, 0.975])
        held_by_drawing.append(low < 0.1 < high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)
    assert np.mean(held_by_drawing) < 0.85


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.1, 0.05, 0.15, (0.1, 0.1, 0.1)), "shown"),
        ((-0.1, -0.15, -0.05, (-0.1, -0.1, -0.1)), "contradicted"),
        ((0.1, -0.01, 0.2, (0.1, 0.1, 0.1)), "undecided"),
        ((0.1, 0.05, 0.15, (0.1, 0.1)), "undecided"),  # two seeds
        ((0.1, 0.01, 0.3, (0.2, 0.2, -0.1)), "undecided"),  # one disagrees
    ],
)
def test_a_claim_is_shown_by_three_seeds_that_agree(seeds, difference, said):
    assert seeds.verdict(seeds.Difference(*difference)) == said


def test_the_bar_of_a_small_loss_is_a_share_of_the_same_queries(seeds):
    """A model that keeps 98 % on every query keeps more than 95 % without doubt, however much the queries differ."""
    whole = [scored(np.linspace(0, 1, 40)) for _ in range(3)]
    part = [scored(0.98 * x.datasets[0].values) for x in whole]
    entry = seeds.claim("keeps 95 %", part, [seeds.Share(x, 0.95) for x in whole])
    assert entry["verdict"] == "shown" and entry["difference"] == pytest.approx(0.03 * 0.5)
    assert seeds.claim("keeps 99 %", part, [seeds.Share(x, 0.99) for x in whole])["verdict"] == "contradicted"
    drawn = whole[0].resample(2000)
    assert (entry["low"], entry["high"]) == pytest.approx(tuple(0.03 * np.quantile(drawn, [0.025, 0.975])))


def test_runs_differ_in_their_seed_and_in_nothing_else(seeds, tmp_path):
    def run(name, *changes):
        (tmp_path / name).mkdir()
        save_config(override(load_preset("tiny"), changes), tmp_path / name / "config.json")
        return tmp_path / name

    zero, one, again = run("zero", "seed=0"), run("one", "seed=1"), run("again", "seed=1")
    other = run("other", "seed=2", "stages.s0.steps=7")
    assert [x.preset.seed for x in seeds.opened([zero, one])] == [0, 1]
    with pytest.raises(ValueError, match="one and .*again are of one seed, 1"):
        seeds.opened([zero, one, again])
    steps = load_preset("tiny").stages["s0"].steps
    with pytest.raises(ValueError, match=f"other differ in more than their seed: stages.s0.steps {steps} -> 7"):
        seeds.opened([zero, other])


def test_obedience_has_one_value_a_query_whatever_the_number_of_instructions(seeds):
    """A model that answers by kind obeys one of two instructions, for every query: there is nothing to doubt."""
    instructions = importlib.import_module("instructions")
    first = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    under = [scored(values).datasets[0] for values in (first, 1 - first)]
    found = instructions.obedience("which-kind", under)
    assert found.values.tolist() == [0.5] * 5 and found.ci == (0.5, 0.5)


def test_how_often_a_teacher_is_right_counts_its_highest_margin(seeds, tmp_path):
    teacher = importlib.import_module("teacher")
    rows = {"0": {"7": 0.5, "3": -1.0}, "1": {"2": -0.1, "4": 0.0}}  # of each query the right document comes first
    write_json(tmp_path / "s2" / "teacher.json", {"text_to_image": rows, "moment": {"0": {"9": -3.0, "1": -4.0}}})
    assert teacher.agreement(seeds.SeedRun(tmp_path, load_preset("tiny"))) == pytest.approx(2 / 3)


def test_models_of_different_seeds_are_no_pair(seeds):
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        seeds.paired([scored([1.0]), scored([0.0])], [scored([1.0])])


def test_the_parts_of_z_are_those_of_a_loop_over_equation_1(seeds):
    """Two of three queries ask for one document; temperature 0.2, and scores 0.3 above the positive are masked."""
    rng = np.random.default_rng(3)
    vectors = {name: x / np.linalg.norm(x) for name in "abcxyuvw" for x in [rng.normal(size=3).astype(np.float32)]}
    model = type("Fixed", (), {"encode": lambda self, rows, instruction: np.stack([vectors[row] for row in rows])})()
    own = {"queries": ["a", "b", "c"], "positives": ["x", "y", "x"], "negatives": [["u"], ["v"], ["w"]]}
    batch = Batch("n", "t", "i", **own, positive_ids=[0, 1, 0], negative_ids=[[2], [3], [4]])
    found = importlib.import_module("terms").parts_of_z(model, batch, temperature=0.2, margin=0.3)

    z = dict.fromkeys(found, 0.0)
    seen, masked = dict.fromkeys(found, 0), dict.fromkeys(found, 0)
    for query, positive, (negative,) in zip(*own.values(), strict=True):
        others = [(q, d) for q, d, _ in zip(*own.values(), strict=True) if d != positive]
        pairs = {"positive": [(query, positive)], "hard_negative": [(query, negative)]}
        pairs["query_document"] = [(query, d) for _, d in others]
        pairs["query_query"] = [(query, q) for q, _ in others]
        pairs["document_document"] = [(positive, d) for _, d in others]
        above = vectors[query] @ vectors[positive] + 0.3
        scores = {name: [vectors[a] @ vectors[b] for a, b in those] for name, those in pairs.items()}
        kept = {name: [s for s in those if name == "positive" or s <= above] for name, those in scores.items()}
        total = sum(np.exp(s / 0.2) for those in kept.values() for s in those)
        for name in found:
            z[name] += sum(np.exp(s / 0.2) for s in kept[name]) / total / 3
            seen[name] += len(scores[name])
            masked[name] += len(scores[name]) - len(kept[name])
    assert {name: x["of_z"] for name, x in found.items()} == pytest.approx(z, rel=1e-4)
    assert {name: x["masked"] for name, x in found.items()} == pytest.approx({n: masked[n] / seen[n] for n in seen})
    assert 0 < sum(masked.values()) < sum(seen.values())


def test_the_page_says_what_the_results_hold(seeds):
    page = importlib.import_module("page")
    assert page.page() == page.PAGE.read_text(), "run benchmarks/findings/page.py"
    for name in page.FIGURES:
        assert (seeds.RESULTS / f"{name}.png").is_file()


def test_every_choice_is_another_setting_than_the_presets(seeds):
    """Else a pair of trainings would compare a setting with itself."""
    choices, preset = importlib.import_module("choices").CHOICES, load_preset("tiny")
    same = [name for name, choice in choices.items() if override(preset, choice.instead) == preset]
    assert [name for name in same if not choices[name].instead_of] == []
