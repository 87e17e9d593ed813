"""Q3VL-tiny learns to judge: whether a document meets a query, asked as the reranker asks.

Qwen3-VL-Instruct can compare what it is shown before any reranker is trained from it. A small model has to be taught,
and a pair at a time teaches it little: so every query comes with several documents, which share its prompt
(forward_by_query), and all dialogues are rehearsed beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .emoji_world.candidates import Candidates, draw
from .emoji_world.dialogues import JUDGED
from .emoji_world.tasks import build
from .evaluate import judge_quadruple
from .machine import fast_cpu_dtype
from .pretrain_language import (
    BUDGET,
    TEMPLATE,
    Drawn,
    LanguageConfig,
    answer_loss,
    collate,
    judges,
    optimise,
    picture_matters,
)
from .reranker import Reranker


@dataclass(frozen=True)
class JudgeConfig:
    """Budget and step sizes. A step has `parts` batches, each of one task, which several processes share."""

    steps: int = 2_500
    parts: int = 2
    queries: int = 24
    documents: int = 16  # a query
    confusing: int = 4  # of them
    things: float = 0.5  # share of the batches that are of single things from the bank
    tokens: int = 5_000  # of a batch of other tasks, about
    strength: float = 0.8  # of the augmentation of single things
    rehearsed: int = 20  # dialogues beside each batch
    lr_matrix: float = 0.01
    lr_other: float = 1.5e-3
    tower_factor: float = 0.0
    weight_decay: float = 0.02
    warmup: int = 30
    decay: float = 0.5
    frozen: float = 1.0
    seed: int = 11


def judging_loss(margins: Tensor, relevant: Tensor) -> Tensor:
    """How far margins logit(yes) - logit(no) are from right: each by itself, and among the documents of its query.

    The first is the next token's loss over "yes" and "no" (eq. 4), with as much weight for right documents as for
    wrong ones; the second the cross-entropy of the right documents among all of their query (Gao et al. 2021, arXiv
    2101.08751).

    Args:
        margins: (N, K). relevant: bool (N, K), at least one true and one false a row.
    """
    right = relevant.float()
    each = F.softplus(torch.where(relevant, -margins, margins))
    balanced = (each * (right / right.sum(1, True) + (1 - right) / (1 - right).sum(1, True)) / 2).sum(1)
    among = margins.logsumexp(1) - margins.masked_fill(~relevant, -torch.inf).logsumexp(1)
    return (balanced + among).mean()


def first_of(reranker: Reranker, n: int = 30, k: int = 16, seed: int = 10_000, split: str = "validation") -> dict:
    """Share of unseen queries whose right document has the largest margin of k, by task and the mean."""
    found = {}
    for name in JUDGED:
        quadruple = build(name, split, max(n, 8), seed).select(range(n)).with_candidates(k)
        found[name] = round(judge_quadruple(reranker, quadruple, batch_size=128).score, 4)
    return {f"first_of_{k}": round(float(np.mean(list(found.values()))), 4), "by_task": found}


def pretrain_judge(model: nn.Module, processor, folder: Path, config: JudgeConfig, log_every: int = 50):
    """Train the model in place, resumable from `folder`; returns it. Curve: folder/judge.jsonl."""
    c = config
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if c.parts % world:
        raise ValueError(f"{c.parts} parts of a step do not go evenly into {world} processes")
    if world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    autocast = torch.bfloat16 if fast_cpu_dtype() is torch.bfloat16 else None
    reranker = Reranker.from_backbone(
        Backbone(model, processor), template=TEMPLATE, autocast=autocast, max_length=4096, budget=BUDGET
    )
    rehearsal = Drawn(LanguageConfig(short_steps=0, batch=c.rehearsed, seed=c.seed, balance=0.5))

    def candidates(step: int, part: int) -> Candidates:
        seed = (c.seed * 1_000_000 + step) * c.parts + part
        return draw(rehearsal.bank, c.things, c.queries, c.documents, c.confusing, seed, c.strength, c.tokens)

    def backward(step: int) -> Tensor:
        told = []
        share = range(rank, c.parts, world)
        for part in share:
            drawn = candidates(step, part)
            instruction = drawn.instruction if step % 8 else None  # the default one must work as well
            margins = reranker(reranker.collate(drawn.pairs, instruction)).view(drawn.relevant.shape)
            loss = judging_loss(margins, drawn.relevant)
            (loss / len(share)).backward()
            spoken = answer_loss(model, collate(rehearsal(step * c.parts + part), processor), rehearsal.c.balance)
            (spoken / len(share)).backward()
            told.append(loss.detach())
        return torch.stack(told).mean()

    def look() -> dict:
        seen = picture_matters(model, processor, n=200) | judges(model, processor) | first_of(reranker)
        model.train()
        return seen

    reranker.train()
    optimise(model, folder, "judge", c, backward, look, log_every)
    reranker.eval()
    return model
