"""What is on disk is whole: written beside its place and moved there, by one process at a time."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Let an error of a full disk or of a place that cannot be written name `place` and the remedy.

    The system's own error often names no file. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_WRITTEN:
            raise
        raise OSError(
            f"{place} cannot be written ({error}); free space, or make it writable, and run the same command again: "
            "what was whole before is as it was"
        ) from error


def write_whole(file: Path, text: str) -> None:
    """Write a text file in one move, so that what exists is whole."""
    partial = file.with_name(file.name + ".partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk gets its room back
            raise


def keep_log_until(log: Path, step: int) -> None:
    """Drop a JSON-lines log's rows after `step`: they were written after the checkpoint, and come again.

    So does a last row that a kill cut off.
    """
    if log.is_file():
        rows = [row for row in log.read_text().splitlines(keepends=True) if row.endswith("\n")]
        write_whole(log, "".join(row for row in rows if json.loads(row)["step"] <= step))


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder, for `alone`. One object may be held several times over, by the thread that holds it."""
    return FileLock(Path(folder) / ".lock")


@contextmanager
def alone(lock: FileLock) -> Iterator[None]:
    """Hold the lock of a folder. The system takes it back from a process that ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder = Path(lock.lock_file).parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"another process is at work in {folder}; wait until it ends, or give another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(folder: Path, keep_previous: bool = False) -> Iterator[Path]:
    """A new, empty folder beside `folder` that takes its place at the end; after an error `folder` is as it was.

    Killed at any moment, `whole_folder` finds the new one or the one before. keep_previous: the one before stays,
    beside it.
    """
    new, old = folder.with_name(folder.name + ".new"), previous(folder)
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # a full disk gets its room back
            raise
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        if not keep_previous:
            shutil.rmtree(old, ignore_errors=True)


def previous(folder: Path) -> Path:
    """Where `replacing` moves what was there before."""
    return folder.with_name(folder.name + ".old")


def whole_folder(folder: Path) -> Path:
    """`folder`, or the one before it where `replacing` was killed between its two moves."""
    old = previous(folder)
    return old if old.exists() and not folder.exists() else folder


def discard(folder: Path) -> None:
    """Remove what `replacing` wrote, and what it kept or left beside it."""
    for place in (folder.with_name(folder.name + ".new"), previous(folder), folder):
        shutil.rmtree(place, ignore_errors=True)
