"""What a backbone's vision tower knows of single things, by background: a linear probe on its output.

    python benchmarks/tower_probe.py --out results/tower_probe.json

The probe is trained on augmented pictures, as the tower was, and tried on every concept once in the training styles,
as the training split draws it: by its style, or redrawn by another hand.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from q3vl_mini.backbone import load
from q3vl_mini.emoji_world import sprites
from q3vl_mini.emoji_world.bank import SpriteBank
from q3vl_mini.emoji_world.scenes import PATTERNS, Scene
from q3vl_mini.emoji_world.tasks import World
from q3vl_mini.machine import cpu_autocast
from q3vl_mini.vision import patchify


def features(tower, pictures: Tensor) -> Tensor:
    """(B, 3, 64, 64) to the tower's visual tokens, (B, 4, D)."""
    pixels, grid = patchify(pictures)
    with torch.no_grad(), cpu_autocast():
        return tower(pixels, grid_thw=grid).pooler_output.float().view(len(pictures), 4, -1)


def train_probe(tower, bank: SpriteBank, batches: int, epochs: int = 12):
    """Standardised tokens to concepts; returns a function of pictures to log probabilities (B, concepts)."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    drawn = [bank.pictures(128, 0.8, 0.0, g) for _ in range(batches)]
    x = torch.cat([features(tower, pictures) for pictures, _, _ in drawn])
    y = torch.cat([concepts for _, concepts, _ in drawn])
    mean, std = x.mean((0, 1)), x.std((0, 1))
    head = torch.nn.Linear(x.shape[-1], len(bank.keys))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(256):
            logits = head((x[rows] - mean) / std).flatten(0, 1)
            F.cross_entropy(logits, y[rows].repeat_interleave(4), label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
    return lambda pictures: head((features(tower, pictures) - mean) / std).log_softmax(-1).mean(1)


@torch.no_grad()
def top1(probe, bank: SpriteBank, scenes: list[Scene]) -> float:
    pictures = torch.from_numpy(np.stack([s.array() for s in scenes])).permute(0, 3, 1, 2).float() / 255
    guesses = torch.cat([probe(part) for part in pictures.split(128)]).argmax(-1)
    truth = torch.tensor([bank.keys.index(s.objects[0].key) for s in scenes])
    return round((guesses == truth).float().mean().item(), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="q3vl-tiny", help="the shipped one, or a folder")
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tower = load(options.backbone, device="cpu").model.model.visual
    bank = SpriteBank(sprites.TRAIN_STYLES, [c.key for c in sprites.concepts()])
    probe = train_probe(tower, bank, options.batches)
    w = World("train", "probe", 0)
    scenes = [w.single(key, 0.0) for key in w.keys]
    rows = {}
    for pattern in PATTERNS:
        for name, redrawn in (("own", False), ("redrawn", True)):
            chosen = [s for s in scenes if s.pattern == pattern and (s.objects[0].hand > 0) == redrawn]
            rows[f"{pattern} {name}"] = {"top1": top1(probe, bank, chosen), "n": len(chosen)}
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
