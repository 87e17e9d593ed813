"""How much of the machine's matrix-multiply peak a training step reaches, and what the rest of its time goes to.

    python benchmarks/training_profile.py

The floating-point operations of a step are counted by torch as it runs (matrix products alone). The peak is that of
products of 1024 x 1024 matrices in the number format that this CPU multiplies fastest, which is also the one that a run
computes in, measured in turn with the steps. Where the time goes is the profiler's self
time by kind of operation, of one step of each.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from side_by_side import number, write
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_step import Ours

from q3vl_mini.data import mixed_batches
from q3vl_mini.machine import fast_cpu_dtype
from q3vl_mini.train import embedding_loss

SIZE = 1024
KINDS = {  # the first that occurs in an operation's name
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "softmax"),
    "copies and indexing": ("copy", "cat", "index", "gather", "scatter", "stack", "slice", "expand", "fill", "zero"),
    "sums and norms": ("sum", "mean", "norm", "pow", "rsqrt", "amax"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "gelu", "exp", "neg", "where", "maximum", "clamp", "lt", "gt"),
    "optimiser": ("adam", "foreach"),
}


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "everything else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(options.batch, 1, Path(folder))
    [rows] = mixed_batches([ours.data], batch_size=options.batch, n_negatives=0, steps=1, seed=0)
    parameters = [p for p in ours.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ours.model.train()

    def step() -> None:
        def encode(rows, instruction):
            return ours.model(ours.model.collate(rows, instruction))

        embedding_loss(encode, rows, ours.stage, **ours.options).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    a, b = (torch.randn(SIZE, SIZE, dtype=fast_cpu_dtype()) for _ in range(2))
    lines, shares, gflop = [], {}, {}
    for keep in (False, True):
        pictures = "pictures seen before" if keep else "new pictures"

        def once(keep: bool = keep) -> None:
            if not keep:
                ours.run.store.clear()
            step()

        once()
        with FlopCounterMode(display=False) as counter:
            once()
        gflop[pictures] = round(counter.get_total_flops() / 1e9, 1)
        reached = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            middle = time.perf_counter()
            once()
            peak = 4 * 2 * SIZE**3 / (middle - start)
            reached.append(counter.get_total_flops() / (time.perf_counter() - middle) / peak)
        share = statistics.median(reached)
        lines.append(number(f"share of the matrix-multiply peak, {pictures}", share))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            once()
        spent: dict[str, float] = defaultdict(float)
        for event in profiled.key_averages():
            spent[kind_of(event.key)] += event.self_cpu_time_total
        total = sum(spent.values())
        shares[pictures] = {kind: round(x / total, 3) for kind, x in sorted(spent.items(), key=lambda item: -item[1])}
    write(
        "training_profile",
        f"Q3VL-tiny, stage 1, batch {options.batch} of texts and 64 px pictures",
        lines,
        computed_in=str(a.dtype).removeprefix("torch."),
        time_by_kind=shares,
        gflop_a_step=gflop,
    )


if __name__ == "__main__":
    main()
