"""The process's memory: the most that it held, and what keeps glibc from holding more and more of what is freed."""

import ctypes
import sys

import psutil

M_ARENA_MAX = -8  # of glibc's malloc.h
LITTLE_MB = 5000  # a process that holds no more need not give back after every step, for pages that it takes again


def peak_memory_mb() -> int:
    """The most memory that this process held, in MB; where the system does not count it, what it holds now."""
    try:
        import resource  # Unix alone
    except ImportError:
        memory = psutil.Process().memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def give_back_freed(above_mb: int = 0) -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere nothing.

    Batches of changing lengths leave glibc's heap in pieces, and training holds more and more of what it freed. A
    process that holds at most `above_mb` keeps it.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None and psutil.Process().memory_info().rss > above_mb * 2**20:
        trim(0)


def few_arenas(n: int = 2) -> None:
    """Let all threads of this process allocate from `n` heaps, where the C library is glibc; elsewhere nothing.

    It has up to eight a core otherwise, each of which keeps what its threads freed: a server's memory grows for as long
    as its threads take turns. To be called before they begin.
    """
    option = _of_glibc("mallopt")
    if option is not None:
        option(M_ARENA_MAX, n)


def _of_glibc(name: str):
    """A function of the C library, None where it has none: musl, macOS, Windows."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
