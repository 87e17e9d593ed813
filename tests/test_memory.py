"""Memory: what is counted, that freed memory goes back, and that threads share few heaps."""

import ctypes
import subprocess
import sys

import numpy as np
import psutil
import pytest

from q3vl_mini.memory import give_back_freed, peak_memory_mb

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone"
)
HEAPS = """
import ctypes, sys
from threading import Barrier, Thread
from q3vl_mini.memory import few_arenas

c = ctypes.CDLL(None)
c.malloc.restype = c.fopen.restype = ctypes.c_void_p
if sys.argv[2] == "few":
    few_arenas(2)
together = Barrier(8)

def allocate():
    together.wait()
    c.malloc(50_000)
    together.wait()

threads = [Thread(target=allocate) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
file = ctypes.c_void_p(c.fopen(sys.argv[1].encode(), b"w"))
c.malloc_info(0, file)
c.fclose(file)
"""


def held_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_the_peak_counts_memory_that_was_freed():
    block = np.ones(50 * 2**20, dtype=np.uint8)
    held = held_mb()
    del block
    assert peak_memory_mb() >= held - 1


@glibc
def test_freed_memory_goes_back_to_the_system():
    kept, freed = [], []
    for _ in range(4_000):  # small blocks, of which every other is freed: holes that the heap keeps
        kept.append(np.ones(4_096, dtype=np.uint8))
        freed.append(np.ones(65_536, dtype=np.uint8))
    freed.clear()
    before = held_mb()
    give_back_freed(above_mb=round(before) + 1_000)  # it holds less
    assert held_mb() > before - 1
    give_back_freed()
    assert before - held_mb() > 100 and len(kept) == 4_000


@glibc
def test_threads_share_two_heaps_where_each_would_have_its_own(tmp_path):
    counted = {}
    for arenas in ("few", "as many as threads"):
        subprocess.run([sys.executable, "-c", HEAPS, tmp_path / "heaps.xml", arenas], check=True)
        counted[arenas] = (tmp_path / "heaps.xml").read_text().count("<heap nr=")
    assert counted["few"] <= 2 < counted["as many as threads"], counted
