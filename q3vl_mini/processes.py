"""A command in several processes of this machine, as `accelerate launch` starts it, without a file that says so."""

import importlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, spawn


def in_processes(module: str, arguments: Sequence[str], n: int) -> int:
    """`main(arguments)` of a module in n processes of one group; the exit status: 0, or that of the first that failed.

    Each gets its share of the cores. If this process ends, so do they.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // n)))  # read when they import torch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        spawn(_worker, args=(module, list(arguments), n, port), nprocs=n)
    except ProcessExitedException as error:
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code  # of a signal, as a shell has it
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def _worker(rank: int, module: str, arguments: list[str], n: int, port: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by which it ends with its parent; `nohup … &` ignores it
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]:
        group["GLOO_SOCKET_IFNAME"] = loopback[0]
    os.environ.update({name: str(value) for name, value in group.items()})
    status = importlib.import_module(module).main(arguments)
    if dist.is_initialized() and not status:
        dist.destroy_process_group()
    if status:
        sys.exit(status)
