"""What this machine has: the number format that its CPU multiplies fastest, and memory."""

import ctypes
import sys
import timeit
from functools import cache

import psutil
import torch


@cache
def fast_cpu_dtype() -> torch.dtype:
    """bfloat16 if this CPU's matrix products are faster in it than in float32, else float32; measured once.

    It is with AMX. A CPU without instructions for it, as in most laptops, computes it in software, many times slower.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=5))
    return min(seconds, key=seconds.get)


def cpu_autocast() -> torch.autocast:
    """A context in which matrix products on the CPU are computed in `fast_cpu_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_cpu_dtype() is torch.bfloat16)


def peak_memory_mb() -> int:
    """The most memory that this process held, in MB; where the system does not count it, what it holds now."""
    try:
        import resource  # Unix alone
    except ImportError:
        memory = psutil.Process().memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere nothing.

    Batches of changing lengths leave glibc's heap in pieces, and training holds more and more of what it freed.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
