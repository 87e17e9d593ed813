"""Mining that several processes share: each embeds some blocks of the items, and searches for some of the queries.

What a process has made is a file, and a file that is there is not made again, so a job that was cut short goes on.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from .checkpoint import claim
from .mining import Mined, mine, top_k
from .records import Quadruple
from .vectors import join_files

BLOCK = 4096  # items that are embedded at once, or queries that are searched for
CARD = "shares.json"


def mine_in_shares(
    embedder: Any,
    quadruple: Quadruple,
    folder: str | Path,
    state: PartialState,
    *,
    k: int,
    source: Mapping[str, Any],
    batch_size: int = 32,
    progress: bool = False,
    **setting: Any,
) -> Mined | None:
    """`mining.mine` with vectors by `embedder`, in every process of a group; the first has the result, others None.

    Args:
        folder: that all processes see, for corpus-00000.npy (block, D), queries-... and neighbours-....npz, and for
            the vectors of all. state: of the group; one process is one of 1.
        source: what the quadruple was made from, JSON: files of another are not taken for these.
        k, setting: see mining.mine.

    Raises ValueError: see mining.mine; or the folder is of another model, source or k.
    """
    folder, parts = Path(folder), {"corpus": (quadruple.corpus, None)}
    parts["queries"] = quadruple.queries, quadruple.instruction
    if state.is_main_process:
        claim(folder / CARD, {"identity": embedder.identity(None), "source": source, "k": k}, "vectors")
    state.wait_for_everyone()
    for name, (items, instruction) in parts.items():
        encode = partial(embedder.encode, instruction=instruction, batch_size=batch_size, show_progress_bar=progress)
        for file, block in _my_share(folder, name, items, state):
            _write(file, lambda to, block=block, encode=encode: np.save(to, encode(block)))
    state.wait_for_everyone()
    vectors = {name: folder / f"{name}.npy" for name in parts}
    if state.is_main_process:
        for name, whole in vectors.items():
            join_files(_files(folder, name), whole)
    state.wait_for_everyone()
    corpus, queries = (np.load(file, mmap_mode="r") for file in vectors.values())
    for file, block in _my_share(folder, "neighbours", queries, state):
        rows, scores = top_k(block, corpus, k)
        _write(file, lambda to, rows=rows, scores=scores: np.savez(to, rows=rows, scores=scores))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    found = [np.load(file) for file in _files(folder, "neighbours")]
    neighbours = tuple(np.concatenate([part[name] for part in found]) for name in ("rows", "scores"))
    return mine(quadruple, queries, corpus, k=k, neighbours=neighbours, **setting)


def _my_share(folder: Path, name: str, items: Sequence[Any], state: PartialState) -> Iterator[tuple[Path, Any]]:
    """Every n-th block of the items, and its file, unless that is there."""
    for number, start in enumerate(range(0, len(items), BLOCK)):
        file = folder / f"{name}-{number:05}{'.npz' if name == 'neighbours' else '.npy'}"
        if number % state.num_processes == state.process_index and not file.is_file():
            yield file, items[start : start + BLOCK]


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-[0-9]*.np[yz]"))


def _write(file: Path, save: Callable[[Path], None]) -> None:
    """A file in one move."""
    new = file.with_name(f"new-{file.name}")
    save(new)
    os.replace(new, file)
