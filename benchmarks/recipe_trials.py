"""Short contrastive trainings of the tiny backbone with other settings, scored on validation and on redrawn things.

    python benchmarks/recipe_trials.py --lr 0.002 0.005 --steps 80 --out results/recipe_trials.jsonl
    python benchmarks/recipe_trials.py --lr 0.0001 0.0003 --lora-rank 0     full fine-tuning

`redrawn` is the stand-in for unseen styles: every concept drawn once by another hand, found by its name. One line of
JSON a trial.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from q3vl_mini import evaluate, stages
from q3vl_mini.config import load_preset
from q3vl_mini.emoji_world import words
from q3vl_mini.emoji_world.tasks import TASKS, World, build
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.train import embedding_loss, fit

ROWS = {
    "text_to_image": 3000, "image_to_text": 3000, "concept": 2000, "same_thing": 1500, "keyword_search": 1500,
    "cross_lingual": 2000,
}  # fmt: skip
CHECKED = ("text_to_image", "concept", "cross_lingual", "keyword_search", "scene_retrieval", "video_retrieval")


def redrawn(seed: int = 77) -> Quadruple:
    """Text-to-image retrieval of single things, every concept once, none as its style draws it."""
    w = World("train", "redrawn", seed)
    corpus = []
    for key in w.keys:
        while not (scene := w.single(key, tinted=0.0)).objects[0].hand:
            pass
        corpus.append({"image": scene})
    queries = [{"text": f"a picture of {words.with_article(words.name(key))}"} for key in w.keys]
    relevance = [Relevance((i,)) for i in range(len(queries))]
    return Quadruple("redrawn", "image_ret", TASKS["text_to_image"].instruction, queries, corpus, relevance)


def trial(lr: float, steps: int, batch_size: int, temperature: float, lora_rank: int, folder: Path) -> dict:
    """Train from the raw backbone without mining; settings, loss and scores."""
    preset = load_preset("tiny")
    changes = {"lr": lr, "steps": steps, "batch_size": batch_size, "temperature": temperature}
    config = replace(preset.stages["s0"], tasks=ROWS, mining=None, n_negatives=0, **changes)
    run = stages.Run(replace(preset, stages={"s0": config}, lora_rank=lora_rank), folder, progress=False)
    model = run.model("raw", trainable=True)
    options, quantizers = run.objective(model)
    stream = stages.batch_stream(stages.training_data(config, preset.seed), config, steps, preset.seed)
    began = time.monotonic()
    log = fit(
        model,
        lambda encode, batch: embedding_loss(encode, batch, config, **options),
        stream,
        config,
        folder / "trial",
        quantizers=quantizers,
        accelerator=run.accelerator,
        progress=False,
    )
    scores = {}
    for quadruple in [redrawn(), *(build(name, "validation", 200, 1) for name in CHECKED)]:
        [(_, queries, corpus)] = evaluate.encoded(model, [quadruple], batch_size=128)
        for metric in ("hit@1", "hit@10"):
            score = evaluate.score_quadruple(queries, corpus, quadruple, metric=metric).score
            scores[f"{quadruple.name} {metric}"] = round(float(score), 3)
    loss = round(float(np.mean([row["loss"] for row in log[-30:]])), 3)
    return changes | {"lora_rank": lora_rank, "seconds": round(time.monotonic() - began), "loss": loss, **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.002, 0.005, 0.01])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.03)
    parser.add_argument("--lora-rank", type=int, default=load_preset("tiny").lora_rank, help="0 is full fine-tuning")
    parser.add_argument("--out", type=Path, help="a file to which each trial adds a line")
    options = parser.parse_args()
    for lr in options.lr:
        with tempfile.TemporaryDirectory() as folder:
            row = trial(lr, options.steps, options.batch_size, options.temperature, options.lora_rank, Path(folder))
        print(json.dumps(row), flush=True)
        if options.out:
            with open(options.out, "a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
