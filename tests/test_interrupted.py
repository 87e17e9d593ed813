"""A run killed at any moment goes on, and ends with the weights of a run that was not killed, bit for bit."""

import json
import random
import sys

import killed_run
import numpy as np
import pytest
from fake_world import small_preset

from q3vl_mini.choices import STAGES
from q3vl_mini.config import save_config

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def command(config, folder):
    places = ["--config", str(config), "--folder", str(folder), "--results", f"{folder}.json"]
    return ["run", *places, "--quiet", "--tracker", "none"]


@pytest.fixture(scope="module")
def config(small_checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "fake.json"
    save_config(small_preset(small_checkpoint), file)
    return file


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert killed_run.run(command(config, folder)) == 0
    return folder


def weights(folder):
    files = [*folder.glob("*/model/*.safetensors")]
    assert {file.parents[1].name for file in files} == set(STAGES)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def curves(folder):
    """Loss, rate and gradient of every step of every stage."""
    rows = {}
    for stage in STAGES:
        log = [json.loads(row) for row in (folder / stage / "log.jsonl").read_text().splitlines()]
        rows[stage] = [{k: v for k, v in row.items() if k != "seconds"} for row in log]
    return rows


def assert_same(folder, whole):
    assert weights(folder) == weights(whole) and curves(folder) == curves(whole)
    one, other = (json.loads((f.parent / f"{f.name}.json").read_text()) for f in (folder, whole))
    assert one["models"] == other["models"] and one["unseen_styles"] == other["unseen_styles"]
    for stage in STAGES:
        for mined in ("mined.json", "teacher.json"):
            files = [f / stage / mined for f in (folder, whole)]
            assert not files[1].exists() or files[0].read_text() == files[1].read_text()
    left_over = [f.name for f in folder.rglob("*") if f.name.endswith((".new", ".old", ".partial", "state"))]
    assert not left_over and not list(folder.glob("vectors-*"))


@pytest.mark.slow
def test_a_run_killed_before_a_move_within_one_and_within_a_file_ends_like_a_whole_one(config, whole, tmp_path):
    folder, stages = tmp_path / "run", []
    # an early write, then ever later ones of what is left: text, tensors and moves, before and half done
    for call, before in [(1, False), (6, True), (9, False), (16, True), (23, False), (30, True)]:
        assert killed_run.run(command(config, folder), call=call, before=before) == -9
        stages.append(sum((folder / stage / "metrics.json").is_file() for stage in STAGES))
    assert stages == sorted(stages) and len(set(stages)) >= 3  # it got on, and was killed in several stages
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("*/metrics.json")}
    assert killed_run.run(command(config, folder)) == 0
    assert finished and all(file.stat().st_mtime_ns == time for file, time in finished.items())  # not done again
    assert_same(folder, whole)


@pytest.mark.hard
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_20_random_moments_ends_like_a_whole_one(config, whole, tmp_path, seed):
    rng, kills, runs = random.Random(seed), [], 0
    while len(kills) < 20:
        runs, folder = runs + 1, tmp_path / f"run{runs}"
        while True:  # one run, killed again and again until it comes through or 20 kills are reached
            after = rng.choice([{"seconds": rng.uniform(0.2, 6)}, {"call": rng.randint(1, 60)}])
            late, before = {} if len(kills) >= 20 else after, rng.random() < 0.5
            status = killed_run.run(command(config, folder), **late, before=before)
            if status == 0:
                break
            assert status == -9
            done = [stage for stage in STAGES if (folder / stage / "metrics.json").is_file()]
            kills.append((len(done), late, before))
        assert_same(folder, whole)
    print(f"{runs} runs, killed after so many stages: {np.bincount([n for n, *_ in kills]).tolist()}; {kills}")
    assert len({n for n, *_ in kills}) >= 4


@pytest.mark.slow
def test_the_comparison_can_fail(config, whole, tmp_path):
    saved = json.loads(config.read_text())
    saved["stages"]["s1"]["lr"] *= 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps(saved))
    assert killed_run.run(command(other, tmp_path / "run")) == 0
    same = {name: content == weights(whole)[name] for name, content in weights(tmp_path / "run").items()}
    assert same["s0/model/adapter_model.safetensors"] and not same["s1/model/adapter_model.safetensors"]
