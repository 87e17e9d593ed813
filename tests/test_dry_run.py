"""A dry run goes through every stage of a large preset, with the preset's own settings, in the size of a test."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
from fake_world import FAKE, fake_quadruple
from safetensors.torch import load_file, save_file

from q3vl_mini import cli, pipeline, sharding, train, zero
from q3vl_mini import dry_run as dry
from q3vl_mini.config import differences, load_config, load_preset
from q3vl_mini.dry_run import dry_run, public_sets, shrunk, told, usable_dtype, with_stand_ins
from q3vl_mini.emoji_world import tasks
from q3vl_mini.public_data.sets import SETS
from q3vl_mini.stages import Run

SIZES = {"steps", "batch_size", "chunk_tokens", "probe", "test_rows", "test_documents", "validation_rows", "public"}
SIZES |= {"train_documents", "name", "backbone", "dtype", "dims", "dim_weights", "rerank_top_k"}


@pytest.fixture
def small_evaluation(monkeypatch):
    """Training data is the preset's; the evaluation, which costs most, has four made-up tasks."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(tasks, "benchmark", lambda split, n, seed: [fake_quadruple(k, split, 9, seed) for k in FAKE])
    styles = [replace(fake_quadruple("find", "test", 9, i), name=f"unseen/{i}") for i in (1, 2)]
    monkeypatch.setattr(tasks, "unseen_styles", lambda seed: styles)


@pytest.fixture
def stand_in(small_checkpoint, tmp_path):
    """The small checkpoint with a fresh model's small weights: its vectors are alike, and so above every t+."""
    folder = shutil.copytree(small_checkpoint, tmp_path / "stand-in")
    weights = load_file(folder / "model.safetensors")
    small = {name: x / 4 if x.ndim > 1 else x for name, x in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colab", "full"])
def test_every_stage_of_a_large_preset_goes_through(name, stand_in, small_evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parts = []  # of each batch that the gradient cache split
    split = train.split_rows
    monkeypatch.setattr(train, "split_rows", lambda *a, **k: parts.append(split(*a, **k)) or parts[-1])
    folder = tmp_path / "dry"
    command = ["run", "--preset", name, "--dry-run", "--backbone", str(stand_in), "--folder", str(folder)]
    assert cli.main([*command, "--quiet", "--tracker", "none"]) == 0

    results, preset = json.loads((folder / "results.json").read_text()), load_preset(name)
    assert list(results["models"]) == ["raw", "s0", "s1", "s2", "s3", "s3+reranker"]
    assert results["meta"]["preset"] == f"{name}-dry-run" and results["meta"]["computed_in"] == usable_dtype("float16")
    for stage in [*preset.stages, "s3"]:
        assert (folder / stage / "model" / "adapter_model.safetensors").is_file(), stage
    for stage, config in preset.stages.items():
        log = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
        assert len(log) == 2 and all(row["loss"] > 0 for row in log), stage
        if config.mining:
            mined = json.loads((folder / stage / "mined.json").read_text())
            assert mined["mining"]["k"] == config.mining.k and mined["labels"], stage
            assert set(mined["labels"]) & SETS.keys(), stage
    assert sum(len(x) > 1 for x in parts) >= 4, "batches that do not fit at once"
    prepared = folder / "public" / "prepared"
    assert all((prepared / f"{x}-{preset.seed}" / "card.json").is_file() for x in public_sets(preset))

    assert "steps" in capsys.readouterr().out
    assert cli.main(command) == 1 and "a dry run that is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_models_that_are_measured_side_by_side_score_as_one_after_the_other(stand_in, tmp_path, monkeypatch):
    folder, shares, popen = tmp_path / "dry", [], subprocess.Popen
    counted = SimpleNamespace(Popen=lambda command, **how: shares.append(command[-1]) or popen(command, **how))
    monkeypatch.setattr(pipeline, "subprocess", counted)
    command = ["run", "--preset", "tiny", "--dry-run", "--backbone", str(stand_in), "--folder", str(folder), "--quiet"]
    assert cli.main(command) == 0 and len(shares) == 2 and "s3+reranker" in shares[0]

    side_by_side = json.loads((folder / "results.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    config["data"]["evaluators"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "evaluation")
    run = Run(load_config(folder / "config.json"), folder, progress=False, tracker="none")
    records, unseen = pipeline.evaluate_all(run)
    assert len(shares) == 2 and unseen == side_by_side["unseen_styles"]
    for name, columns in records.items():
        measured = {column: record["score"] for column, record in columns.items() if "score" in record}
        others = {column: side_by_side["models"][name][column]["score"] for column in measured}
        assert len(measured) == 14 and measured == pytest.approx(others), name


@pytest.mark.parametrize("name", ["tiny", "colab", "full"])
def test_a_dry_run_changes_sizes_and_nothing_else(name, small_checkpoint):
    preset = load_preset(name)
    for small in (shrunk(preset), with_stand_ins(preset, str(small_checkpoint), "public")):
        changed = {line.split()[0] for line in differences(preset, small)}
        assert {place.rpartition(".")[2] for place in changed if ".tasks." not in place} <= SIZES
        for stage, config in small.stages.items():
            assert config.tasks.keys() == preset.stages[stage].tasks.keys()
            assert config.mining == preset.stages[stage].mining
            assert bool(config.chunk_tokens) == bool(preset.stages[stage].chunk_tokens)
    assert 0 in small.dims and max(small.dims) < 64  # the checkpoint's width
    real = {line.split()[0] for line in differences(preset, shrunk(preset))}
    assert not real & {"backbone", "dtype", "dims", "data.public"}


def test_what_was_made_smaller_is_told_in_a_few_lines():
    preset = load_preset("full")
    said = told(preset, shrunk(preset))
    assert len(said.splitlines()) < 20 and "test_rows 1000 -> 4 (data)" in said
    assert "steps 6000 -> 2 (reranker, s0, s1)" in said
    rows = sum(n for stage in preset.stages.values() for n in stage.tasks.values())
    assert f"{rows} -> 64 each" in said


def test_a_finished_dry_run_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="a dry run that is finished; remove .* or give another folder"):
        dry_run(load_preset("full"), tmp_path)


def test_the_command_names_a_folder_and_results_of_its_own(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("q3vl_mini.commands.dry_run", lambda *a: asked.append(a) or a[1] / "results.json")
    assert cli.main(["run", "--preset", "full", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"].replace("\\", "/") == "runs/full-dry-run/results.json"
    assert cli.main(["run", "--preset", "full", "--dry-run", "real", "--backbone", "q3vl-tiny"]) == 0
    preset, _, real, stand_in, *_ = asked[1]
    assert (asked[0][2], real, stand_in, preset.backbone) == (False, True, None, "q3vl-tiny")


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_launch_is_taken_over_before_accelerate_makes_its_state(name, tmp_path, monkeypatch):
    for module in (sharding, zero):
        monkeypatch.setenv(module.ASKED, "null")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    seen = []
    monkeypatch.setattr(dry, "PartialState", lambda **_: seen.append(os.environ[f"ACCELERATE_USE_{name}"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dry_run(load_preset("tiny"), tmp_path / "run", real=True)
    assert seen == ["false"]
