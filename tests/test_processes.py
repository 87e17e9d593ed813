"""One command in two processes of this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells a child of its parent's end")
def test_the_processes_end_with_the_one_that_started_them_even_where_the_shell_ignores_interrupts(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell does for `nohup … &`
    code += "if __name__ == '__main__':\n    from q3vl_mini.processes import in_processes\n"
    code += f"    in_processes('group_main', [{str(tmp_path)!r}, 'wait'], 2)\n"
    (tmp_path / "start.py").write_text(code)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], env=environment)
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2 or parent.poll() is not None, 120)
        workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)), 30)
    assert not any(map(psutil.pid_exists, workers))


def wait_until(there, seconds):
    until = time.monotonic() + seconds
    while not there() and time.monotonic() < until:
        time.sleep(0.1)


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
