"""The number format that this machine's CPU multiplies fastest."""

import timeit
from functools import cache

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
