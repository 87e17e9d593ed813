"""One command in two processes of this machine."""

import os
from pathlib import Path

import pytest

from q3vl_mini import cli, processes


@pytest.mark.parametrize("status", [0, 3])
def test_two_processes_are_one_group_and_a_failure_is_that_of_the_command(status, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    before = dict(os.environ)
    assert processes.in_processes("group_main", [str(tmp_path), str(status)], 2) == status
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[0, 1] 1"] * 2
    assert dict(os.environ) == before


def test_cores_are_shared_where_nobody_says_how_many_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = {}
    monkeypatch.setattr(processes, "spawn", lambda *_, nprocs, **__: seen.update(os.environ, n=nprocs))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert processes.in_processes("group_main", [], 3) == 0
    assert seen["n"] == 3 and seen["OMP_NUM_THREADS"] == "2" and "OMP_NUM_THREADS" not in os.environ


def test_run_starts_its_processes_once(monkeypatch):
    started = []
    monkeypatch.setattr(processes, "in_processes", lambda *arguments: started.append(arguments) or 0)
    command = ["run", "--preset", "tiny", "--processes", "2"]
    assert cli.main(command) == 0
    assert started == [("q3vl_mini.cli", command, 2)]
    monkeypatch.setenv("RANK", "1")  # one of them, or of accelerate's
    assert cli.main([*command, "--preset", "none"]) == 1 and len(started) == 1
