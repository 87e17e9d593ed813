"""What twice the work costs: encode and mining by items, the memory of a training step by batch size.

    python benchmarks/cost_growth.py

Memory is how far the process's resident memory rises during the forward and backward of one batch.
"""

import argparse
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from mining_search import unit
from mixed_items import mixed_items
from side_by_side import number, ratio, seconds_of, write
from training_step import Ours

from q3vl_mini.data import mixed_batches
from q3vl_mini.embedder import Embedder
from q3vl_mini.memory import give_back_freed
from q3vl_mini.mining import top_k
from q3vl_mini.train import embedding_loss, gradient_cache

CHUNK_TOKENS, BATCHES = 1000, (128, 256, 512)


def rise_mb(work: Callable[[], None]) -> float:
    """By how much the process's memory rises, at most, while it works."""
    give_back_freed()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20


def step_memory(ours: Ours, batch: int, chunk_tokens: int) -> float:
    """Of one batch of stage 1; chunk_tokens = 0 is without the gradient cache."""
    settings = {"batch_size": batch, "n_negatives": 0, "steps": 1, "seed": 0}
    [rows] = mixed_batches([ours.data], **settings)

    def step() -> None:
        def encode(rows, instruction):
            return ours.model(ours.model.collate(rows, instruction))

        cached, replay = gradient_cache(ours.model, chunk_tokens) if chunk_tokens else (encode, lambda: None)
        embedding_loss(cached, rows, ours.stage, **ours.options).backward()
        replay()

    step()  # gradients are there from now on, and the pictures' features are kept
    return max(rise_mb(step) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(max(BATCHES), 1, Path(folder))
        ours.model.train()
        for name, tokens in (("cache", CHUNK_TOKENS), ("plain", 0)):  # after large blocks, glibc's heap is in pieces
            for batch in BATCHES:
                memory.setdefault(batch, {})[name] = step_memory(ours, batch, tokens)
    embedder, items = Embedder("s3"), mixed_items(2 * options.items)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, 256), dtype=np.float32)
    documents, queries = unit(rng, 2 * options.documents, 256, centres), unit(rng, 300, 256, centres)
    ways = {
        "encode": lambda: embedder.encode(items[: options.items]),
        "encode twice": lambda: embedder.encode(items),
        "mining": lambda: top_k(queries, documents[: options.documents], 100),
        "mining twice": lambda: top_k(queries, documents, 100),
    }
    embedder.encode(items[:32])
    seconds = seconds_of(ways, options.rounds)
    small, large = (memory[batch] for batch in BATCHES[-2:])
    sizes = ", ".join(map(str, BATCHES))
    write(
        "cost_growth",
        f"encode {options.items} and {2 * options.items} items; search {options.documents:,} and "
        f"{2 * options.documents:,} documents; train on batches of {sizes}, in parts of {CHUNK_TOKENS:,} tokens",
        [
            ratio("encode twice the items, time", seconds["encode twice"], seconds["encode"], "within", 1.9, 2.1),
            ratio("mine twice the documents, time", seconds["mining twice"], seconds["mining"], "within", 1.9, 2.1),
            number(
                f"memory of a batch of {BATCHES[-1]} over one of {BATCHES[-2]}, with gradient cache",
                large["cache"] / small["cache"],
                "at most",
                1.1,
            ),
        ],
        memory_mb={batch: {name: round(mb) for name, mb in memory[batch].items()} for batch in BATCHES},
    )


if __name__ == "__main__":
    main()
