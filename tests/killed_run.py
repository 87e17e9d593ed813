"""`q3vl-mini run` in a process of its own, on the fake world, that is killed at a moment of the caller's choice."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fake_world import enter_fake_world

SERVER = multiprocessing.get_context("forkserver") if sys.platform != "win32" else None


def kill_at_call(wanted: int, before: bool) -> None:
    """Kill this process at a call of the functions through which a run writes: before it, or when it is half done.

    Half of a move is the move; half of a file of tensors or of a text is its first half.
    """
    import safetensors.torch

    from q3vl_mini import checkpoint

    calls = 0
    replace, save_file, write_text = os.replace, safetensors.torch.save_file, Path.write_text

    def at(moment, half):
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == wanted:
                if not before:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return moment(*args, **kwargs)

        return called

    def half_of_tensors(tensors, file, *_):
        save_file(tensors, file)
        os.truncate(file, os.path.getsize(file) // 2)

    os.replace = at(replace, replace)
    Path.write_text = at(write_text, lambda file, text, *_: write_text(file, text[: len(text) // 2]))
    checkpoint.save_file = at(save_file, half_of_tensors)


def live(command: Sequence[str], seconds: float | None, call: int | None, before: bool) -> None:
    """The process: run the command, and die after some seconds or at a call."""
    import torch

    from q3vl_mini import cli

    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    enter_fake_world()
    if call is not None:
        kill_at_call(call, before)
    if seconds is not None:
        alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        alarm.daemon = True
        alarm.start()
    sys.exit(cli.main(command))


def run(command: Sequence[str], seconds: float | None = None, call: int | None = None, before: bool = True) -> int:
    """The exit status of the command, -9 if it was killed: after `seconds`, or at the `call`-th write."""
    SERVER.set_forkserver_preload(["q3vl_mini.cli", "fake_world"])  # imported once, and every process has it
    process = SERVER.Process(target=live, args=(list(command), seconds, call, before))
    process.start()
    process.join()
    return process.exitcode
