"""Memory: what is counted, and that freed memory goes back to the system."""

import ctypes
import sys

import numpy as np
import psutil
import pytest

from q3vl_mini.memory import give_back_freed, peak_memory_mb


def held_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_the_peak_counts_memory_that_was_freed():
    block = np.ones(50 * 2**20, dtype=np.uint8)
    held = held_mb()
    del block
    assert peak_memory_mb() >= held - 1


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone"
)
def test_freed_memory_goes_back_to_the_system():
    kept, freed = [], []
    for _ in range(4_000):  # small blocks, of which every other is freed: holes that the heap keeps
        kept.append(np.ones(4_096, dtype=np.uint8))
        freed.append(np.ones(65_536, dtype=np.uint8))
    freed.clear()
    before = held_mb()
    give_back_freed()
    assert before - held_mb() > 100 and len(kept) == 4_000
