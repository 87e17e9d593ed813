"""Make Q3VL-tiny: tokenizer, vision tower, language model; saved in Hub format. Resumable at every step."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from . import tiny
from .checkpoint import claim
from .disk import alone, lock_of
from .emoji_world.dialogues import tokenizer_texts
from .machine import fast_cpu_dtype
from .pretrain_language import LanguageConfig, picture_matters, pretrain_language
from .pretrain_vision import VisionConfig, pretrain_vision
from .vision import speed_up


def pretrain(
    folder: Path, vision: VisionConfig | None = None, language: LanguageConfig | None = None, log_every: int = 50
) -> Path:
    """Run both steps in `folder` and write the checkpoint to folder/q3vl-tiny; returns that path.

    A run that was cut short goes on from its last checkpoint; it may be given more steps, and nothing else may change.
    Curves: vision.jsonl and language.jsonl.

    Raises:
        ValueError: the folder was begun with another configuration. BlockingIOError: another process works in it.
    """
    vision, language, folder = vision or VisionConfig(), language or LanguageConfig(), Path(folder)
    with alone(lock_of(folder)):
        return _pretrain(folder, vision, language, log_every)


def _pretrain(folder: Path, vision: VisionConfig, language: LanguageConfig, log_every: int) -> Path:
    settings = {f"vision.{name}": value for name, value in asdict(vision).items()}
    settings |= {f"language.{name}": value for name, value in asdict(language).items()}
    claim(folder / "config.json", {k: v for k, v in settings.items() if not k.endswith(".steps")}, "a pre-training")
    if fast_cpu_dtype() is not torch.bfloat16:
        warnings.warn(
            "this CPU has no instructions for bfloat16: pre-training takes much longer than "
            "docs/pretraining.md says. The shipped q3vl-tiny needs none of it",
            stacklevel=2,
        )
    tokenizer = tiny.train_tokenizer(tokenizer_texts())
    processor = tiny.make_processor(tokenizer)
    config = tiny.make_config(tokenizer)
    config._attn_implementation = "eager"  # on short sequences its backward is faster on a CPU than sdpa's
    model = tiny.make_model(config, tokenizer)
    speed_up(model.model.visual)
    pretrain_vision(model.model.visual, folder, vision, log_every)
    pretrain_language(model, processor, folder, language, log_every)
    out = folder / "q3vl-tiny"
    tiny.save(out, model, processor)
    scores = {"vision": asdict(vision), "language": asdict(language), **picture_matters(model, processor)}
    (out / "pretraining.json").write_text(json.dumps(scores, indent=1) + "\n")
    return out
