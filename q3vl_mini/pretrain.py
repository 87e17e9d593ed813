"""Make Q3VL-tiny: tokenizer, vision tower, language model; saved in Hub format. Resumable at every step."""

import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from . import tiny
from .attention import BY_LENGTH
from .backbone import load
from .checkpoint import claim
from .disk import alone, lock_of
from .emoji_world.dialogues import tokenizer_texts
from .machine import fast_cpu_dtype
from .pretrain_judge import JudgeConfig, pretrain_judge
from .pretrain_language import LanguageConfig, picture_matters, pretrain_language
from .pretrain_vision import VisionConfig, pretrain_vision

WAIT = timedelta(hours=12)  # that a process waits for the first


@dataclass(frozen=True)
class Round:
    """What one round of pre-training does, in this order; None is left out."""

    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    judge: JudgeConfig | None = None


# What is shipped. The second round is short: it shows other houses' designs, and asks as the reranker asks. The third
# teaches to judge.
ROUNDS = (
    Round(VisionConfig(), LanguageConfig()),
    Round(
        VisionConfig(
            steps=900, batch=256, lr_matrix=0.02, lr_other=1e-3, decay=1.0, ramp=0.0, houses=3, redraw=200, heads=100
        ),
        LanguageConfig(
            short_steps=100, steps=400, lr_matrix=0.01, lr_other=1.5e-3, warmup=30, decay=1.0, judged=0.4, balance=0.5,
            seed=7,
        ),
    ),
    Round(judge=JudgeConfig()),
)  # fmt: skip


def pretrain(folder: Path, rounds: Sequence[Round] = ROUNDS, log_every: int = 50) -> Path:
    """Run the rounds, each in a folder of its own (folder/1, ...), from the checkpoint of the one before.

    Each writes its checkpoint to q3vl-tiny in its folder; returns the last one's path. A run that was cut short goes
    on from its last checkpoint; a round may be given more steps, and nothing else of it may change. Curves of a
    round: vision.jsonl, language.jsonl and judge.jsonl. Several processes share what judges; the first does all else.

    Raises:
        ValueError: a folder was begun with another configuration. BlockingIOError: another process works in it.
    """
    folder, made = Path(folder), None
    group = PartialState(cpu=True, timeout=WAIT)
    with alone(lock_of(folder)) if group.is_main_process else nullcontext():
        for number, settings in enumerate(rounds, 1):
            made = _round(folder / str(number), settings, made, log_every, group)
    return made


def _round(folder: Path, c: Round, start: Path | None, log_every: int, group: PartialState) -> Path:
    """One round in its folder, from random weights or from the checkpoint `start`."""
    chosen = {part: values for part, values in asdict(c).items() if values}
    settings = {f"{part}.{name}": value for part, values in chosen.items() for name, value in values.items()}
    loaded = start and load(start, device="cpu", dtype=torch.float32)
    settings["start"] = loaded and loaded.fingerprint()
    if group.is_main_process:
        claim(folder / "config.json", {k: v for k, v in settings.items() if not k.endswith(".steps")}, "a pre-training")
    if fast_cpu_dtype() is not torch.bfloat16 and group.is_main_process:
        warnings.warn(
            "this CPU has no instructions for bfloat16: pre-training takes much longer than "
            "docs/pretraining.md says. The shipped q3vl-tiny needs none of it",
            stacklevel=2,
        )
    if loaded:
        processor, model = loaded.processor, loaded.model.requires_grad_(True)
    else:
        tokenizer = tiny.train_tokenizer(tokenizer_texts())
        processor = tiny.make_processor(tokenizer)
        config = tiny.make_config(tokenizer)
        config._attn_implementation = BY_LENGTH  # on short sequences faster on a CPU than sdpa
        model = tiny.make_model(config, tokenizer)
    if c.vision and group.is_main_process:
        pretrain_vision(model.model.visual, folder, c.vision, log_every)
    if c.language and group.is_main_process:
        pretrain_language(model, processor, folder, c.language, log_every)
    if c.judge:
        pretrain_judge(model, processor, folder, c.judge, log_every)
    out = folder / "q3vl-tiny"
    if group.is_main_process:
        tiny.save(out, model, processor)
        scores = {**chosen, **picture_matters(model, processor)}
        if start:
            scores["start"] = json.loads((start / "pretraining.json").read_text(encoding="utf-8"))
        (out / "pretraining.json").write_text(json.dumps(scores, indent=1) + "\n")
    group.wait_for_everyone()
    return out
