"""Jobs in several processes: order, number, failures, and what is told of them."""

import subprocess
import sys
import time

import psutil
import pytest

from q3vl_mini.side_by_side import Job, work_off


def noting(folder, name, seconds=0.0, more=""):
    """Code that writes when it began and ended."""
    return (
        f"import time; a = time.time(); time.sleep({seconds}); {more}\n"
        f"open({str(folder / name)!r}, 'w').write(f'{{a}} {{time.time()}}')"
    )


def times(folder):
    return {file.name: tuple(map(float, file.read_text().split())) for file in folder.iterdir()}


def test_a_job_begins_after_what_it_waits_for_and_no_more_than_n_run_at_once(tmp_path):
    names = {"a": (), "b": (), "c": ("a",), "d": ("b", "c"), "e": ()}
    jobs = [Job(name, noting(tmp_path, name, 0.5), after) for name, after in names.items()]
    done = []
    work_off(jobs, 2, progress=False, when_done=done.append)
    spans = times(tmp_path)
    assert set(done) == set(spans) == set(names)
    for name, after in names.items():
        assert all(spans[other][1] <= spans[name][0] for other in after), name
    moments = sorted([(begin, 1) for begin, _ in spans.values()] + [(end, -1) for _, end in spans.values()])
    running = [sum(step for _, step in moments[: i + 1]) for i in range(len(moments))]
    assert max(running) == 2


def test_of_what_is_ready_the_first_in_the_list_comes_first(tmp_path):
    jobs = [Job("late", noting(tmp_path, "late"), ("x",)), *(Job(n, noting(tmp_path, n, 0.1)) for n in "xyz")]
    done = []
    work_off(jobs, 1, progress=False, when_done=done.append)
    assert done == ["x", "late", "y", "z"]


def test_a_failure_is_named_ends_the_others_and_shows_what_the_job_said(tmp_path, capfd):
    jobs = [Job("bad", "raise ValueError('no such thing')"), Job("long", noting(tmp_path, "long", 60))]
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="^bad ended"):
        work_off(jobs, 2, progress=False)
    assert time.monotonic() - began < 30 and not list(tmp_path.iterdir())
    assert "no such thing" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    job = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"from q3vl_mini.side_by_side import Job, work_off; work_off([Job('long', {job!r})], 1, progress=False)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def until(happens, seconds=20):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_jobs_that_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match="a, b: each waits for"):
        work_off([Job("a", "", ("b",)), Job("b", "", ("a",)), Job("c", "")], 2)


def test_bars_of_jobs_are_told_as_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("q3vl_mini.side_by_side.TOLD_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    code = "import time; from tqdm import tqdm\nfor _ in tqdm(range(20), desc='steps', mininterval=0): time.sleep(0.1)"
    work_off([Job("s0", code)], 1)
    said = capfd.readouterr().err
    assert "s0 · steps" in said and "/20" in said and "\x1b" not in said
    work_off([Job("s0", code)], 1, progress=False)
    assert "steps" not in capfd.readouterr().err


def test_memory_is_that_of_all_processes_together():
    hold = "import time; x = bytearray(300 << 20); time.sleep(2)"
    one, two = (work_off([Job(str(i), hold) for i in range(n)], n, progress=False) for n in (1, 2))
    assert 250 < two - one < 400
