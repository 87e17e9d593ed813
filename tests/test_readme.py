"""README's table is that of results/tiny.json, and the results hold what their schema promises."""

import json
import subprocess

import numpy as np
import pytest

from q3vl_mini.config import data_dir
from q3vl_mini.emoji_world import tasks

ROOT = data_dir().parent


def committed(path: str) -> str:
    """A file as it was committed: who has run the pipeline has other results, and README still shows ours."""
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, encoding="utf-8")
    return shown.stdout if shown.returncode == 0 else (ROOT / path).read_text(encoding="utf-8")


RESULTS = json.loads(committed("results/tiny.json"))
EMBEDDERS = ("raw", "s0", "s1", "s2", "s3")
COLUMNS = {task.column for task in tasks.TASKS.values()}


def test_readme_shows_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import update_readme

    cards = {stage: json.loads(committed(update_readme.CARDS.format(stage))) for stage in update_readme.SHIPPED}
    assert update_readme.section(RESULTS, cards) in committed("README.md"), "run scripts/update_readme.py"


def test_readme_names_the_columns_whose_interval_reaches_down_to_chance(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import update_readme

    columns = {"low": {"ci": [0.1, 0.3], "chance": 0.1}, "high": {"ci": [0.2, 0.3], "chance": 0.1}}
    columns["mean"] = {"score": 0.2}
    said = update_readme.no_better_than_chance({"raw": columns, "s0": {"high": columns["high"]}})
    assert said == "raw in low"
    assert update_readme.no_better_than_chance({"s0": {"high": columns["high"]}}) == "nothing"


@pytest.mark.parametrize("task", ["image_qa", "video_qa"])
def test_a_guess_by_kind_is_as_often_right_as_a_thousand_guessers(monkeypatch, task):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import update_readme

    quadruple = tasks.build(task, "test", 300, 1)
    kinds = [update_readme.kind_of_answer(answer["text"]) for answer in quadruple.corpus]
    for labels in quadruple.relevance:  # the generator's plausible wrong answers are of the kind of the right one
        assert {kinds[d] for d in (*labels.positives, *labels.negatives)} == {kinds[labels.positives[0]]}
    rng, hits = np.random.default_rng(0), []
    for labels in quadruple.relevance:
        of_kind = [d for d in labels.candidates if kinds[d] == kinds[labels.positives[0]]]
        hits.append(np.mean(rng.choice(of_kind, 1000) == labels.positives[0]))
    assert update_readme.guess_by_kind(task) == pytest.approx(np.mean(hits), abs=0.005)


def test_every_model_has_every_column_with_its_chance_and_interval():
    assert list(RESULTS["models"]) == [*EMBEDDERS, "s3+reranker"]
    for model in EMBEDDERS:
        columns = {name: row for name, row in RESULTS["models"][model].items() if name not in ("mean", "datasets")}
        assert set(columns) == COLUMNS
        for name, row in columns.items():
            low, high = row["ci"]
            assert low <= row["score"] <= high and row["n_queries"] >= 300, (model, name)
            assert row["n_candidates"] > 1 or name == "sts", (model, name)  # graded pairs are not ranked


@pytest.mark.parametrize("model", EMBEDDERS)
def test_the_mean_is_that_of_the_columns(model):
    row = RESULTS["models"][model]
    scores = [row[name]["score"] for name in COLUMNS]
    assert row["mean"]["score"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


def test_unseen_styles_are_measured_for_every_embedder_among_900_candidates_a_style():
    assert list(RESULTS["unseen_styles"]) == list(EMBEDDERS)
    for row in RESULTS["unseen_styles"].values():
        assert 0 <= row["hit@1"] <= row["hit@10"] <= 1 and row["n"] >= 2 * 900
