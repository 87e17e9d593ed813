"""The recipes of the report's figure 5: bootstrap, s0, s1, the reranker, s2, s3.

Each stage reads only what earlier stages wrote, and writes a folder: model/ (Hub format), log.jsonl, curve.png,
mined.json where it mined, and metrics.json last: a stage that has it is finished and is not run again.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import PeftModel
from tqdm.auto import tqdm

from . import backbone, combine, evaluate, merge, mining, sharding, zero
from .compression import Quantizers
from .config import DataConfig, MiningConfig, Preset, StageConfig, differences, load_config, save_config
from .data import Teacher, load_quadruple, mixed_batches
from .disk import alone, discard, lock_of, write_whole, writing
from .embedder import Embedder
from .emoji_world import tasks
from .forward import VisualStore
from .lora import fold_lora
from .losses import info_nce
from .machine import fast_cpu_dtype
from .media import MediaBudget
from .memory import LITTLE_MB, give_back_freed, peak_memory_mb
from .noise import add_noise
from .public_data.gather import prepare
from .public_data.sets import SETS
from .records import Quadruple, Relevance
from .report import git_revision, plot_curve, write_json
from .reranker import Reranker
from .train import LossOnBatch, distillation_step, embed_again, embedding_loss, fit, loss_of, reranker_step
from .usable import load_usable

WAIT = timedelta(hours=12)  # that a process waits for the others, which may have more to mine or to evaluate
VECTORS = "vectors-"  # what folders of vectors that mining reads from disk begin with
ROWS_IN_MEMORY = 200_000  # of a corpus that is mined: 1.6 GB at 2048 dimensions; vectors of a larger one lie on disk


class Run:
    """A preset at work in a folder: what all stages share, and where each one's things lie.

    The vision tower is frozen, so one VisualStore serves every stage and both models. The processes of one run share
    the folder, so it must be one that all of them see; a second run in it is refused (`at_work`).

    tracker: what draws the curves besides log.jsonl: "tensorboard" or another that accelerate knows, "none", or "auto"
    for TensorBoard where it is installed.
    """

    def __init__(self, preset: Preset, folder: str | Path, progress: bool = True, tracker: str = "auto"):
        self.shard, self.zero = sharding.asked_by_launch() or preset.shard, zero.asked_by_launch()
        self.preset, self.folder, self.progress = preset, Path(folder), progress
        data, half = preset.data, preset.dtype == "float16"
        self.store = VisualStore(data.store_mb * 2**20)
        self.budget = media_budget(data)
        # the models compute in the dtype that the preset names; what accelerate adds for float16 is loss scaling
        gpu = torch.cuda.is_available()
        if tracker == "auto":
            tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        self.accelerator = Accelerator(
            cpu=not gpu,
            mixed_precision="fp16" if half and gpu else "no",
            log_with=None if tracker == "none" else tracker,
            project_dir=self.folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
        self.is_main = self.accelerator.is_main_process
        self._lock = lock_of(self.folder)
        file = self.folder / "config.json"
        with nullcontext() if file.is_file() else self.at_work():
            if file.is_file() and load_config(file) != preset:
                changed = differences(load_config(file), preset)
                raise ValueError(
                    f"{file} is of another configuration: {', '.join(changed)}; give another folder, remove this one, "
                    f"or go on with --config {file}"
                )
            if self.is_main and not file.is_file():
                save_config(preset, file)
        if tracker != "none":
            self.accelerator.init_trackers("curves")
        self.accelerator.wait_for_everyone()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """To be held while something is written: no other run does then. An error of a full disk names the folder.

        Raises BlockingIOError if another process holds it.
        """
        with alone(self._lock) if self.is_main else nullcontext(), writing(self.folder):
            yield

    def model(self, stage: str, kind: type = Embedder, trainable: bool = False) -> Embedder | Reranker:
        """The Embedder or Reranker that a stage wrote; "raw" is the preset's backbone."""
        if stage != "raw":
            self.metrics(stage)  # says so if the stage is not finished
        return self.load(self.preset.backbone if stage == "raw" else self.folder / stage / "model", kind, trainable)

    def load(self, path: str | Path, kind: type = Embedder, trainable: bool = False) -> Embedder | Reranker:
        """A checkpoint as this run computes with it. If trainable, an adapter goes on, full weights get a fresh one.

        With lora_rank = 0 the full weights of the language model are trained instead, in float32.
        """
        full = trainable and not self.preset.lora_rank
        dtype = getattr(torch, name) if (name := "float32" if full else self.preset.dtype) else None
        loaded = backbone.load(path, device=self.accelerator.device, dtype=dtype, trainable=trainable)
        if full and isinstance(loaded.model, PeftModel):
            raise ValueError(f"{path} is an adapter, and lora_rank = 0 trains full weights; merge it first (export)")
        if not isinstance(loaded.model, PeftModel):
            loaded.model.requires_grad_(False)
            if full:
                backbone.inner(loaded.model).model.language_model.requires_grad_(True)
            elif trainable:
                torch.manual_seed(self.preset.seed)
                loaded.model = backbone.add_lora(loaded.model, self.preset.lora_rank, self.preset.lora_alpha)
        if trainable and self.preset.checkpointing:
            backbone.inner(loaded.model).gradient_checkpointing_enable({"use_reentrant": False})
        if self.accelerator.device.type == "cpu":
            fold_lora(loaded.model)
        return kind.from_backbone(
            loaded,
            template=self.preset.template,
            autocast=self.autocast,
            max_length=self.preset.data.max_length,
            budget=self.budget,
            store=self.store,
        )

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype to compute in, if it is not that of the weights."""
        if self.preset.autocast != "auto":
            return getattr(torch, self.preset.autocast) if self.preset.autocast else None
        faster = self.accelerator.device.type == "cpu" and fast_cpu_dtype() is torch.bfloat16
        return torch.bfloat16 if faster else None

    def objective(self, model: Embedder) -> tuple[dict[str, Any], Quantizers | None]:
        """The options of embedding_loss that the preset names, and the learned steps among them."""
        dims = [d or model.dim for d in self.preset.dims]
        quantizers = None
        if self.preset.quantizers:
            quantizers = model.quantizers or Quantizers(dims).to(self.accelerator.device)
        options = {"dims": dims, "dim_weights": self.preset.dim_weights, "quantizers": quantizers}
        return options | {"quantizer_weights": dict(self.preset.quantizers)}, quantizers

    def divided(self, file: Path, work: Sequence, make: Callable[[Sequence], dict[str, Any]]) -> dict[str, Any]:
        """make(share) of each process's share of `work`, joined: in every process the same JSON-like dict.

        They meet in files beside `file`.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        parts = [file.with_name(f"{file.stem}-{i}-of-{world}.json") for i in range(world)]
        write_json(parts[rank], make(work[rank::world]))
        self.accelerator.wait_for_everyone()
        joined: dict[str, Any] = {}
        for part in parts:
            joined |= json.loads(part.read_text())
        self.accelerator.wait_for_everyone()
        parts[rank].unlink()
        return joined

    def metrics(self, stage: str) -> dict[str, Any]:
        file = self.folder / stage / "metrics.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.folder} has no finished stage {stage!r} ({file}); run it first")
        return json.loads(file.read_text())

    def finished(self, stage: str) -> bool:
        return (self.folder / stage / "metrics.json").is_file()


def media_budget(data: DataConfig) -> MediaBudget:
    """Sizes of visuals as a preset names them."""
    return MediaBudget(
        image_min_tokens=data.image_min_tokens,
        image_max_tokens=data.image_max_tokens,
        video_max_tokens=data.video_max_tokens,
        fps=data.fps,
        max_frames=data.max_frames,
    )


def sub_dataset(name: str, rows: int, seed: int, public: str | Path = DataConfig.public) -> Quadruple:
    """`rows` training queries of an Emoji World task, a public set, or a folder that data.save_quadruple wrote.

    What cannot be used of a folder is left out, and named in the stage's metrics.json (usable.usable).
    public: the folder of public sets; one that is not prepared there is prepared now.
    """
    if name in tasks.TASKS:
        return tasks.build(name, "train", rows, seed)
    if name in SETS:
        quadruple = load_quadruple(prepare(name, rows, seed, public))
        return quadruple.select(range(min(rows, len(quadruple))))
    if not (Path(name) / "card.json").is_file():
        known = ", ".join([*tasks.TASKS, *SETS])
        raise ValueError(f"no sub-dataset {name!r}: neither a folder with a card.json, nor one of {known}")
    return load_usable(name, rows, seed)


def training_data(config: StageConfig, seed: int, data: DataConfig | None = None) -> list[Quadruple]:
    """The sub-datasets of a stage. The same seed for all stages: they share pictures, whose features are kept.

    Noise that `data` asks for is added where the loss is InfoNCE, as mining can mend it there; which labels are wrong
    the quadruples do not tell.
    """
    data = data or DataConfig()
    quadruples = [sub_dataset(name, rows, seed, data.public) for name, rows in config.tasks.items()]
    if not (data.wrong_labels or data.unlabelled_duplicates):
        return quadruples
    rates = {"wrong": data.wrong_labels, "duplicates": data.unlabelled_duplicates}
    spoiled = [add_noise(q, **rates, seed=seed) if loss_of(q.task, config) is info_nce else q for q in quadruples]
    return [replace(q, meta={key: x for key, x in q.meta.items() if key != "truth"}) for q in spoiled]


def mined_data(run: Run, stage: str) -> list[Quadruple]:
    """A stage's data with refined positives and mined negatives (section 3.3); labels are kept in mined.json.

    What another stage mined with the same miner, setting and rows is read, not mined again: the reranker trains on
    the data of s1. Graded pairs (STS) are left as they are, and so is what gets the classification loss: there only
    the explicitly wrong labels are negatives.
    """
    config, file = run.preset.stages[stage], run.folder / stage / "mined.json"
    with run.accelerator.main_process_first():  # it prepares what no earlier run did, the others read it
        quadruples = training_data(config, run.preset.seed, run.preset.data)
    quadruples = thinned(quadruples, run.preset.data.train_documents)
    if config.mining is None:
        return quadruples
    known = json.loads(file.read_text())["labels"] if file.is_file() else _mined_elsewhere(run, stage)
    todo = [q for q in quadruples if q.name not in known and loss_of(q.task, config) is info_nce]
    if todo:
        miner = run.model(config.mining.miner)
        large = any(len(quadruple.corpus) > ROWS_IN_MEMORY for quadruple in todo)
        options = {"batch_size": run.preset.data.batch_size, "progress": run.progress and run.is_main}

        def mined(share: Sequence[Quadruple]) -> dict[str, Any]:
            with TemporaryDirectory(dir=run.folder, prefix=VECTORS, ignore_cleanup_errors=True) as folder:
                vectors = evaluate.encoded(miner, share, folder=Path(folder) if large else None, **options)
                return {q.name: mined_labels(q, queries, corpus, config.mining) for q, queries, corpus in vectors}

        known |= run.divided(file, sorted(todo, key=len, reverse=True), mined)
    if run.is_main:
        kept = {q.name: known[q.name] for q in quadruples if q.name in known}
        write_json(file, {"mining": asdict(config.mining), "tasks": dict(config.tasks), "labels": kept})
    run.accelerator.wait_for_everyone()
    return [with_labels(q, known[q.name]) if q.name in known else q for q in quadruples]


def mined_labels(
    quadruple: Quadruple, queries: np.ndarray, corpus: np.ndarray, config: MiningConfig
) -> dict[str, Any]:
    """What mining keeps of a sub-dataset, as JSON: [row, positives, negatives] of each query, and the report."""
    setting = {name: value for name, value in asdict(config).items() if name != "miner"}
    found = mining.mine(quadruple, queries, corpus, **setting)
    rows = [[q.row, q.positives, q.negatives] for q in found.queries]
    histograms = {name: counts.tolist() for name, counts in found.histograms().items() if name != "edges"}
    return {"rows": rows, "report": found.report, "histograms": histograms}


def with_labels(quadruple: Quadruple, labels: Mapping[str, Any]) -> Quadruple:
    """The queries that mining kept, with its labels (`mined_labels`)."""
    kept = quadruple.select([row for row, _, _ in labels["rows"]])
    relevance = [Relevance(tuple(positives), tuple(negatives)) for _, positives, negatives in labels["rows"]]
    return replace(kept, relevance=relevance, meta={**kept.meta, "mining": labels["report"]})


def _mined_elsewhere(run: Run, stage: str) -> dict[str, Any]:
    config, known = run.preset.stages[stage], {}
    for file in run.folder.glob("*/mined.json"):
        other = json.loads(file.read_text())
        if other["mining"] == asdict(config.mining):
            same = {name for name, rows in config.tasks.items() if other["tasks"].get(name) == rows}
            known |= {name: labels for name, labels in other["labels"].items() if name in same}
    return known


def teacher_logits(
    reranker: Any, quadruples: Sequence[Quadruple], n_negatives: int, batch_size: int
) -> dict[str, Teacher]:
    """The reranker's margins of each query's first positive and first n_negatives, by name, row and document."""
    out: dict[str, Teacher] = {}
    for quadruple in tqdm(quadruples, desc="teacher", leave=False):
        chosen = [(r.positives[0], *r.negatives[:n_negatives]) for r in quadruple.relevance]
        wanted = [(i, document) for i, documents in enumerate(chosen) for document in documents]
        pairs = [(quadruple.queries[i], quadruple.corpus[d]) for i, d in wanted]
        logits = reranker.logits(pairs, instruction=quadruple.instruction, batch_size=batch_size)
        rows: dict[int, dict[int, float]] = {}
        for (i, d), logit in zip(wanted, logits.tolist(), strict=True):
            rows.setdefault(i, {})[d] = logit
        out[quadruple.name] = rows
    return out


def train_contrastive(run: Run, stage: str) -> dict[str, Any]:
    """bootstrap, s0 and s1: mine, then InfoNCE with the terms, or the losses by task, that the config names.

    bootstrap only stands in for the existing model that mines stage 1 (GME in the report).
    """
    config = run.preset.stages[stage]
    model = run.model(config.start, trainable=True)
    options, quantizers = run.objective(model)

    def loss(encode, batch):
        return embedding_loss(encode, batch, config, **options)

    return _train(run, stage, model, loss, mined_data(run, stage), quantizers)


def train_reranker(run: Run, stage: str = "reranker") -> dict[str, Any]:
    """reranker: from the backbone (not from s0), on the retrieval part of the data that s0 mined for s1."""
    model = run.model(run.preset.stages[stage].start, Reranker, trainable=True)
    return _train(run, stage, model, reranker_step, mined_data(run, stage))


def kept_teacher(run: Run, stage: str, quadruples: Sequence[Quadruple]) -> dict[str, Teacher]:
    """The run's reranker as the teacher of a stage's data (`teacher_logits`), asked once; kept in teacher.json."""
    file = run.folder / stage / "teacher.json"
    if not file.is_file():
        ask = partial(
            teacher_logits,
            run.model("reranker", Reranker),
            n_negatives=run.preset.stages[stage].n_negatives,
            batch_size=run.preset.data.batch_size,
        )
        logits = run.divided(file, quadruples, ask)
        if run.is_main:
            write_json(file, logits)
    run.accelerator.wait_for_everyone()
    stored = json.loads(file.read_text())
    return {
        name: {int(i): {int(d): logit for d, logit in row.items()} for i, row in rows.items()}
        for name, rows in stored.items()
    }


def distil(run: Run, stage: str = "s2") -> dict[str, Any]:
    """s2: s1 taught by the reranker's logits over one positive and k negatives, computed once and kept."""
    config, quadruples = run.preset.stages[stage], mined_data(run, stage)
    teacher = kept_teacher(run, stage, quadruples)
    model = run.model(config.start, trainable=True)
    options, quantizers = run.objective(model)

    def loss(encode, batch):
        return distillation_step(encode, batch, config, **options)

    return _train(run, stage, model, loss, quadruples, quantizers, teacher)


def merge_models(run: Run, stage: str = "s3") -> dict[str, Any]:
    """s3: Self Positioning of s1 and s2 around the raw backbone, on a probe set of s1's data, as one adapter.

    The learned steps of the quantisers are the means of those of s1 and s2.
    """
    run.preset.require_adapters("s3")
    vectors, quantizers, began = [], [], time.monotonic()
    for source in ("s1", "s2"):
        model = run.model(source)
        vectors.append(combine.vector_of(model.model))
        quantizers.append(model.quantizers)
    raw = run.model("raw")
    found = self_positioned(run, raw, vectors)
    delta = merge.position(vectors, found.a, found.lam)
    raw.model, adapter = combine.add_delta(raw.model, delta, run.preset.merge.rank)
    raw.backbone.model = raw.model
    log = [{"step": i + 1, **row} for i, row in enumerate(found.history)]
    facts = {"a": found.a, "lambda": found.lam, "angle": merge.angle(*vectors), "adapter_error": adapter.error}
    if run.is_main:
        write_whole(run.folder / stage / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    steps = combine.mean_quantizers(quantizers)
    return _finish(run, stage, raw, log, steps, time.monotonic() - began, facts)


def self_positioned(
    run: Run, raw: Embedder, vectors: Sequence[merge.Vector], base: merge.Vector | None = None
) -> merge.Position:
    """Self Positioning of task vectors on a probe set of s1's data, with its loss.

    raw: the backbone without an adapter. base: what lies between it and the model that `vectors` start from, if that
    is another.
    """
    config, s1 = run.preset.merge, run.preset.stages["s1"]
    probe = [q.select(range(min(config.probe, len(q)))) for q in mined_data(run, "s1")]
    batches = batch_stream(probe, s1, config.steps, run.preset.seed)(0)
    options = run.objective(raw)[0] | {"quantizers": None, "quantizer_weights": None}
    bar = tqdm(total=config.steps, desc="s3", disable=not (run.progress and run.is_main))

    def loss_at(delta: merge.Vector) -> torch.Tensor:
        whole = delta if base is None else merge.linear([base, delta], [1.0, 1.0])
        give_back_freed(above_mb=LITTLE_MB)
        bar.update()

        def moved(part: Mapping[str, Any]) -> torch.Tensor:
            with merge.apply_delta(raw.model, whole):
                return raw(part)

        encode = embed_again(raw, s1.chunk_tokens // 2, moved)  # a layer's output is there twice, moved and not
        return embedding_loss(encode, next(batches), s1, **options)

    with bar:
        return merge.self_position(loss_at, vectors, mu=config.mu, steps=config.steps, lr=config.lr)


def batch_stream(quadruples, config: StageConfig, steps: int, seed: int, teacher=None):
    """`fit`'s stream: the batches from number `start` on."""

    def stream(start: int) -> Iterator:
        return mixed_batches(
            quadruples,
            batch_size=config.batch_size,
            n_negatives=config.n_negatives,
            n_random=config.n_random,
            steps=steps,
            seed=seed,
            start=start,
            exponent=config.exponent,
            teacher=teacher,
        )

    return stream


def _train(
    run: Run,
    stage: str,
    model: Embedder | Reranker,
    loss: LossOnBatch,
    quadruples: list[Quadruple],
    quantizers: Quantizers | None = None,
    teacher: Mapping[str, Teacher] | None = None,
) -> dict[str, Any]:
    config, folder, began = run.preset.stages[stage], run.folder / stage, time.monotonic()
    stream = batch_stream(quadruples, config, config.steps * config.accumulate, run.preset.seed, teacher)
    log = fit(
        model,
        loss,
        stream,
        config,
        folder,
        quantizers=quantizers,
        accelerator=run.accelerator,
        shard=run.shard,
        zero=run.zero,
        progress=run.progress,
    )
    mined = {q.name: q.meta["mining"] for q in quadruples if "mining" in q.meta}
    seconds = max(time.monotonic() - began, log[-1]["seconds"])  # the log counts earlier, interrupted tries too
    left_out = {q.name: q.meta["left_out"] for q in quadruples if "left_out" in q.meta}
    return _finish(run, stage, model, log, quantizers, seconds, {"mining": mined, "left_out": left_out})


def _finish(
    run: Run, stage: str, model, log: list[dict], quantizers, seconds: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """Save the model with its card, and the curve. Returns the metrics: did it beat what it started from?"""
    if not run.is_main:
        return {}
    folder, preset = run.folder / stage, run.preset
    start = preset.stages[stage].start if stage in preset.stages else "s1"
    validation = {"before": _validation_of_start(run, start, type(model)), "after": _validate(run, model)}
    card = {"role": model.role, "template": preset.template, "preset": preset.name, "stage": stage}
    card |= {"fps": preset.data.fps, "seed": preset.seed, "git": git_revision()}
    if validation["after"] is not None:
        card["validation"] = validation
    backbone.save(folder / "model", model.model, model.processor, card, quantizers)
    plot_curve(log, folder / "curve.png", stage)
    final_loss = float(np.mean([row["loss"] for row in log[-20:]]))
    return {"validation": validation, "final_loss": final_loss, "training_s": round(seconds, 1), **facts}


def _validation_of_start(run: Run, start: str, kind: type) -> float | None:
    if not run.preset.data.validation_rows:
        return None
    return run.metrics(start)["validation"]["after"] if start != "raw" else _validate(run, run.model("raw", kind))


def _validate(run: Run, model: Embedder | Reranker) -> float | None:
    """Mean over the columns on a few validation rows; of a reranker the mean of `first_of_candidates`."""
    rows = run.preset.data.validation_rows
    if not rows:
        return None
    data = run.preset.data
    quadruples = thinned(tasks.benchmark("validation", rows, data.test_seed), data.test_documents)
    if isinstance(model, Reranker):
        retrieval = {tasks.TASKS[name].column for name in run.preset.stages["reranker"].tasks if name in tasks.TASKS}
        chosen = [q for q in quadruples if q.task in retrieval] or quadruples
        return float(np.mean([first_of_candidates(model, q, data.batch_size) for q in chosen]))
    return evaluate.mean_score(evaluate.evaluate_embedder(model, quadruples, run.preset.data.batch_size))


def thinned(quadruples: Sequence[Quadruple], documents: int) -> list[Quadruple]:
    """Each on a corpus of what its labels and candidates name, others up to `documents`; 0 leaves all."""
    return [q.thin(documents) if documents else q for q in quadruples]


def first_of_candidates(reranker: Reranker, quadruple: Quadruple, batch_size: int, k: int = 8) -> float:
    """Share of queries whose positive has the largest margin of k documents, some of them labelled negatives."""
    return evaluate.judge_quadruple(reranker, quadruple.with_candidates(k), batch_size=batch_size).score


RECIPES = {
    "bootstrap": partial(train_contrastive, stage="bootstrap"),
    "s0": partial(train_contrastive, stage="s0"),
    "s1": partial(train_contrastive, stage="s1"),
    "reranker": train_reranker,
    "s2": distil,
    "s3": merge_models,
}


def run_stage(run: Run, stage: str) -> dict[str, Any]:
    """Run one stage unless it is finished; returns its metrics with the wall time of all it did.

    metrics.json is written last, in one move: a stage killed before goes on from its checkpoint.

    Raises:
        ValueError: there is no such stage. BlockingIOError: another process is at work in the folder.
        OSError: it cannot be written. FloatingPointError: see train.fit.
    """
    if stage not in RECIPES:
        raise ValueError(f"no stage {stage!r}; the stages are {list(RECIPES)}")
    if stage != "s3" and stage not in run.preset.stages:
        raise ValueError(f"the preset {run.preset.name!r} has no [stages.{stage}]; it has {list(run.preset.stages)}")
    with run.at_work():
        if not run.finished(stage):
            if run.is_main:
                for left_over in run.folder.glob(f"{VECTORS}*"):  # of a run that was killed while it mined
                    shutil.rmtree(left_over, ignore_errors=True)
            give_back_freed()
            began = time.monotonic()
            metrics = RECIPES[stage](run)
            if run.is_main:
                metrics |= {"wall_s": round(time.monotonic() - began, 1), "peak_rss_mb": peak_memory_mb()}
                write_json(run.folder / stage / "metrics.json", metrics)
            run.accelerator.wait_for_everyone()
        if run.is_main:
            discard(run.folder / stage / "state")
        return run.metrics(stage)
