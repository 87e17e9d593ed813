"""The machine: which number format is fast, what memory is counted, and that freed memory goes back."""

import ctypes
import sys

import numpy as np
import psutil
import pytest
import torch

from q3vl_mini import machine
from q3vl_mini.machine import cpu_autocast, fast_cpu_dtype, give_back_freed, peak_memory_mb


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


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_products_are_computed_in_the_format_that_the_cpu_is_faster_in(monkeypatch, faster):
    clock = {torch.float32: 2.0, torch.bfloat16: 1.0 if faster is torch.bfloat16 else 160.0}
    monkeypatch.setattr(machine.timeit, "repeat", lambda product, **_: [clock[product().dtype]])
    fast_cpu_dtype.cache_clear()
    try:
        assert fast_cpu_dtype() is faster
        with cpu_autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is faster
    finally:
        fast_cpu_dtype.cache_clear()
