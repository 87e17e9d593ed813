"""Vision towers of several shapes and recipes, each trained for the same time, without one training style.

    python benchmarks/tower_sizes.py --seconds 150 --out results/tower_sizes.json

To choose Q3VL-tiny's shape and the settings of its tower's training by drawings of the training style that was left
out, never by a test style. A variant's number of steps is the budget over the time of one of its steps, which is
measured first, all variants in turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from q3vl_mini import tiny
from q3vl_mini.emoji_world import sprites
from q3vl_mini.emoji_world.bank import SpriteBank
from q3vl_mini.emoji_world.dialogues import tokenizer_texts
from q3vl_mini.pretrain_vision import VisionConfig, VisionTask, make_batch, pretrain_vision, token_losses
from q3vl_mini.vision import speed_up

HOLD_OUT = "twemoji"
VARIANTS = {  # name: (changes of the shape, changes of the recipe)
    "as shipped: 6 layers, 192 wide": ({}, {}),
    "4 layers": ({"vision_depth": 4}, {}),
    "8 layers": ({"vision_depth": 8}, {}),
    "128 wide": ({"vision_width": 128}, {}),
    "256 wide": ({"vision_width": 256}, {}),
    "without augmentation": ({}, {"strength": 0.0}),
    "half as strong augmentation": ({}, {"strength": 0.4}),
    "strong from the first step": ({}, {"ramp": 0.0}),
    "matrices at half the rate": ({}, {"lr_matrix": 0.02}),
}


def tower(tokenizer, shape: dict) -> torch.nn.Module:
    return speed_up(tiny.make_model(tiny.make_config(tokenizer, **shape), tokenizer).model.visual)


def seconds_a_step(towers: dict[str, torch.nn.Module], rounds: int = 5) -> dict[str, float]:
    """Median time of forward and backward on one batch, the towers in turns."""
    keys = [c.key for c in sprites.concepts()]
    config, g = VisionConfig(), torch.Generator().manual_seed(0)
    bank = SpriteBank([s for s in sprites.TRAIN_STYLES if s != HOLD_OUT], keys)
    times: dict[str, list[float]] = {name: [] for name in towers}
    for _ in range(rounds):
        for name, visual in towers.items():
            began = time.perf_counter()
            batch = make_batch(bank, config, config.steps, g)
            task = VisionTask(visual.config.out_hidden_size, len(keys))
            token_losses(visual, task, *batch, config.smoothing)[0].backward()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = tiny.train_tokenizer(tokenizer_texts())
    seconds = seconds_a_step({name: tower(tokenizer, shape) for name, (shape, _) in VARIANTS.items()})
    rows = {}
    for name, (shape, recipe) in VARIANTS.items():
        visual, steps = tower(tokenizer, shape), round(options.seconds / seconds[name])
        config = replace(VisionConfig(), steps=steps, hold_out=HOLD_OUT, **recipe)
        with tempfile.TemporaryDirectory() as folder:
            pretrain_vision(visual, Path(folder), config, log_every=steps)
            scores = json.loads((Path(folder) / "vision.jsonl").read_text().splitlines()[-1])
        rows[name] = {
            "parameters": sum(p.numel() for p in visual.parameters()),
            "steps": steps,
            "relative_step_time": round(seconds[name] / next(iter(seconds.values())), 2),
            "top1": scores["top1"],
            "top10": scores["top10"],
        }
        print(json.dumps({name: rows[name]}), flush=True)
        content = {"seconds": options.seconds, "held_out_style": HOLD_OUT, "variants": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
