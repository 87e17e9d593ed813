"""How much memory this process held, and giving back to the system what was freed."""

import ctypes
import sys

import psutil


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
