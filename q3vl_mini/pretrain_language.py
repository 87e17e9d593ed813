"""Q3VL-tiny learns to describe and to answer: next-token prediction on dialogues about Emoji World.

Starts from the vision tower of pretrain_vision.py, and with short dialogues: one thing, one name. The loss counts the
answer's tokens alone. A falling loss proves nothing, since a language model can learn the answers' wording without a
look at the picture: so the loss with each question's own picture is logged beside the loss with another's.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .disk import keep_log_until
from .emoji_world import sprites
from .emoji_world.bank import SpriteBank
from .emoji_world.dialogues import Turn, dialogues, judged, short_turns
from .forward import forward_hidden, measure, pad, visual_outputs
from .machine import cpu_autocast
from .media import MediaBudget, as_list
from .memory import give_back_freed
from .muon import Muon
from .templates import chat_prompt, embedder_prompt, prompt_ids, reranker_prompt
from .train import average_gradients

BUDGET = MediaBudget(fps=2.0)
TEMPLATE = "released"  # it ends where an answer begins


@dataclass(frozen=True)
class LanguageConfig:
    """Budget and step sizes. The tower is frozen for `frozen` of the steps, then follows at a smaller rate."""

    short_steps: int = 1_000  # one thing, one name
    short_batch: int = 160
    short_round: int = 32
    strength: float = 0.8  # of the augmentation in the short ones
    steps: int = 2_400  # with the short ones
    batch: int = 64
    lr_matrix: float = 0.02
    lr_other: float = 3e-3
    tower_factor: float = 0.05
    weight_decay: float = 0.02
    warmup: int = 100
    decay: float = 0.35
    frozen: float = 1.0
    round: int = 250  # steps on one set of freshly drawn dialogues
    systems: float = 0.5  # share of the dialogues with a system message
    judged: float = 0.0  # share of the dialogues that ask as the reranker asks, after the short ones
    balance: float = 0.0  # a token of an answer of n weighs n ** -balance; 0.5 in InternVL 2.5 (arXiv 2412.05271)
    seed: int = 0


def collate(turns: list[Turn], processor) -> dict:
    """Dialogues as model inputs with `labels` (B, T): the answers' tokens and their end, -100 elsewhere."""
    names = [f"turn {i}" for i in range(len(turns))]
    prompts, visuals = [], []
    for turn, name in zip(turns, names, strict=True):
        sides = [turn.question] if turn.document is None else [turn.question, turn.document]
        contents, found = measure(sides, BUDGET, processor, 4096, None, {}, [name] * len(sides))
        visuals += found
        if turn.document is not None:
            prompts.append(reranker_prompt(*contents, turn.system, TEMPLATE))
        elif turn.system:
            prompts.append(embedder_prompt(*contents, turn.system, TEMPLATE))
        else:
            prompts.append(chat_prompt(*contents))
    tokenizer = processor.tokenizer
    questions = prompt_ids(prompts, tokenizer, 4096, names)
    answers = [tokenizer(t.answer).input_ids + [tokenizer.eos_token_id] for t in turns]
    inputs = pad([q + a for q, a in zip(questions, answers, strict=True)], visuals, processor, "right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (q, a) in enumerate(zip(questions, answers, strict=True)):
        labels[row, len(q) : len(q) + len(a)] = torch.tensor(a)
    return {"inputs": inputs, "labels": labels}


def answer_logits(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Logits (B, T - 1, V) only where an answer's token is next, as (N, V), and those tokens as labels (B, T - 1)."""
    with cpu_autocast():
        hidden = forward_hidden(model, batch["inputs"], visual_outputs(model, batch["inputs"]["visuals"]))
        wanted = batch["labels"][:, 1:]
        return model.lm_head(hidden[:, :-1][wanted != -100]).float(), wanted


def answer_loss(model: nn.Module, batch: dict, balance: float = 0.0) -> Tensor:
    """Mean negative log likelihood of the answers' tokens, in nats; one of an answer of n weighs n ** -balance."""
    logits, wanted = answer_logits(model, batch)
    counted = wanted != -100
    losses = F.cross_entropy(logits, wanted[counted], reduction="none")
    weights = (counted.sum(1, keepdim=True).clamp(min=1) ** -balance).expand(counted.shape)[counted]
    return (weights * losses).sum() / weights.sum()


def with_shuffled_pictures(turns: list[Turn]) -> list[Turn]:
    """Each question with the picture or clip of the next turn of its kind."""
    by_kind: dict[str, list[Turn]] = {}
    for turn in turns:
        by_kind.setdefault(turn.kind, []).append(turn)
    out = []
    for group in by_kind.values():
        for turn, other in zip(group, group[1:] + group[:1], strict=True):
            visual = {k: v for k, v in other.question.items() if k != "text"}
            said = {k: v for k, v in turn.question.items() if k == "text"}
            out.append(replace(turn, question={**visual, **said}))
    return out


@torch.no_grad()
def picture_matters(model: nn.Module, processor, n: int = 400, seed: int = 10_000, split: str = "validation") -> dict:
    """Loss on unseen pictures with each question's own and with another's picture, nats a token."""
    turns = [t for t in dialogues(n, seed, split) if set(t.question) & {"image", "video"}]
    shuffled = with_shuffled_pictures(turns)

    def mean_loss(rows: list[Turn]) -> float:
        parts = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        return sum(answer_loss(model, collate(p, processor)).item() * len(p) for p in parts) / len(rows)

    return {"own_picture": round(mean_loss(turns), 4), "other_picture": round(mean_loss(shuffled), 4)}


@torch.no_grad()
def judges(model: nn.Module, processor, n: int = 200, seed: int = 10_000, split: str = "validation") -> dict:
    """Share of unseen pairs of a query and a document about which the likelier one of yes and no is right."""
    turns, right = judged(n, seed, split, hard=0.0), 0
    yes, no = (processor.tokenizer.encode(word)[0] for word in ("yes", "no"))
    for start in range(0, len(turns), 64):
        part = turns[start : start + 64]
        logits = answer_logits(model, collate(part, processor))[0][::2]  # the word, then the end of the answer
        says_yes = (logits[:, yes] > logits[:, no]).tolist()
        right += sum(said == (turn.answer == "yes") for said, turn in zip(says_yes, part, strict=True))
    return {"judged_right": round(right / len(turns), 4)}


def rough_length(turn: Turn) -> float:
    """About how many tokens a dialogue takes: only to put alike ones into one batch."""
    instances = [turn.question, turn.document or {}]
    text = turn.system + turn.answer + "".join(x.get("text", "") for x in instances)
    pixels = 0
    for picture in (p for x in instances for p in as_list(x.get("image"), "image")):
        side = getattr(picture, "pixels", 64)
        pixels += picture.width * picture.height if hasattr(picture, "width") else side**2
    return len(text.encode()) / 4 + 68 * ("video" in turn.question) + pixels / 1024 + 60 * (turn.document is not None)


def batches_alike(turns: list[Turn], size: int, seed: int, window: int = 16) -> list[list[Turn]]:
    """Batches of about equal length, so that little is padding: sorted within windows, then shuffled."""
    batches = []
    for start in range(0, len(turns), window * size):
        part = sorted(turns[start : start + window * size], key=rough_length)
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    random.Random(seed).shuffle(batches)
    return batches


def rate(step: int, c: Any) -> float:
    return min(1.0, (step + 1) / c.warmup, (c.steps - step) / max(c.decay * c.steps, 1))


def optimise(
    model: nn.Module,
    folder: Path,
    name: str,
    c: Any,
    backward: Callable[[int], Tensor],
    look: Callable[[], dict],
    log_every: int = 50,
) -> None:
    """Train the model in place, resumable from `folder`; curve: folder/NAME.jsonl.

    Of several processes each has its own losses, and gradients are averaged.

    Args:
        c: steps, lr_matrix, lr_other, tower_factor, weight_decay, warmup, decay, frozen.
        backward: computes the losses of a step and their gradients; returns what the curve shows. What a step sees must
            depend on its number alone.
        look: what is measured at every fifth entry of the curve.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tower = {id(p) for p in model.model.visual.parameters()}
    parameters = list(model.parameters())
    embeddings = id(model.get_input_embeddings().weight)
    is_main = not dist.is_initialized() or dist.get_rank() == 0

    def is_matrix(p: Tensor) -> bool:
        return p.ndim == 2 and id(p) != embeddings

    def groups(wanted) -> list[dict]:
        """The language model's and the tower's parameters, each with its share of the rate."""
        chosen = [p for p in parameters if wanted(p)]
        return [
            {"params": [p for p in chosen if id(p) not in tower], "share": 1.0},
            {"params": [p for p in chosen if id(p) in tower], "share": c.tower_factor},
        ]

    optimizers = [
        Muon(groups(is_matrix), lr=c.lr_matrix, weight_decay=c.weight_decay),
        torch.optim.AdamW(groups(lambda p: not is_matrix(p)), lr=c.lr_other, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    start, seconds = 0, 0.0
    resumed = load_checkpoint(folder / f"{name}_state", optimizers)
    if resumed:
        modules, meta = resumed
        model.load_state_dict(modules["model"], strict=False)
        start, seconds = meta["step"], meta["seconds"]
        if is_main:
            keep_log_until(folder / f"{name}.jsonl", start)
    began, running = time.monotonic() - seconds, None
    for step in range(start, c.steps):
        model.model.visual.requires_grad_(step >= c.frozen * c.steps)
        loss = backward(step)
        average_gradients(p for p in parameters if p.requires_grad)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, lr in zip(optimizers, (c.lr_matrix, c.lr_other), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, c) * group["share"]
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            give_back_freed()
        running = loss if running is None else 0.98 * running + 0.02 * loss
        done = step + 1
        looks = done % (5 * log_every) == 0 or done == c.steps
        if is_main and (done % log_every == 0 or looks):
            row = {"step": done, "seconds": round(time.monotonic() - began, 1), "loss": round(running.item(), 4)}
            if looks:
                row |= look()
            with open(folder / f"{name}.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            print(f"{name} {row}", flush=True)
            if looks:
                meta = {"step": done, "seconds": time.monotonic() - began, "config": asdict(c)}
                state = {"model": model.state_dict()}
                moments = [optimizer.state_dict() for optimizer in optimizers]
                save_checkpoint(folder / f"{name}_state", state, moments, meta, keep_previous=True)


class Drawn:
    """The dialogues of a training, drawn anew for every round of steps, in batches of like length."""

    def __init__(self, c: LanguageConfig):
        self.c, self.of_round, self.batches = c, None, []
        self.bank = SpriteBank(sprites.TRAIN_STYLES, [concept.key for concept in sprites.concepts()])

    def __call__(self, step: int) -> list[Turn]:
        """The batch of a step: it depends on the step's number alone."""
        c, short = self.c, step < self.c.short_steps
        length, size = (c.short_round, c.short_batch) if short else (c.round, c.batch)
        if (short, step // length) != self.of_round:
            self.of_round, seed = (short, step // length), c.seed * 1_000 + step // length
            if short:
                drawn = short_turns(self.bank, length * size, seed, c.strength, c.systems)
            else:
                drawn = dialogues(length * size, seed, systems=c.systems, share_judged=c.judged)
            self.batches = batches_alike(drawn, size, seed)
        return self.batches[step % length % len(self.batches)]


def pretrain_language(model, processor, folder: Path, config: LanguageConfig, log_every: int = 50):
    """Train the model in place, resumable from `folder`; returns it. Curve: folder/language.jsonl."""
    drawn = Drawn(config)

    def backward(step: int) -> Tensor:
        loss = answer_loss(model, collate(drawn(step), processor), config.balance)
        loss.backward()
        return loss.detach()

    def look() -> dict:
        return picture_matters(model, processor) | judges(model, processor)

    optimise(model, folder, "language", config, backward, look, log_every)
    return model
