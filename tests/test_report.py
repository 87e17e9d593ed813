"""Records, the stage table, the results file and the chart say what was measured, and refuse what is incomplete."""

import json

import matplotlib
import numpy as np
import pytest

from q3vl_mini.evaluate import COLUMNS, ColumnResult, DatasetResult, mean_score
from q3vl_mini.report import META_KEYS, PANELS, plot_stage_table, stage_table, write_results


def models():
    """Two models on two data sets of one column and one of another, with figures of every kind."""
    rng = np.random.default_rng(0)

    def result(column, *names):
        sets = [(n, column, COLUMNS[column], rng.random(12), rng.integers(8, 20) / 2, rng.random()) for n in names]
        return ColumnResult(column, tuple(DatasetResult(*s) for s in sets))

    def model():
        return {"image_ret": result("image_ret", "one", "two"), "visdoc": result("visdoc", "pages")}

    return {"s0": model(), "s1": model()}


def fixed(column, score):
    """A column result with the given hit@1 over 10 queries of 4 candidates."""
    values = (np.arange(10) < round(10 * score)).astype(float)
    return ColumnResult(column, (DatasetResult(column, column, COLUMNS[column], values, 4, 0.25),))


def test_the_table_by_hand():
    table = stage_table(
        {"s0": {c: fixed(c, 0.5) for c in ("image_cls", "visdoc")}, "s1": {"image_cls": fixed("image_cls", 0.8)}}
    )
    assert table.splitlines() == [
        "| model | image_cls | visdoc | mean |",
        "| --- | ---: | ---: | ---: |",
        "| s0 | 50.0 | 50.0 | 50.0 |",
        "| s1 | 80.0 | – | – |",  # a mean over other columns would not be comparable
        "| chance | 25.0 | 25.0 | 25.0 |",
        "| candidates | 4 | 4 |  |",
        "| metric | hit@1 | ndcg@5 |  |",
    ]
    low, high = fixed("image_cls", 0.8).ci
    with_intervals = stage_table({"s1": {"image_cls": fixed("image_cls", 0.8)}}, intervals=True)
    assert f"| s1 | 80.0 [{100 * low:.1f}, {100 * high:.1f}] | 80.0 |" in with_intervals


def test_tables_refuse_unknown_columns_and_no_models():
    with pytest.raises(ValueError, match="s0: columns"):
        stage_table({"s0": {"audio": fixed("image_cls", 0.5)}})
    with pytest.raises(ValueError, match="no models"):
        stage_table({})


META = dict.fromkeys(META_KEYS, 0)


def test_results_have_the_schema_of_the_design(tmp_path):
    path, m = tmp_path / "new" / "tiny.json", models()
    write_results(path, META, m, {"s1": {"hit@1": 0.3, "hit@10": 0.6, "n": 900}})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"meta", "models", "unseen_styles"}
    assert set(content["models"]) == {"s0", "s1"}
    for model, record in content["models"].items():
        assert set(record) == {"image_ret", "visdoc", "mean", "datasets"}
        assert record["mean"] == {"score": pytest.approx(mean_score(m[model]))}
        for column in ("image_ret", "visdoc"):
            result = m[model][column]
            assert record[column] == {
                "score": result.score,
                "metric": COLUMNS[column],
                "n_queries": result.n_queries,
                "n_candidates": result.n_candidates,
                "chance": result.chance,
                "ci": list(result.ci),
            }
    assert {name: d["column"] for name, d in content["models"]["s0"]["datasets"].items()} == {
        "one": "image_ret",
        "two": "image_ret",
        "pages": "visdoc",
    }
    assert content["unseen_styles"] == {"s1": {"hit@1": 0.3, "hit@10": 0.6, "n": 900}}
    assert stage_table(content["models"], intervals=True) == stage_table(m, intervals=True)
    assert [p.name for p in path.parent.iterdir()] == ["tiny.json"]


def test_incomplete_results_are_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"meta lacks \['git'\]"):
        write_results(path, {k: 0 for k in META_KEYS if k != "git"}, models(), {})
    with pytest.raises(ValueError, match="unseen_styles of s1"):
        write_results(path, META, models(), {"s1": {"hit@1": 0.3}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, META | {"wall_s": float("nan")}, models(), {})
    assert path.read_text() == "old"


def test_the_chart_shows_every_column_and_names_every_model(tmp_path):
    backend = matplotlib.get_backend()
    m = {name: {c: fixed(c, s) for c in COLUMNS} for name, s in (("s0", 0.4), ("s1", 0.8))}
    figure = plot_stage_table(m, tmp_path / "figures" / "stages.png")
    assert matplotlib.get_backend() == backend
    assert (tmp_path / "figures" / "stages.png").read_bytes().startswith(b"\x89PNG")
    shown = [t.get_text() for axis in figure.axes for t in axis.texts]
    assert sorted(t.rsplit(" ", 1)[0] for t in shown) == sorted([*COLUMNS, "mean", "mean", "mean"])
    assert all(t.endswith(" 80") for t in shown)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["chance", "s0", "s1"]
    for axis in figure.axes:
        heights = sorted(t.xy[1] for t in axis.texts)
        assert min(np.diff(heights)) >= 4.49  # labels of equal scores do not lie on each other


def test_a_chart_of_a_part_has_only_its_panels():
    figure = plot_stage_table({"s0": {"visdoc": fixed("visdoc", 0.5)}})
    assert [axis.get_title() for axis in figure.axes] == ["Documents and text"]


def test_every_column_has_a_panel():
    assert sorted(c for columns in PANELS.values() for c in columns) == sorted(COLUMNS)
