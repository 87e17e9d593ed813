"""docs/performance.md and docs/reliability.md show what results/performance holds; every figure has its script."""

import json

import pytest

from q3vl_mini.config import data_dir
from q3vl_mini.report import MARKED

ROOT = data_dir().parent
FILES = sorted((ROOT / "results" / "performance").glob("*.json"))


@pytest.fixture
def update_performance(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import update_performance

    return update_performance


def test_the_table_of_tower_sizes_is_that_of_its_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tower_sizes

    shown = tower_sizes.PAGE.read_text(encoding="utf-8")
    content = json.loads((ROOT / "results" / "tower_sizes.json").read_text(encoding="utf-8"))
    assert tower_sizes.page(shown, content) == shown and set(content["variants"]) == set(tower_sizes.VARIANTS)


def test_the_pages_show_the_results(update_performance):
    assert update_performance.write(check=True), "run scripts/update_performance.py"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_results_are_of_a_benchmark_that_a_page_shows(file, update_performance):
    assert (ROOT / "benchmarks" / f"{file.stem}.py").is_file()
    names = [match[2] for page in update_performance.PAGES for match in MARKED.finditer(page.read_text("utf-8"))]
    assert names.count(f"performance:{file.stem}") == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_bar_is_reached_by_the_measured_value_or_it_says_not(file):
    rows = [row for row in json.loads(file.read_text("utf-8"))["rows"] if "bar" in row]
    for row in rows:
        low = row["bar"][0] if row["sense"] != "at most" else float("-inf")
        high = row["bar"][-1] if row["sense"] != "at least" else float("inf")
        assert row["met"] == (low <= row["value"] <= high), row
        if "range" in row:
            assert row["rounds"] >= 5 and row["range"][0] <= row["value"] <= row["range"][1], row


def test_the_page_shows_a_result_as_its_file_has_it_and_says_what_is_not_measured(update_performance):
    row = {"compared": "theirs over ours, time", "value": 2.345, "sense": "at least", "bar": [3.0], "met": False}
    text = "Before.\n<!-- performance:{0}:begin -->\nold\n<!-- performance:{0}:end -->\n"
    text = text.format("rerank") + text.format("encode")
    page = update_performance.page(text, {"rerank": {"setting": "100 documents", "threads": 1, "rows": [row]}})
    assert "| theirs over ours, time | 2.35 |  | ≥ 3.0 | no |" in page and "100 documents. Threads: 1." in page
    assert page.count("Before.") == 2 and page.count("Not measured yet.") == 1 and "old" not in page
