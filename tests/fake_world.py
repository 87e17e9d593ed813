"""A made-up world of four tiny tasks, and a preset with every stage on it: a whole run takes seconds."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

import q3vl_mini.commands  # noqa: F401  what reads the true TASKS when it is imported has to do so first
from q3vl_mini.config import DataConfig, MergeConfig, MiningConfig, Preset, StageConfig
from q3vl_mini.emoji_world import tasks
from q3vl_mini.records import Quadruple, Relevance

WORDS = "red cat green apple blue dog white horse small tree old house new car tall ship".split()
FAKE = {"find": "image_ret", "look": "text_ret", "name": "image_cls", "alike": "sts"}


def fake_quadruple(name, split="train", n=8, seed=0):
    rng = np.random.default_rng([seed, len(split), len(name)])
    pictures = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]
    texts = [{"text": f"{WORDS[i % 16]} {i}"} for i in range(n)]
    images = [{"image": picture} for picture in pictures]
    queries, corpus = {"find": (texts, images), "name": (images, texts)}.get(name, (texts, [dict(t) for t in texts]))
    scores = {"scores": None}
    relevance = []
    for i in range(n):
        scores = (i / n,) if name == "alike" else None
        relevance.append(Relevance((i,), () if scores else ((i + 1) % n,), scores))
    return Quadruple(name, FAKE[name], "Find it.", queries, corpus, relevance)


def enter_fake_world(change: Callable = setattr) -> None:
    """Put it in the place of Emoji World; `change` sets an attribute."""
    info = {name: tasks.TaskInfo(column, "Find it.", None) for name, column in FAKE.items()}
    change(tasks, "TASKS", info)
    change(tasks, "build", fake_quadruple)
    change(tasks, "benchmark", lambda split, n, seed: [fake_quadruple(k, split, 10, seed) for k in FAKE])
    styles = [replace(fake_quadruple("find", "test", 12, i), name=f"unseen/{i}") for i in (1, 2)]
    change(tasks, "unseen_styles", lambda seed: styles)


def small_preset(checkpoint):
    base = StageConfig(steps=3, batch_size=4, n_negatives=1, lr=5e-3, tasks={"find": 8, "look": 8}, checkpoint_every=2)
    mining = MiningConfig("bootstrap", k=8, t_plus=-1.0, delta_minus=1.0, n_negatives=3)
    every = ("query_document", "query_query", "document_document")
    by_s0 = replace(mining, miner="s0")
    return Preset(
        name="fake",
        backbone=str(checkpoint),
        dims=(0, 32),
        quantizers={"int8": 0.5},
        lora_rank=4,
        lora_alpha=4,
        stages={
            "bootstrap": base,
            "s0": replace(base, terms=every, mining=mining),
            "s1": replace(base, start="s0", tasks=dict.fromkeys(FAKE, 8), loss_per_task=True, mining=by_s0),
            "reranker": replace(base, tasks={"find": 8}, mining=by_s0, n_random=1),
            "s2": replace(base, start="s1", tasks={"find": 6}, mining=replace(mining, miner="s1")),
        },
        data=DataConfig(test_rows=10, validation_rows=4, rerank_top_k=3, batch_size=8),
        merge=MergeConfig(steps=2, probe=8, rank=8),
    )
