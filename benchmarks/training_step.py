"""A step of stage 1 with Q3VL-tiny against sentence-transformers' trainer, batch 128, one picture and one text a pair.

    python benchmarks/training_step.py

Ours is `train.fit` with the preset's objective: InfoNCE with the query-query and document-document terms and the masks
against false negatives, at four dimensions, each in float32, int8 and binary. Theirs is SentenceTransformerTrainer with
MatryoshkaLoss over MultipleNegativesRankingLoss with the same terms and dimensions, and with the same LoRA: it has no
masks and no quantised terms, so it does less. Both draw and lay out their pictures within the step.

Ours keeps what the frozen vision tower made of a picture: "new pictures" has an empty store, as in the first epoch,
"pictures seen before" a full one, as in all others. A step is what lies between the ends of two consecutive ones.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from side_by_side import ratio, write
from transformers import TrainerCallback

from q3vl_mini import stages
from q3vl_mini.backbone import LORA_MODULES
from q3vl_mini.config import load_preset
from q3vl_mini.data import mixed_batches, png_bytes
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.export import export
from q3vl_mini.machine import fast_cpu_dtype
from q3vl_mini.train import embedding_loss, fit


class Ours:
    """`fit` as the preset runs it, on the text-to-image task."""

    def __init__(self, batch: int, steps: int, folder: Path):
        self.preset = load_preset("tiny")
        self.stage = replace(
            self.preset.stages["s0"], steps=steps, batch_size=batch, n_negatives=0, mining=None, tasks={}
        )
        self.run = stages.Run(self.preset, folder / "ours", progress=False, tracker="none")
        self.model = self.run.model("raw", trainable=True)
        self.options, self.quantizers = self.run.objective(self.model)
        self.data = build("text_to_image", "train", batch * (steps + 1), 0)
        self.folder, self.count = folder, 0

    def seconds(self, keep_pictures: bool) -> float:
        """Of a step; with `keep_pictures` those that an earlier call saw are not computed again."""
        if not keep_pictures:
            self.run.store.clear()
        self.count += 1

        def batches(start: int):
            settings = {"batch_size": self.stage.batch_size, "n_negatives": 0, "steps": self.stage.steps}
            return mixed_batches([self.data], seed=0, start=start, **settings)

        def loss(encode, batch):
            return embedding_loss(encode, batch, self.stage, **self.options)

        log = fit(
            self.model,
            loss,
            batches,
            self.stage,
            self.folder / f"fit-{self.count}",
            quantizers=self.quantizers,
            progress=False,
        )
        return (log[-1]["seconds"] - log[0]["seconds"]) / (len(log) - 1)


class StepEnds(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


class Theirs:
    """SentenceTransformerTrainer on the same pairs, exported weights and trainable parameters."""

    def __init__(self, batch: int, steps: int, folder: Path, ours: Ours):
        preset, data = ours.preset, ours.data
        exported = export(preset.backbone, folder / "exported", role="embedder")
        self.model = SentenceTransformer(str(exported), device="cpu")
        self.model.requires_grad_(False)
        lora = LoraConfig(r=preset.lora_rank, lora_alpha=preset.lora_alpha, target_modules=LORA_MODULES)
        inject_adapter_in_model(lora, self.model[0].auto_model)  # its own add_adapter wants a newer peft
        pictures = [data.corpus[r.positives[0]]["image"] for r in data.relevance]
        rows = {"anchor": [q["text"] for q in data.queries]}
        rows["positive"] = [{"bytes": png_bytes(picture), "path": None} for picture in pictures]
        self.rows = Dataset.from_dict(rows).cast_column("positive", Image())
        terms = ("query_to_doc", "query_to_query", "doc_to_doc")
        scale = 1 / ours.stage.temperature
        ranking = MultipleNegativesRankingLoss(self.model, scale=scale, directions=terms)
        weights = list(preset.dim_weights)
        self.loss = MatryoshkaLoss(self.model, ranking, [d or ours.model.dim for d in preset.dims], weights)
        self.arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder / "theirs"),
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=ours.stage.lr,
            prompts={"anchor": data.instruction},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=fast_cpu_dtype() is torch.bfloat16,  # as the run has it
        )

    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def seconds(self) -> float:
        ends = StepEnds()
        SentenceTransformerTrainer(
            self.model, self.arguments, train_dataset=self.rows, loss=self.loss, callbacks=[ends]
        ).train()
        return (ends.times[-1] - ends.times[0]) / (len(ends.times) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="2 or more: the first one is not timed")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: the first step is not timed; give 2 or more")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        ours = Ours(options.batch, options.steps, Path(name))
        theirs = Theirs(options.batch, options.steps, Path(name), ours)
        trained = sum(p.numel() for p in ours.model.parameters() if p.requires_grad), theirs.trainable()
        seconds: dict[str, list[float]] = {"theirs": [], "new": [], "seen": []}
        for _ in range(options.rounds):
            seconds["theirs"].append(theirs.seconds())
            seconds["new"].append(ours.seconds(keep_pictures=False))
            seconds["seen"].append(ours.seconds(keep_pictures=True))
    label = "sentence-transformers' trainer over ours, time of a step, "
    write(
        "training_step",
        f"Q3VL-tiny, batch {options.batch} of texts and 64 px pictures, LoRA of rank {ours.preset.lora_rank}",
        [
            ratio(label + "new pictures", seconds["theirs"], seconds["new"], "at least", 2),
            ratio(label + "pictures seen before", seconds["theirs"], seconds["seen"], "at least", 2),
        ],
        trainable_parameters=trained,
    )


if __name__ == "__main__":
    main()
