"""All stages end to end on a small random checkpoint and a made-up world, through the command line's main()."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_world import FAKE, enter_fake_world, fake_quadruple, small_preset
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import run_in_two_processes

from q3vl_mini import backbone, cli, pipeline, stages
from q3vl_mini.backbone import LORA_MODULES
from q3vl_mini.choices import STAGES
from q3vl_mini.config import load_config, load_preset, preset_names, save_config
from q3vl_mini.disk import alone, lock_of
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world import tasks
from q3vl_mini.public_data.sets import SETS
from q3vl_mini.reranker import Reranker


@pytest.fixture
def fake_world(monkeypatch):
    enter_fake_world(monkeypatch.setattr)


def test_one_command_runs_all_stages_and_writes_the_results(
    small_checkpoint, fake_world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(stages, "ROWS_IN_MEMORY", 4)  # mining reads its vectors from disk
    save_config(small_preset(small_checkpoint), tmp_path / "fake.json")
    folder, results = tmp_path / "run", tmp_path / "results" / "fake.json"
    command = ["run", "--config", str(tmp_path / "fake.json"), "--folder", str(folder), "--results", str(results)]
    cli.main([*command, "--seed", "3", "--quiet"])

    written = json.loads(results.read_text())
    models = ["raw", "s0", "s1", "s2", "s3", "s3+reranker"]
    assert list(written["models"]) == models and list(written["unseen_styles"]) == models[:-1]
    assert set(written["models"]["s3"]) == {*FAKE.values(), "mean", "datasets"}
    assert set(written["models"]["s3"]["sts"]) == {"score", "metric", "n_queries", "n_candidates", "chance", "ci"}
    assert set(written["unseen_styles"]["s3"]) == {"hit@1", "hit@10", "n"} and written["unseen_styles"]["s3"]["n"] == 24
    meta = written["meta"]
    assert (meta["seed"], meta["preset"]) == (3, "fake") and meta["peak_rss_mb"] > 100
    assert set(meta["stage_wall_s"]) == {*STAGES, "evaluation"}
    kept = {place.name for place in (folder / "evaluation").iterdir() if place.is_dir()}
    assert kept == {"raw", "s0", "s1", "s2", "s3"}  # s3+reranker starts from the vectors of s3
    early = folder / "s0" / "metrics.json"  # a stage that another process ran, with more memory than this one
    early.write_text(json.dumps(json.loads(early.read_text()) | {"peak_rss_mb": 10**6}))
    walls = meta["stage_wall_s"]
    assert pipeline.run_meta(stages.Run(load_config(folder / "config.json"), folder), walls)["peak_rss_mb"] == 10**6
    assert results.with_suffix(".png").stat().st_size > 1000
    assert re.search(r"^\| s3\+reranker \|", capsys.readouterr().out, re.M)

    curves = EventAccumulator(str(folder / "curves"))
    curves.Reload()
    log = [json.loads(line) for line in (folder / "s0" / "log.jsonl").read_text().splitlines()]
    assert [event.value for event in curves.Scalars("s0/loss")] == pytest.approx([row["loss"] for row in log])

    vectors, steps = {}, {}
    for stage in STAGES:
        files = {file.name for file in (folder / stage).iterdir()}
        assert {"model", "log.jsonl", "metrics.json", "curve.png"} <= files and "state" not in files
        assert set(json.loads((folder / stage / "metrics.json").read_text())["validation"]) == {"before", "after"}
        kind = Reranker if stage == "reranker" else Embedder
        model = kind(folder / stage / "model")
        assert model.card["stage"] == stage and model.template == "report"
        if kind is Embedder:
            assert model.quantizers.of(64, "int8").initialised
            steps[stage] = model.quantizers.of(64, "int8").step.item()
            vectors[stage] = model.encode(["a red cat"])[0]
    raw = Embedder(small_checkpoint, template="report").encode(["a red cat"])[0]
    for name, start in {"s0": raw, "s1": vectors["s0"], "s2": vectors["s1"], "s3": vectors["s1"]}.items():
        assert np.abs(vectors[name] - start).max() > 1e-4, name
    merged = json.loads((folder / "s3" / "metrics.json").read_text())
    assert merged["adapter_error"] < 1e-4 and len(merged["a"]) == 2  # rank 4 + 4 fits into 8 exactly
    assert steps["s1"] != steps["s2"] and steps["s3"] == pytest.approx((steps["s1"] + steps["s2"]) / 2, rel=1e-5)

    mined = {stage: json.loads((folder / stage / "mined.json").read_text()) for stage in ("s0", "s1", "reranker", "s2")}
    assert "alike" not in mined["s1"]["labels"] and set(mined["reranker"]["labels"]) == {"find"}
    assert mined["reranker"]["labels"]["find"] == mined["s1"]["labels"]["find"]
    kept = mined["s1"]["labels"]["find"]
    assert sum(kept["histograms"]["positives"]) == kept["report"]["positives_kept"] > 0
    assert not list(folder.glob("vectors-*"))
    teacher = json.loads((folder / "s2" / "teacher.json").read_text())["find"]
    assert len(teacher) == len(mined["s2"]["labels"]["find"]["rows"]) and all(len(row) == 2 for row in teacher.values())
    reranker, asked = Reranker(folder / "reranker" / "model"), fake_quadruple("find", seed=3)
    for i, (row, positives, negatives) in enumerate(mined["s2"]["labels"]["find"]["rows"]):
        pairs = [(asked.queries[row], asked.corpus[d]) for d in (positives[0], negatives[0])]
        margins = reranker.logits(pairs, instruction=asked.instruction).tolist()
        assert [teacher[str(i)][str(d)] for d in (positives[0], negatives[0])] == pytest.approx(margins, abs=1e-4)

    # again: nothing is trained or evaluated a second time, and the saved configuration gives the same results
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    cli.main(
        ["run", "--config", str(folder / "config.json"), "--folder", str(folder), "--results", str(results), "--quiet"]
    )
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert json.loads(results.read_text())["models"] == written["models"]


def test_checkpointing_changes_memory_and_not_the_training(small_checkpoint, fake_world, tmp_path):
    preset, losses = small_preset(small_checkpoint), []
    for on in (False, True):
        run = stages.Run(replace(preset, checkpointing=on), tmp_path / str(on), progress=False, tracker="none")
        model = run.model("raw", trainable=True)
        assert backbone.inner(model.model).is_activation_checkpointing == on
        stages.run_stage(run, "bootstrap")
        log = (run.folder / "bootstrap" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] != losses[0][-1]


def test_rank_zero_trains_the_full_weights_of_the_language_model_and_not_the_tower(
    small_checkpoint, fake_world, tmp_path
):
    preset = replace(small_preset(small_checkpoint), lora_rank=0)
    run = stages.Run(preset, tmp_path, progress=False, tracker="none")
    for stage in ("bootstrap", "s0"):
        stages.run_stage(run, stage)
    before, after = (run.model(stage).model.state_dict() for stage in ("raw", "bootstrap"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or name == "lm_head.weight" for name in changed)
    assert {part for name in changed for part in name.split(".") if part in LORA_MODULES} == set(LORA_MODULES)
    again = run.model("s0", trainable=True)  # the next stage trains what this one wrote
    assert not isinstance(again.model, PeftModel)
    assert any(p.requires_grad for p in again.model.parameters())
    log = [json.loads(row)["loss"] for row in (tmp_path / "bootstrap" / "log.jsonl").read_text().splitlines()]
    assert log[-1] != log[0]


def test_what_takes_adapters_refuses_full_weights_before_it_begins(small_checkpoint, fake_world, tmp_path):
    preset = replace(small_preset(small_checkpoint), lora_rank=0)
    with pytest.raises(ValueError, match="takes adapters.*q3vl-mini train"):
        pipeline.run(preset, tmp_path / "run", progress=False)
    run = stages.Run(preset, tmp_path / "stage", progress=False, tracker="none")
    with pytest.raises(ValueError, match="is an adapter.*merge it first"):
        run.load("s0", trainable=True)
    with pytest.raises(ValueError, match="takes adapters"):
        stages.run_stage(run, "s3")


def worker(rank, checkpoint, folder):
    enter_fake_world()
    pipeline.run(replace(small_preset(checkpoint), shard=True), folder, progress=False, tracker="none")


@pytest.mark.slow
def test_two_processes_run_all_stages_with_split_weights_and_mine_what_one_mines(
    small_checkpoint, fake_world, tmp_path
):
    run_in_two_processes(worker, str(small_checkpoint), str(tmp_path / "two"))
    alone = stages.Run(small_preset(small_checkpoint), tmp_path / "one", progress=False, tracker="none")
    for stage in ("bootstrap", "s0"):
        stages.run_stage(alone, stage)
    mined = [json.loads((tmp_path / part / "s0" / "mined.json").read_text())["labels"] for part in ("one", "two")]
    assert mined[0] == mined[1] and set(mined[0]) == {"find", "look"}
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert list(results["models"]) == ["raw", "s0", "s1", "s2", "s3", "s3+reranker"]
    assert (tmp_path / "two" / "evaluation" / "s3+reranker").is_dir()  # not in the files that the other writes for s3
    assert not list((tmp_path / "two").glob("*/*-of-2.json"))  # what they handed each other is gone


def test_what_is_left_is_what_the_last_run_needed_at_this_runs_pace():
    last = {"s0": 100.0, "s1": 200.0, "evaluation": 400.0}
    assert pipeline.minutes_left({"s0": 150.0}, last) == pytest.approx(1.5 * 600 / 60)
    assert pipeline.minutes_left({"s0": 50.0, "s1": 100.0}, last) == pytest.approx(0.5 * 400 / 60)
    assert pipeline.minutes_left({"bootstrap": 50.0}, last) is None  # the last run had other stages


def test_a_folder_of_another_configuration_is_refused(small_checkpoint, fake_world, tmp_path):
    preset = small_preset(small_checkpoint)
    stages.Run(preset, tmp_path, progress=False)
    changed = replace(preset, seed=9, stages={**preset.stages, "s0": replace(preset.stages["s0"], lr=0.25)})
    with pytest.raises(ValueError, match=r"another configuration: seed 0 -> 9, stages\.s0\.lr 0\.005 -> 0\.25"):
        stages.Run(changed, tmp_path, progress=False)


def test_a_folder_in_which_another_run_is_at_work_is_refused(small_checkpoint, fake_world, tmp_path, capsys):
    save_config(small_preset(small_checkpoint), tmp_path / "fake.json")
    (tmp_path / "pairs.csv").write_text("query,positive\na,b\n")
    begun, new = tmp_path / "begun", tmp_path / "new"
    stages.Run(small_preset(small_checkpoint), begun, progress=False, tracker="none")
    options = ["--config", str(tmp_path / "fake.json"), "--quiet", "--tracker", "none"]
    commands = [["run", *options], ["train", "bootstrap", *options], ["pretrain"]]
    commands += [["finetune", str(tmp_path / "pairs.csv"), "--model", str(small_checkpoint), "--quiet"]]
    for folder in (begun, new):
        with alone(lock_of(folder)):
            before = sorted(folder.rglob("*"))
            for command in commands if folder is new else commands[:2]:
                assert cli.main([*command, "--folder", str(folder)]) == 1
                assert f"another process is at work in {folder}" in capsys.readouterr().err
            assert sorted(folder.rglob("*")) == before


def test_resume_goes_on_with_the_configuration_of_the_folder(small_checkpoint, fake_world, tmp_path, capsys):
    resume = ["train", "bootstrap", "--resume", "--folder", str(tmp_path / "run"), "--quiet", "--tracker", "none"]
    assert cli.main(resume) == 1 and "nothing to resume" in capsys.readouterr().err
    stages.Run(small_preset(small_checkpoint), tmp_path / "run", progress=False, tracker="none")
    assert cli.main(resume) == 0
    assert (tmp_path / "run/bootstrap/metrics.json").is_file()
    assert cli.main([*resume, "--set", "stages.s0.lr=0.25"]) == 1
    assert "stages.s0.lr 0.005 -> 0.25" in capsys.readouterr().err


def test_what_a_killed_mining_left_behind_is_cleared_away(small_checkpoint, fake_world, tmp_path):
    run = stages.Run(small_preset(small_checkpoint), tmp_path, progress=False, tracker="none")
    (tmp_path / "vectors-abc").mkdir()
    (tmp_path / "vectors-abc" / "corpus.npy").write_bytes(b"large")
    stages.run_stage(run, "bootstrap")
    assert not (tmp_path / "vectors-abc").exists()


def test_a_stage_without_its_forerunner_says_what_to_run(small_checkpoint, fake_world, tmp_path):
    run = stages.Run(small_preset(small_checkpoint), tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="no finished stage 's0'.*run it first"):
        stages.run_stage(run, "s1")


def test_an_interrupted_stage_goes_on_and_ends_like_an_uninterrupted_one(
    small_checkpoint, fake_world, tmp_path, monkeypatch
):
    preset = small_preset(small_checkpoint)
    whole, cut = (stages.Run(preset, tmp_path / name, progress=False) for name in ("whole", "cut"))
    stages.run_stage(whole, "bootstrap")
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *a, **k: fit(*a, **k, stop_after=2) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stages.run_stage(cut, "bootstrap")
    assert not cut.finished("bootstrap")
    monkeypatch.setattr(stages, "fit", fit)
    stages.run_stage(cut, "bootstrap")
    one, other = ((run.folder / "bootstrap/model/adapter_model.safetensors").read_bytes() for run in (whole, cut))
    assert one == other


@pytest.mark.parametrize("name", preset_names())
def test_a_shipped_preset_is_complete_and_survives_saving(name, tmp_path):
    preset = load_preset(name)
    assert preset.name == name and set(preset.stages) - {"bootstrap"} == {"s0", "s1", "reranker", "s2"}
    assert preset.stages["s0"].mining.miner == ("bootstrap" if "bootstrap" in preset.stages else "raw")
    columns = {name: info.column for name, info in tasks.TASKS.items()} | {name: s.task for name, s in SETS.items()}
    unknown = {task for stage in preset.stages.values() for task in stage.tasks} - set(columns)
    assert not unknown
    # graded pairs are no positives for InfoNCE
    assert "sts" not in {columns[task] for stage in ("s0", "reranker", "s2") for task in preset.stages[stage].tasks}
    mining, reranker = preset.stages["s1"].mining, preset.stages["reranker"]
    assert reranker.start == "raw"  # the report trains it from the backbone, not from s0
    assert reranker.mining in (None, mining) and set(reranker.tasks) <= set(preset.stages["s1"].tasks)
    assert reranker.n_random if reranker.mining is None else reranker.n_negatives
    save_config(preset, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == preset


@pytest.mark.parametrize(
    "text,message",
    [
        ('name = "x"\nbackbone = "y"\nlearning_rate = 1\n[stages]', r"top level has unknown keys \['learning_rate'\]"),
        ('name = "x"\nbackbone = "y"\n[stages.s0]\nstep = 5', r"stages.s0 has unknown keys \['step'\].*'steps'"),
        ('name = "x"\nbackbone = "y"\n[stages.s0]\nsteps = 1.5', "stages.s0.steps is 1.5; expected int"),
        ('name = "x"\nbackbone = "y"\n[stages.s0]\nterms = ["qq"]', r"stages.s0: unknown terms \['qq'\]"),
        ('name = "x"\n[stages]', r"top level lacks \['backbone'\]"),
    ],
)
def test_a_wrong_preset_is_refused_by_place(tmp_path, text, message):
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_preset(tmp_path / "wrong.toml")


def test_an_unknown_preset_lists_those_that_exist():
    with pytest.raises(FileNotFoundError, match="colab.*full.*tiny"):
        load_preset("huge")


def test_help_shows_examples_of_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"q3vl-mini {command}" in out for command in ("run", "train", "eval", "pretrain", "data"))


def test_training_data_can_be_spoiled_at_a_stated_rate():
    preset = load_preset("tiny")
    config = replace(preset.stages["s1"], tasks={"keyword_search": 40, "group": 40, "similarity": 40})
    clean = stages.training_data(config, 0, preset.data)
    noise = {"wrong_labels": 0.2, "unlabelled_duplicates": 0.1}
    spoiled = stages.training_data(config, 0, replace(preset.data, **noise))
    wrong = [
        sum(not set(a.positives) & set(b.positives) for a, b in zip(one.relevance, other.relevance, strict=True))
        for one, other in zip(clean, spoiled, strict=True)
    ]
    assert wrong == [8, 0, 0]  # only what InfoNCE learns from: categories and graded pairs are not mined
    assert len(spoiled[0].corpus) > len(clean[0].corpus) and "truth" not in spoiled[0].meta
