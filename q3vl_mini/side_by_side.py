"""Jobs that wait for one another, several at a time, in workers: processes of this machine that take one job at a time.

Two processes with one thread each do more than one with two, so a run divides its work among them where it can.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from threading import Thread

import psutil
from tqdm.auto import tqdm

from .memory import give_back_freed

OF_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what would make a worker think that it is one of a launch
TOLD_EVERY = 30.0  # seconds between lines about what is going on, where bars cannot be drawn


@dataclass(frozen=True)
class Job:
    """Python code that does it, once the jobs named in `after` are done."""

    name: str
    code: str
    after: tuple[str, ...] = ()


def work_off(
    jobs: Sequence[Job], n: int, progress: bool = True, when_done: Callable[[str], None] = lambda name: None
) -> int:
    """Do all jobs, n at a time: of those that wait for nothing, the first in the list. Returns the peak memory in MB.

    That is of all processes together; what they share counts once on Linux, elsewhere each time.
    If one fails, the others are ended. They end too if this process does, however it ends.

    Raises:
        ValueError: a job waits for one that is not there, or that waits for it. ChildProcessError: a job failed.
    """
    if stuck := _never_ready(jobs):
        raise ValueError(f"{', '.join(stuck)}: each waits for what is not among the jobs, or for itself")
    done: set[str] = set()
    todo, peak = list(jobs), 0
    with Bars(n, progress) as bars:
        workers = [Worker(n, bars) for _ in range(min(n, len(jobs)))]
        try:
            while todo or any(worker.job for worker in workers):
                for worker in workers:
                    if worker.is_done():
                        done.add(worker.job.name)
                        when_done(worker.job.name)
                        worker.job = None
                for worker in workers:
                    ready = [job for job in todo if done.issuperset(job.after)]
                    if ready and worker.job is None:
                        worker.give(ready[0])
                        todo.remove(ready[0])
                time.sleep(0.2)
                peak = max(peak, memory_of_all_mb())
                bars.draw([f"{worker.job.name} · {worker.bar}" if worker.job else "" for worker in workers])
        finally:
            for worker in workers:
                worker.end()
    return peak


def _never_ready(jobs: Sequence[Job]) -> list[str]:
    """The jobs that no order can do."""
    left, done = list(jobs), set()
    while ready := [job for job in left if done.issuperset(job.after)]:
        done |= {job.name for job in ready}
        left = [job for job in left if job not in ready]
    return [job.name for job in left]


class Worker:
    """A process that does what it is given. It is a command, so that a script that calls for workers needs no guard
    against being imported by them.

    n: how many workers share the cores. job: what it is at, or None. bar: the last progress bar that it drew.
    """

    def __init__(self, n: int, bars: "Bars"):
        environment = {name: value for name, value in os.environ.items() if name not in OF_GROUP}
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n))
        command, pipe = [sys.executable, "-c", f"from {__name__} import serve; serve()"], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
        self.job: Job | None = None
        self.bar, self.finished = "", 0
        self.given = 0
        self.readers = [Thread(target=read, daemon=True) for read in (self._count, lambda: self._hand_on(bars))]
        for reader in self.readers:
            reader.start()

    def give(self, job: Job) -> None:
        """Let it begin a job. One whose process has ended says so in `is_done`."""
        self.job, self.bar, self.given = job, "", self.given + 1
        try:
            self.process.stdin.write(json.dumps(job.code).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.process.wait()

    def is_done(self) -> bool:
        """Whether it has finished its job. Raises ChildProcessError if it ended instead."""
        if self.job is not None and self.process.poll() is not None:
            for reader in self.readers:
                reader.join()
            raise ChildProcessError(f"{self.job.name} ended with the error that is told above")
        return self.job is not None and self.finished == self.given

    def end(self) -> None:
        """Let it go, or end it if it is at work."""
        if self.job is not None:
            self.process.terminate()
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        for reader in self.readers:
            reader.join()

    def _count(self) -> None:
        with self.process.stdout as replies:
            for _ in replies:
                self.finished += 1

    def _hand_on(self, bars: "Bars") -> None:
        """Keep the last bar that it draws, and hand on the lines that it writes."""
        rest = ""
        with self.process.stderr as stream:
            while piece := os.read(stream.fileno(), 65_536):
                *pieces, rest = re.split(r"[\r\n]+", rest + piece.decode(errors="replace"))
                for text in pieces:
                    if "%|" in text or "it/s]" in text:
                        self.bar = text
                    elif text.strip():
                        bars.say(text)
        if rest.strip() and "%|" not in rest:
            bars.say(rest)


def serve() -> None:
    """A worker's life: jobs come in a line each, as JSON; one that is done is answered with a line."""
    end_with_parent()
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            exec(json.loads(line), {"__name__": "job"})
            gc.collect()
            give_back_freed()
            print("done", file=answers, flush=True)


class Bars:
    """A line a job, drawn over again on a terminal; elsewhere told every TOLD_EVERY seconds."""

    def __init__(self, n: int, wanted: bool):
        self.wanted, self.drawn = wanted, wanted and sys.stderr.isatty()
        self.lines = [tqdm(bar_format="{desc}", position=i, leave=False, disable=not self.drawn) for i in range(n)]
        self.last = time.monotonic()

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_) -> None:
        for line in self.lines:
            line.close()

    def draw(self, told: Sequence[str]) -> None:
        """told: by worker, what it is at."""
        if self.drawn:
            for line, text in zip(self.lines, told, strict=False):
                if line.desc != (text := text[: (line.ncols or 120) - 1]):
                    line.set_description_str(text)
        elif self.wanted and time.monotonic() - self.last > TOLD_EVERY:
            self.last = time.monotonic()
            self.say("\n".join(filter(None, told)))

    def say(self, text: str) -> None:
        """Write something that stays."""
        tqdm.write(text, file=sys.stderr)


def memory_of_all_mb() -> int:
    """What this process and those that it started hold, in MB.

    To ask the system for exact shares (PSS) takes a tenth of a second for each and stops them for that long.
    """
    own, shared, this = 0, 0, psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            memory = process.memory_info()
        except psutil.Error:  # it has just ended
            continue
        shares = getattr(memory, "shared", 0)  # libraries, mostly the same
        own, shared = own + memory.rss - shares, max(shared, shares)
    return round((own + shared) / 2**20)


def end_with_parent() -> None:
    """Let this process end within a second of the one that started it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
