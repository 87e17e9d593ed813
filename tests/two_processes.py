"""Run a function in two processes of one gloo group."""

import faulthandler
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, spawn


def _process(rank: int, worker: Callable, port: int, args: tuple) -> None:
    faulthandler.enable()  # should it die of a signal, the test's output says where
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    worker(rank, *args)
    dist.barrier()  # neither closes its sockets while the other still reads from them
    dist.destroy_process_group()


def run_in_two_processes(worker: Callable, *args: object, tries: int = 3) -> None:
    """worker(rank, *args) in each; it opens the process group, which is closed for it.

    An exception in a worker is raised at once. A process that dies of a signal (an overloaded machine: gloo aborts
    when it gets no thread or loses a socket) is no answer to what the test asks, so the pair is started again.
    """
    for left in reversed(range(tries)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            return spawn(_process, args=(worker, port, args), nprocs=2)
        except ProcessExitedException as error:
            if not (left and error.signal_name):
                raise
