"""disk.py and checkpoint.py on full disks, in folders that cannot be written, among other processes, and damaged."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from q3vl_mini.checkpoint import claim, load_checkpoint, save_checkpoint
from q3vl_mini.disk import alone, discard, keep_log_until, lock_of, replacing, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="limits and users of POSIX")


@contextmanager
def full_disk(size=20_000):
    """No file may become larger than `size` bytes: the system then refuses a write as it does on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def read_only():
    """A folder that this process may read and not write, also if it is root's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)
            os.chmod(name, stat.S_IRWXU)


def write(folder, value, step=1, size=10, **options):
    save_checkpoint(folder, {"model": {"w": torch.full((size,), float(value))}}, [], {"step": step}, **options)


def value_in(folder):
    modules, meta = load_checkpoint(folder, [])
    return modules["model"]["w"][0].item(), meta["step"]


# --- full and read-only -------------------------------------------------------------------------------------


@posix
def test_a_full_disk_leaves_the_last_checkpoint_and_names_the_file_and_the_remedy(tmp_path):
    write(tmp_path / "state", 1)
    with full_disk(), pytest.raises(OSError, match=r"state cannot be written .*free space.*the same command again"):
        write(tmp_path / "state", 2, size=100_000)
    assert value_in(tmp_path / "state") == (1.0, 1)
    assert [f.name for f in tmp_path.iterdir()] == ["state"]  # and what was half written is gone
    write(tmp_path / "state", 3, size=100_000)
    assert value_in(tmp_path / "state")[0] == 3.0


@posix
def test_a_full_disk_leaves_a_text_file_as_it_was(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    with full_disk(), pytest.raises(OSError, match=r"a\.json cannot be written \(.*File too large.*free space"):
        write_whole(tmp_path / "a.json", "new" * 10_000)
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@posix
def test_a_folder_that_cannot_be_written_is_named(read_only):
    for attempt in (lambda: write(read_only / "state", 1), lambda: claim(read_only / "x.json", {}, "a run")):
        with pytest.raises(OSError, match=rf"{read_only}\S* cannot be written .*Permission denied.*make it writable"):
            attempt()
    with pytest.raises(OSError, match=rf"{read_only} cannot be written"), alone(lock_of(read_only)):
        pass


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), replacing(tmp_path / "x"):
        raise FileNotFoundError("mine")
    assert not list(tmp_path.iterdir())


# --- damaged ------------------------------------------------------------------------------------------------


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_of_a_damaged_checkpoint_the_one_before_it_is_used_with_a_warning(damage, name, tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / "state", step, step, keep_previous=True)
    assert value_in(tmp_path / "state") == (3.0, 3)
    damage(tmp_path / "state" / name)
    with pytest.warns(UserWarning, match=rf"{name} cannot be used .*going on from the .* before it.*state\.old"):
        assert value_in(tmp_path / "state") == (2.0, 2)
    write(tmp_path / "state", 4, 4, keep_previous=True)  # the run goes on
    with warnings.catch_warnings(action="error"):
        assert value_in(tmp_path / "state") == (4.0, 4)


def test_where_no_checkpoint_is_whole_the_error_names_the_files_and_the_remedy(tmp_path):
    for step in (1, 2):
        write(tmp_path / "state", step, step, keep_previous=True)
    cut(tmp_path / "state" / "state.safetensors")
    cut(tmp_path / "state.old" / "state.json")
    with pytest.raises(ValueError, match=r"state/state\.safetensors.*state\.old/state\.json.*remove .*state and"):
        load_checkpoint(tmp_path / "state", [])
    discard(tmp_path / "state")
    assert not list(tmp_path.iterdir()) and load_checkpoint(tmp_path / "state", []) is None


def test_the_sums_of_a_checkpoint_are_those_of_sha256sum(tmp_path):
    write(tmp_path / "state", 1)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "state", capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == 2


def test_a_log_cut_off_in_its_last_row_is_read_up_to_there(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 6)) + '{"step": 6, "lo')
    keep_log_until(log, 4)
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == [1, 2, 3, 4]


# --- alone --------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from q3vl_mini.disk import alone, lock_of
with alone(lock_of(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_processs_at_a_time_and_a_killed_one_leaves_it_free(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"another process is at work in {tmp_path}; wait"):
            with alone(lock_of(tmp_path)):
                pass
    finally:
        holder.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        holder.communicate()
    with alone(lock_of(tmp_path)):
        pass


def test_whoever_holds_a_folder_may_take_it_again(tmp_path):
    lock = lock_of(tmp_path / "new")
    with alone(lock):
        with alone(lock):
            pass
        with pytest.raises(BlockingIOError), alone(lock_of(tmp_path / "new")):  # it was not given back in between
            pass
    with alone(lock_of(tmp_path / "new")):
        pass
