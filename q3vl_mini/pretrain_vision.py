"""Q3VL-tiny's vision tower learns to see first, as Qwen3-VL's did (SigLIP-2 there): a class a visual token.

A language model on top of an untrained tower learns to ignore the picture (docs/pretraining.md). So each
visual token that covers an object must name its concept, in single pictures of 64 x 64 pixels and in
2 x 2 scenes of 128 x 128, drawn in the training styles and augmented towards unseen ones. Classification
of the seed pool, not contrastive training: the raw backbone still has to learn retrieval in stage 1.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import generator_state, load_checkpoint, save_checkpoint
from .disk import keep_log_until
from .emoji_world import sprites
from .emoji_world.bank import SpriteBank, drawings
from .emoji_world.scenes import COLOURS
from .machine import cpu_autocast
from .muon import Muon
from .vision import patchify, speed_up

CHECK_HOUSE = 999_983  # seed of the designs that accuracy is measured on


@dataclass(frozen=True)
class VisionConfig:
    """Budget and step sizes. `hold_out` leaves one training style out, to choose settings without a test style.

    heads: steps in which the classifiers learn alone, so that new ones do not spoil a tower that can see already.
    """

    steps: int = 5_000
    batch: int = 128
    lr_matrix: float = 0.04
    lr_other: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 60
    decay: float = 0.35  # share of the steps over which the rate falls to zero, at the end
    strength: float = 0.8
    ramp: float = 0.2  # share of the steps over which augmentation grows from mild to `strength`
    scenes: float = 0.2
    tinted: float = 0.15
    houses: int = 0  # how many other designs of each drawing are shown beside it
    redraw: int = 500  # steps after which they are new ones
    smoothing: float = 0.1
    heads: int = 0
    hold_out: str | None = None
    edge: int = 64  # pixels of a picture's edge; drawn at 64, and scaled down where this is less
    seed: int = 0


class VisionTask(nn.Module):
    """Heads over the tower's output: which concept, and which tint (0: none)."""

    def __init__(self, width: int, n_concepts: int):
        super().__init__()
        self.concept = nn.Linear(width, n_concepts)
        self.colour = nn.Linear(width, 1 + len(COLOURS))


def rate(step: int, c: VisionConfig) -> float:
    """Warm up (again where the tower joins its heads), hold, fall linearly to zero: the held part can be prolonged."""
    left = (c.steps - step) / max(c.decay * c.steps, 1)
    begun = step - c.heads if step >= c.heads else step
    return min(1.0, (begun + 1) / c.warmup, left)


def make_batch(bank: SpriteBank, c: VisionConfig, step: int, g: torch.Generator):
    """Pictures (B, 3, H, W), concept (B, T) and tint (B, T) of each of their T visual tokens."""
    strength = c.strength * min(1.0, 0.3 + 0.7 * step / max(c.ramp * c.steps, 1))
    x, concept, tints = bank.pictures(c.batch, strength, c.tinted, g)
    concept, tints = concept[:, None].expand(-1, 4), tints[:, None].expand(-1, 4)
    if torch.rand((), generator=g) < c.scenes:  # four pictures become one scene, its tokens in reading order
        b, _, h, w = x.shape
        x = x.view(b // 4, 2, 2, 3, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b // 4, 3, 2 * h, 2 * w)

        def tiled(labels: Tensor) -> Tensor:
            return labels.reshape(b // 4, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(b // 4, 16)

        concept, tints = tiled(concept), tiled(tints)
    return scaled(x, c.edge), concept, tints


def scaled(x: Tensor, edge: int) -> Tensor:
    """Pictures made of drawings of 64 pixels, as of drawings of `edge` pixels."""
    return x if edge == 64 else F.interpolate(x, scale_factor=edge / 64, mode="area")


def token_losses(visual: nn.Module, task: VisionTask, x: Tensor, concept: Tensor, tints: Tensor, smoothing: float):
    """Cross-entropy a visual token, on the tower's output and, lighter, on its deepstack features."""
    pixels, grid = patchify(x, visual.config.patch_size, visual.config.spatial_merge_size)
    with cpu_autocast():
        out = visual(pixels, grid_thw=grid)
        logits, colours = task.concept(out.pooler_output), task.colour(out.pooler_output)
        deep = [task.concept(f) for f in out.deepstack_features]
    loss = F.cross_entropy(logits.float(), concept.flatten(), label_smoothing=smoothing)
    loss_colour = F.cross_entropy(colours.float(), tints.flatten())
    loss_deep = sum(F.cross_entropy(d.float(), concept.flatten(), label_smoothing=smoothing) for d in deep)
    return loss + 0.2 * loss_colour + 0.2 * loss_deep, loss.detach()


@torch.no_grad()
def accuracy(visual: nn.Module, task: VisionTask, bank: Tensor, edge: int = 64) -> dict[str, float]:
    """Share of plain drawings on white, one a concept, whose concept is the first (among ten) guess."""
    hits = torch.zeros(2)
    for start in range(0, len(bank), 200):
        rgba = bank[start : start + 200].permute(0, 3, 1, 2).float() / 255
        x = scaled(rgba[:, :3] + (1 - rgba[:, 3:]), edge)
        pixels, grid = patchify(x, visual.config.patch_size, visual.config.spatial_merge_size)
        with cpu_autocast():
            features = visual(pixels, grid_thw=grid).pooler_output.view(len(rgba), -1, task.concept.in_features)
            logits = task.concept(features).float().log_softmax(-1).mean(1)
        guesses = logits.topk(10, -1).indices
        right = guesses == torch.arange(start, start + len(rgba))[:, None]
        hits += torch.stack([right[:, 0].sum(), right.any(1).sum()])
    return {"top1": round(hits[0].item() / len(bank), 4), "top10": round(hits[1].item() / len(bank), 4)}


def pretrain_vision(visual: nn.Module, folder: Path, config: VisionConfig, log_every: int = 100) -> nn.Module:
    """Train a Qwen3VLVisionModel in place, resumable from `folder`; returns it. Curve: folder/vision.jsonl."""
    c, folder = config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(c.seed)
    styles = [s for s in sprites.TRAIN_STYLES if s != c.hold_out]
    keys = [k.key for k in sprites.concepts()]
    check_banks = {"": drawings(c.hold_out or styles[0], keys)}
    if c.houses:  # by houses that training never draws
        check_banks["redrawn_"] = drawings(c.hold_out or styles[0], keys, house=CHECK_HOUSE)
    speed_up(visual)
    task = VisionTask(visual.config.out_hidden_size, len(keys))

    is_matrix = {n: p.ndim == 2 and "pos_embed" not in n for n, p in visual.named_parameters()}
    matrices = [p for n, p in visual.named_parameters() if is_matrix[n]]
    others = [p for n, p in visual.named_parameters() if not is_matrix[n]] + list(task.parameters())
    optimizers = [
        Muon(matrices, lr=c.lr_matrix, weight_decay=c.weight_decay),
        torch.optim.AdamW(others, lr=c.lr_other, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    g = torch.Generator().manual_seed(c.seed)
    start, seconds = 0, 0.0
    resumed = load_checkpoint(folder / "vision_state", optimizers)
    if resumed:
        modules, meta = resumed
        visual.load_state_dict(modules["visual"])
        task.load_state_dict(modules["task"])
        g.set_state(modules["generator"]["state"])
        start, seconds = meta["step"], meta["seconds"]
        keep_log_until(folder / "vision.jsonl", start)
    bank = SpriteBank(styles, keys, c.houses, seed=1 + start // c.redraw)
    began, running = time.monotonic() - seconds, None
    for step in range(start, c.steps):
        visual.requires_grad_(step >= c.heads)
        if c.houses and step > start and step % c.redraw == 0:
            bank.redraw(1 + step // c.redraw)
        for optimizer, lr in zip(optimizers, (c.lr_matrix, c.lr_other), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, c)
        x, concept, tints = make_batch(bank, c, step, g)
        loss, shown = token_losses(visual, task, x, concept, tints, c.smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_([*visual.parameters(), *task.parameters()], 5.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = shown if running is None else 0.98 * running + 0.02 * shown
        done = step + 1
        looks = done % (5 * log_every) == 0 or done == c.steps
        if done % log_every == 0 or looks:
            row = {"step": done, "seconds": round(time.monotonic() - began, 1), "loss": round(running.item(), 4)}
            if looks:
                for name, drawn in check_banks.items():
                    row |= {name + key: share for key, share in accuracy(visual, task, drawn, c.edge).items()}
            with open(folder / "vision.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            print(f"vision {row}", flush=True)
            if looks:
                state = {"visual": visual.state_dict(), "task": task.state_dict(), "generator": generator_state(g)}
                meta = {"step": done, "seconds": time.monotonic() - began, "config": asdict(c)}
                moments = [optimizer.state_dict() for optimizer in optimizers]
                save_checkpoint(folder / "vision_state", state, moments, meta, keep_previous=True)
    return visual
