"""The same seed gives the same data and the same figures: in other processes, and in other versions of Python."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_world import enter_fake_world, small_preset
from task_digest import TURNS, digests

from q3vl_mini import stages

HERE = Path(__file__).parent
QUICK = ["concept", "text_to_image", "scene_retrieval", "motion", "visual_document", "similarity", *TURNS]
# Pythons besides this one that have numpy, pillow, resvg-py, torch, safetensors and filelock: paths, separated like
# those in PATH
OTHERS = [path for path in os.environ.get("Q3VL_MINI_PYTHONS", "").split(os.pathsep) if path]


def printed(python: str, hash_seed: str, rows: int, names: list[str]) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(HERE.parent)}
    command = [python, str(HERE / "task_digest.py"), str(rows), *names]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def lines(found: dict[str, tuple[str, str]]) -> str:
    return "".join(f"{name} {words} {pixels}\n" for name, (words, pixels) in found.items())


def test_tasks_are_the_same_words_and_pixels_in_processes_that_hash_otherwise():
    here = digests(4, QUICK)
    assert len({digest for pair in here.values() for digest in pair}) > len(QUICK)
    with ThreadPoolExecutor(2) as pool:
        for there in pool.map(lambda seed: printed(sys.executable, seed, 4, QUICK), ("0", "4711")):
            assert there == lines(here)
    assert digests(5, QUICK[:2]) != {name: here[name] for name in QUICK[:2]}  # the comparison can fail


@pytest.mark.hard
@pytest.mark.skipif(not OTHERS, reason="no other Pythons in Q3VL_MINI_PYTHONS")
def test_tasks_are_the_same_in_other_versions_of_python():
    here = lines(digests(8))
    for python in OTHERS:
        assert printed(python, "1", 8, []) == here, python


def test_tasks_drawn_by_several_threads_are_those_of_one():
    here = {name: digests(3, [name])[name] for name in QUICK}
    for workers in (2, 6):
        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip(QUICK, pool.map(lambda name: digests(3, [name])[name], QUICK), strict=True))
        assert found == here


def test_two_runs_of_one_seed_have_the_same_weights_and_losses(small_checkpoint, tmp_path, monkeypatch):
    enter_fake_world(monkeypatch.setattr)
    weights, losses = [], []
    for name in ("one", "two"):
        run = stages.Run(small_preset(small_checkpoint), tmp_path / name, progress=False, tracker="none")
        stages.run_stage(run, "bootstrap")
        stages.run_stage(run, "s0")
        weights.append([f.read_bytes() for f in sorted(run.folder.glob("*/model/*.safetensors"))])
        log = (run.folder / "s0" / "log.jsonl").read_text().splitlines()
        losses.append([[json.loads(row)[key] for key in ("loss", "grad_norm")] for row in log])
        shutil.rmtree(run.folder)
    assert weights[0] == weights[1] and len(weights[0]) >= 2 and losses[0] == losses[1]
