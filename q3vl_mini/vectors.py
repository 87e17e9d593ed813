"""Vectors that need not fit into memory: embedded block by block into a file, and read from there."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def encode_to_file(
    encode: Callable[[Sequence[Any]], np.ndarray], items: Sequence[Any], path: str | Path, block: int = 4096
) -> np.ndarray:
    """The vectors of `items` as a read-only memory map (N, D) of a .npy file, which is replaced in one move.

    At most `block` items and their vectors are in memory at once, if `items` makes its slices when asked for them
    (data.StoredInstances). Any function that takes a `np.memmap` searches the result; `np.load(path, mmap_mode="r")`
    opens it again.

    Args:
        encode: a block of items to its vectors (n, D), e.g. `Embedder.encode`.
        path: where the vectors stay; 4 N D bytes as float32.

    Raises:
        ValueError: no items.
    """
    if len(items) == 0:
        raise ValueError(f"no items to embed into {path}")
    starts = range(0, len(items), block)
    return _write((encode(items[start : start + block]) for start in starts), len(items), Path(path))


def join_files(parts: Sequence[str | Path], path: str | Path) -> np.ndarray:
    """Vectors of several .npy files (n, D), in their order, as one file; what `encode_to_file` returns.

    A part at a time is read. Raises ValueError: no parts.
    """
    maps = [np.load(part, mmap_mode="r") for part in parts]
    if not maps:
        raise ValueError(f"no vectors to join into {path}")
    return _write(maps, sum(map(len, maps)), Path(path))


def _write(blocks: Iterable[np.ndarray], rows: int, path: Path) -> np.ndarray:
    """Blocks (n, D), `rows` rows in all, as a .npy file that is replaced in one move; mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, file, start = path.with_name(path.name + ".partial"), None, 0
    for vectors in blocks:
        if file is None:
            shape = (rows, vectors.shape[1])
            file = np.lib.format.open_memmap(partial, mode="w+", dtype=vectors.dtype, shape=shape)
        file[start : start + len(vectors)] = vectors
        start += len(vectors)
    file.flush()
    del file  # Windows does not rename a file that is mapped
    os.replace(partial, path)
    return np.load(path, mmap_mode="r")
