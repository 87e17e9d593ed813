"""From a table of pairs to a retriever that is shown to beat its base, or is not shipped.

The path: survey and split the data; measure the base on the held-out queries and on MMEB-mini; mine with the base;
train, and stop when the validation split no longer gains; position the result between base and fine-tuned; measure
again, and say what to ship. Everything is in one folder, and a run that is cut short goes on there when it is started
again: mining and training are not done twice.

The base may be a full model or an adapter. An adapter is trained on, as s1 goes on from s0; of a full model a fresh
adapter is trained. Either way the difference V of the two is a task vector, the merged model is base + lambda V, and
it is saved as one adapter of the same backbone.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrize

from . import backbone, combine, evaluate, merge
from .checkpoint import claim, load_checkpoint, save_checkpoint
from .compression import Quantizers
from .config import Preset, StageConfig, load_config, override
from .data import Teacher
from .disk import discard, write_whole
from .embedder import Embedder
from .emoji_world import tasks
from .records import Quadruple
from .report import git_revision, plot_curve, write_json
from .reranker import Reranker
from .splits import SHARES
from .stages import Run, batch_stream, first_of_candidates, mined_labels, teacher_logits, thinned, with_labels
from .survey import survey
from .train import LossOnBatch, distillation_step, embed_again, embedding_loss, fit, reranker_step
from .verdict import ALONE, BASE, FORGET, judge, verdict_page, word

DEFAULTS = Path(__file__).with_suffix(".toml")
AUTO = "auto"
TINY, RELEASED = "q3vl-tiny", "Qwen3-VL-Embedding-"  # backbones that a reranker is published for
QAT = {"int8": 0.1, "binary": 0.1}  # weights of the quantised losses, where they are asked for
TRIED = 4  # steps by which the time of a step is measured
LEAST = 8  # steps, however short the time
RERANKER_EPOCHS = 0.5  # of the embedder's: it reads a query again with each document
NEIGHBOURS = 30_000_000  # of all queries together, as mining keeps them: 360 MB
SHARES_OF_LAMBDA = (1.0, 0.75, 0.5, 0.25)  # tried in this order
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """What may be spent: seconds for the whole path, or steps for each training. None: what the epochs take."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Budget":
        """ "10m", "90s" or "2h" of time, or "1000steps"."""
        if text is None:
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|steps?)", text.strip())
        if match is None or float(match[1]) <= 0:
            raise ValueError(f"budget {text!r}; write a time (90s, 10m, 2h) or a number of steps (1000steps)")
        if match[2].startswith("step"):
            return cls(steps=max(1, int(float(match[1]))))
        return cls(seconds=float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Finetuned:
    """What finetune() found: `verdict` of verdict.judge; `ship`, the model that it recommends, a path or a name.

    folder: all that was written. splits: the data as it was split, by side.
    """

    folder: Path
    verdict: dict[str, Any]
    ship: str
    splits: dict[str, Quadruple]

    def __str__(self) -> str:
        return verdict_page(self.verdict)


@dataclass(frozen=True)
class Job:
    """What the steps of the path share.

    trainings: how many there will be. started: when the path began, of time.monotonic. measuring: seconds that it
    takes to measure a model. forget: see finetune.
    """

    run: Run
    train: Quadruple
    validation: Quadruple
    budget: Budget
    epochs: float
    looks: int
    patience: int
    trainings: int
    started: float
    measuring: float
    forget: float


def finetune(
    data: Any,
    model: str | Path,
    folder: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    root: str | Path | None = None,
    may_skip: float = 0.1,
    instruction: str | None = None,
    shares: Mapping[str, float] = SHARES,
    reranker: str | Path | None = AUTO,
    distil: bool = False,
    qat: bool = False,
    budget: str | None = None,
    epochs: float = 8,
    looks: int = 8,
    patience: int = 3,
    forget: float = FORGET,
    changes: Sequence[str] = (),
    progress: bool = True,
) -> Finetuned:
    """Fine-tune an embedder on a person's pairs, and say whether the result is better than the base.

    Args:
        data, columns, kinds, root: the pairs; see pairs.read_pairs. may_skip, instruction, shares: see survey.survey.
        model: the base, an embedder or a raw Qwen3-VL: a folder, a shipped name or a Hub id.
        folder: for all results.
        reranker: "auto" also trains the reranker that goes with the base (`reranker_beside`) if rows bring negatives of
            their own. A folder, a shipped name or a Hub id trains that one, also where only mining found negatives;
            None trains none.
        distil: let the trained reranker teach the embedder (equation 3).
        qat: also train for int8 and binary codes, with learned steps.
        budget: "10m", "2h": of the whole path; a few steps are measured, and the number of steps is set to fit.
            "1000steps": of each training. None: `epochs`.
        epochs: how often the embedder's training sees each query, at most; the reranker's half as often.
        looks: how often the validation split is measured meanwhile; `patience` looks without a gain end the training,
            and the best look is kept.
        forget: how much of its mean on MMEB-mini a model may lose and still be recommended, relative.
        changes: of finetune.toml, such as "stages.embedder.lr=5e-4".

    Raises:
        ValueError, FileNotFoundError: the data or the arguments cannot be used; says what to do.
        BlockingIOError: another process is at work in the folder. OSError: it cannot be written.
    """
    started = time.monotonic()
    if distil and reranker is None:
        raise ValueError("distil needs a teacher; name a reranker to train")
    spend = Budget.parse(budget)
    folder = Path(folder)
    run = Run(finetune_preset(model, qat, changes), folder, progress, tracker="none")
    if run.accelerator.num_processes > 1:
        raise ValueError(f"finetune runs in one process, not in {run.accelerator.num_processes}; start it plainly")
    with run.at_work():
        say = print if progress else lambda *_: None
        base = run.model("raw")
        found = survey(
            data,
            columns=columns,
            kinds=kinds,
            media=folder / "media",
            root=root,
            may_skip=may_skip,
            instruction=instruction,
            budget=run.budget,
            tokenizer=base.processor.tokenizer,
            max_length=run.preset.data.max_length,
            shares=shares,
            seed=run.preset.seed,
            progress=progress,
        )
        asked = {"reranker": None if reranker is None else str(reranker), "distil": distil, "budget": budget}
        asked |= {"epochs": epochs, "looks": looks, "patience": patience, "data": found.counts["digest"]}
        asked |= {"instruction": instruction, "forget": forget, "shares": dict(shares)}
        claim(folder / "arguments.json", asked, "a run")
        found.save(folder)
        say(found)
        if reranker == AUTO:
            brings_negatives = found.counts["rows_with_negatives"] and found.counts["task"] != "sts"
            reranker = reranker_beside(base) if brings_negatives else None
            if distil and reranker is None:
                raise ValueError("distil needs a teacher, and no rows bring negatives for one; name a reranker")
            if brings_negatives and reranker is None:
                say("no reranker is trained: none that goes with the base is to be had; name one")
        elif reranker is not None:
            backbone.resolve(reranker)  # that it is there, before anything is trained
        test, sizes, benchmark = found.splits["test"], run.preset.data, mmeb_mini(run.preset, "test")
        own, general = {}, {}

        def measure(name: str, embedder: Embedder) -> None:
            size = sizes.batch_size
            own[name] = evaluate.evaluate_embedder(embedder, [test], size, progress)
            general[name] = evaluate.evaluate_embedder(embedder, benchmark, size, progress)

        began = time.monotonic()
        measure(BASE, base)
        measuring = time.monotonic() - began
        train = mine(run, base, found.splits["train"])
        report = train.meta.get("mining", "graded pairs are not mined")
        say(f"mined: {report}; what was dropped is in {folder}/mined.json")
        trainings = 1 + (reranker is not None) + distil
        validation = found.splits["validation"]
        job = Job(run, train, validation, spend, epochs, looks, patience, trainings, started, measuring, forget)
        del base
        train_embedder(job)
        tuned = "embedder"
        has_negatives = any(labels.negatives for labels in train.relevance)
        if reranker is not None and has_negatives:
            train_reranker(job, reranker)
            if distil:
                distil_embedder(job)
                tuned = "distilled"
        elif reranker is not None:
            say("no reranker is trained: the data has no negatives, and mining found none")
        position(job, tuned)
        places = {"merged": folder / "merged" / "model", "fine-tuned": folder / tuned / "model"}
        for name, place in places.items():
            measure(name, run.load(place))
        verdict = judge(own, general, forget)
        ship = str(places.get(verdict["ship"], model))
        if reranker is not None and has_negatives:
            verdict["reranker"] = judge_reranker(run, reranker, run.load(ship), own[verdict["ship"]], test)
        verdict |= {"model": str(model), "path": ship, "seconds": round(time.monotonic() - started, 1)}
        write_json(folder / "verdict.json", verdict, indent=1)
        write_whole(folder / "verdict.md", verdict_page(verdict))
        for name, place in places.items():
            backbone.add_to_card(place, {"verdict": _for_card(verdict, name)})
        say(verdict_page(verdict))
        return Finetuned(folder, verdict, ship, found.splits)


def finetune_preset(model: str | Path, qat: bool = False, changes: Sequence[str] = ()) -> Preset:
    """finetune.toml for a base, with single values changed."""
    preset = replace(load_config(DEFAULTS), backbone=str(model), quantizers=QAT if qat else {})
    preset = override(preset, changes) if changes else preset
    preset.require_adapters("finetune, which positions the result between base and tuned,")
    return preset


def reranker_beside(base: Embedder) -> str | None:
    """The reranker to start from: the released or shipped one of the base's backbone, else the backbone itself.

    None if that is a full embedder, or has no head for words, or the released one cannot be had.
    """
    model = backbone.inner(base.model)
    name = model.name_or_path
    if name == TINY:
        return "reranker"
    if RELEASED in name:
        name = name.replace(RELEASED, "Qwen3-VL-Reranker-")
        try:
            backbone.resolve(name)
        except FileNotFoundError:
            return None
        return name
    is_adapter = isinstance(base.model, PeftModel)
    return name if model.has_head and (is_adapter or base.backbone.card.get("role") != "embedder") else None


def mmeb_mini(preset: Preset, split: str) -> list[Quadruple]:
    """MMEB-mini as small as the preset's data section says, on one of its splits."""
    sizes = preset.data
    return thinned(tasks.benchmark(split, sizes.test_rows, sizes.test_seed), sizes.test_documents)


def mine(run: Run, base: Embedder, train: Quadruple) -> Quadruple:
    """The training data with positives refined and negatives mined by the base (3.3); mined.json says what was dropped.

    K = 0 is as many as memory allows (NEIGHBOURS). Graded pairs are left as they are.
    """
    config, file = run.preset.stages["embedder"].mining, run.folder / "mined.json"
    if config is None or train.task == "sts":
        return train
    if not file.is_file():
        vectors, size = run.folder / "vectors", run.preset.data.batch_size
        [(_, queries, corpus)] = evaluate.encoded(
            base, [train], batch_size=size, progress=run.progress, folder=vectors
        )
        k = config.k or max(1, NEIGHBOURS // len(train))
        labels = mined_labels(train, queries, corpus, replace(config, k=k))
        kept = {row for row, _, _ in labels["rows"]}
        dropped = [{"query": i, "shows": str(train.queries[i])[:200]} for i in range(len(train)) if i not in kept]
        write_json(file, labels | {"dropped": dropped}, ensure_ascii=False)
        del queries, corpus  # Windows does not delete a file that is mapped
        discard(vectors)
    return with_labels(train, json.loads(file.read_text(encoding="utf-8")))


# --- training with a look at the validation split -----------------------------------------------------------


def train_embedder(job: Job) -> None:
    """folder/embedder: the base trained on the mined pairs, with the loss of stage 2 at every prefix."""
    run, config = job.run, job.run.preset.stages["embedder"]
    if run.finished("embedder"):
        return
    model = run.model("raw", trainable=True)
    options, quantizers = run.objective(model)

    def loss(encode, batch):
        return embedding_loss(encode, batch, config, **options)

    _train(job, "embedder", model, loss, job.train, _retrieval(job), quantizers)


def train_reranker(job: Job, reranker: str | Path) -> None:
    """folder/reranker: a reranker trained on the same pairs with their negatives, and some drawn at random."""
    if not job.run.finished("reranker"):
        model = job.run.load(reranker, Reranker, trainable=True)
        size, shorter = job.run.preset.data.batch_size, replace(job, epochs=job.epochs * RERANKER_EPOCHS)

        def score(m: Reranker) -> float:
            return first_of_candidates(m, job.validation, size, k=4)  # a look is short then

        _train(shorter, "reranker", model, reranker_step, job.train, score)


def distil_embedder(job: Job) -> None:
    """folder/distilled: the trained embedder taught by the trained reranker's logits (equation 3)."""
    run, config = job.run, job.run.preset.stages["distilled"]
    if run.finished("distilled"):
        return
    asked = job.train.select([i for i, labels in enumerate(job.train.relevance) if labels.negatives])
    teacher = teacher_logits(
        run.model("reranker", Reranker), [asked], config.n_negatives, run.preset.data.batch_size
    )
    model = run.model("embedder", trainable=True)
    options, quantizers = run.objective(model)

    def loss(encode, batch):
        return distillation_step(encode, batch, config, **options)

    _train(job, "distilled", model, loss, asked, _retrieval(job), quantizers, teacher)


def _retrieval(job: Job) -> Callable[[Embedder], float]:
    """Scores an embedder on the validation split: MRR@10, which moves with every rank, or Spearman."""
    metric = "spearman" if job.validation.task == "sts" else "mrr@10"

    def score(model: Embedder) -> float:
        size = job.run.preset.data.batch_size
        [(_, queries, corpus)] = evaluate.encoded(model, [job.validation], batch_size=size)
        return evaluate.score_quadruple(queries, corpus, job.validation, metric=metric).score

    return score


def _train(
    job: Job,
    name: str,
    model: Embedder | Reranker,
    loss: LossOnBatch,
    quadruple: Quadruple,
    score: Callable[[Any], float],
    quantizers: Quantizers | None = None,
    teacher: Mapping[str, Teacher] | None = None,
) -> None:
    """Train until the steps are used up or `patience` looks brought no gain; keep the best look; save like a stage."""
    run, folder, began = job.run, job.run.folder / name, time.monotonic()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    file = folder / "checks.json"
    if file.is_file():
        checks = json.loads(file.read_text())
    else:
        checks = [{"step": 0, "score": score(model)}]
    looking = time.monotonic() - began
    config, plan = run.preset.stages[name], folder / "plan.json"

    def train_on(config: StageConfig, folder: Path, **options: Any) -> list[dict[str, Any]]:
        stream = batch_stream([quadruple], config, config.steps * config.accumulate, run.preset.seed, teacher)
        shared = {"quantizers": quantizers, "accelerator": run.accelerator}
        return fit(model, loss, stream, config, folder, **shared, **options)

    if not plan.is_file():
        before = _state(weights, quantizers)

        def seconds_a_step() -> float:
            with tempfile.TemporaryDirectory() as scratch:
                log = train_on(replace(config, steps=TRIED), Path(scratch), progress=False)
            _restore(before, weights, quantizers)
            return max((log[-1]["seconds"] - log[0]["seconds"]) / (TRIED - 1), 1e-3)

        write_json(plan, _planned(job, config, len(quadruple), looking, seconds_a_step))
    config = replace(config, steps=json.loads(plan.read_text())["steps"])
    every = math.ceil(config.steps / job.looks)
    while checks[-1]["step"] < config.steps and not _stalled(checks, job.patience):
        stop = min(checks[-1]["step"] + every, config.steps)
        train_on(config, folder, stop_after=stop, progress=run.progress)
        checks.append({"step": stop, "score": score(model)})
        if _best(checks) is checks[-1]:
            save_checkpoint(folder / "best", _state(weights, quantizers), [], {"step": stop})
        write_json(file, checks)
    _restore(load_checkpoint(folder / "best", [])[0], weights, quantizers)
    _save(run, name, model, quantizers)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    plot_curve(log, folder / "curve.png", name)
    facts = {"checks": checks, "best": _best(checks), "training_s": round(time.monotonic() - began, 1)}
    write_json(folder / "metrics.json", facts | {"plan": json.loads(plan.read_text())})
    for left_over in ("state", "best"):
        discard(folder / left_over)


def _planned(
    job: Job, config: StageConfig, queries: int, looking: float, seconds_a_step: Callable[[], float]
) -> dict[str, Any]:
    """How many steps to train, and why: what the epochs take, or what fits into the budget."""
    wanted = max(1, math.ceil(job.epochs * queries / (config.batch_size * config.accumulate)))
    if job.budget.steps is not None:
        return {"steps": job.budget.steps, "why": "the budget"}
    if job.budget.seconds is None:
        return {"steps": wanted, "why": f"{job.epochs:g} epochs of {queries} queries"}
    each = seconds_a_step()
    done = sum(job.run.finished(name) for name in ("embedder", "reranker", "distilled"))
    # both results are measured, MMEB-mini for `within_limit`, and what the rerankers score; and the position is found
    measured = 2 + 1 + len(SHARES_OF_LAMBDA) + 2 * (job.trainings > 1)
    rest = measured * job.measuring + job.run.preset.merge.steps * each
    left = job.budget.seconds - (time.monotonic() - job.started) - rest
    fits = int((left / (job.trainings - done) - job.looks * looking) / each)
    steps = min(wanted, max(fits, LEAST))
    why = "the epochs, which fit into the budget" if fits >= wanted else "what fits into the budget"
    why = f"the least there is: the budget is used up, {fits} steps would fit" if fits < LEAST else why
    return {"steps": steps, "why": why, "seconds_a_step": each, "seconds_a_look": looking, "seconds_reserved": rest}


def _best(checks: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The look with the highest score, the first of equals; the base itself, at step 0, is not among them."""
    return max(checks[1:], key=lambda check: check["score"])


def _stalled(checks: Sequence[Mapping[str, float]], patience: int) -> bool:
    return len(checks) > 1 and len(checks) - 1 - checks.index(_best(checks)) >= patience


def _state(weights: Mapping[str, torch.Tensor], quantizers: Quantizers | None) -> dict[str, dict[str, torch.Tensor]]:
    modules = {"model": weights} | ({} if quantizers is None else {"quantizers": quantizers.state_dict()})
    return {name: {n: x.detach().clone() for n, x in state.items()} for name, state in modules.items()}


def _restore(state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], quantizers: Quantizers | None) -> None:
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["model"][name])
    if quantizers is not None:
        quantizers.load_state_dict(state["quantizers"])


def _save(run: Run, name: str, model: Embedder | Reranker, quantizers: Quantizers | None, **facts: Any) -> None:
    card = {"role": model.role, "template": model.template, "preset": run.preset.name, "stage": name}
    card |= {"fine_tuned_from": run.preset.backbone, "fps": run.preset.data.fps, "seed": run.preset.seed}
    card |= {"git": git_revision()} | facts
    steps = quantizers if quantizers is not None else model.backbone.quantizers
    backbone.save(run.folder / name / "model", model.model, model.processor, card, steps)


# --- between base and fine-tuned ----------------------------------------------------------------------------


def position(job: Job, tuned: str) -> None:
    """folder/merged: base + lambda (tuned - base), lambda in [0, 1] found by Self Positioning, or less.

    The probe is half the person's validation split, half MMEB-mini's: each step adds the loss of a batch of both. What
    the sum weighs up need not be what may be forgotten, so `within_limit` has the last word.
    """
    run, preset = job.run, job.run.preset
    if run.finished("merged"):
        return
    model = run.model(tuned)
    after, quantizers = combine.factors_of(model.model), model.backbone.quantizers
    del model  # a large one need not be there twice
    base = run.model("raw")
    config = replace(preset.stages["embedder"], batch_size=preset.stages["embedder"].batch_size // 2 or 1)
    options = run.objective(base)[0] | {"quantizers": None, "quantizer_weights": None}
    general = tasks.benchmark("validation", preset.merge.probe, preset.data.test_seed)
    probes = [[job.validation.select(range(min(preset.merge.probe, len(job.validation))))], general]
    streams = [batch_stream(probe, config, preset.merge.steps, preset.seed)(0) for probe in probes]
    place = Between(base, after)
    encode = embed_again(base, config.chunk_tokens)

    def loss_at(delta: merge.Vector) -> torch.Tensor:
        place.lam = delta["lambda"]
        return sum(embedding_loss(encode, next(stream), config, **options) for stream in streams)

    line = {"lambda": torch.ones(1)}  # the change, in units of itself
    found = merge.self_position(loss_at, [line], mu=preset.merge.mu, steps=preset.merge.steps, lr=preset.merge.lr)
    def general_ability(lam: float) -> float:
        place.lam = torch.tensor([lam])
        return evaluate.mean_score(evaluate.evaluate_embedder(base, remembered, preset.data.batch_size))

    remembered = mmeb_mini(preset, "validation")
    lam, looks = within_limit(general_ability, float(np.clip(found.lam, 0, 1)), job.forget)
    place.settle(lam)
    _save(run, "merged", base, quantizers, **{"lambda": lam})
    facts = {"lambda": lam, "lambda_unclipped": found.lam, "history": found.history, "looks": looks}
    write_json(run.folder / "merged" / "metrics.json", facts)


def within_limit(score: Callable[[float], float], lam: float, forget: float) -> tuple[float, list[dict[str, float]]]:
    """The largest share of lambda at which at most half of what may be forgotten is; else the smallest that is tried.

    Half, because the verdict asks other queries than these. score(lambda): of general ability, the base's at 0.

    Returns:
        lambda, and every look: {"lambda", "score"}.
    """
    looks = [{"lambda": 0.0, "score": score(0.0)}]
    for share in SHARES_OF_LAMBDA:
        looks.append({"lambda": share * lam, "score": score(share * lam)})
        if looks[-1]["score"] >= (1 - forget / 2) * looks[0]["score"]:
            break
    return looks[-1]["lambda"], looks


class Between(nn.Module):
    """A base that stands at `lam` between its own adapter and another, in place: their factors lie side by side.

    With A0 and A1 one below the other and [(1 - lam) B0, lam B1] beside each other, B A is (1 - lam) B0 A0 + lam B1 A1,
    and no matrix of a layer's size is made. A base without an adapter has B1 and A1 alone. Gradients flow into `lam`.
    """

    def __init__(self, base: Embedder, after: Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        adapters = [after]
        if isinstance(base.model, PeftModel):
            adapters.insert(0, combine.factors_of(base.model))
            base.model = base.model.unload()
        base.model = combine.side_by_side(base.model, adapters).requires_grad_(False)
        base.backbone.model = base.model
        self.lam, self.ranks = torch.ones(1), [len(next(iter(factors.values()))[0]) for factors in adapters]
        self.layers = [layer for name, layer in base.model.named_modules() if name.endswith("lora_B.default")]
        for layer in self.layers:
            parametrize.register_parametrization(layer, "weight", self)

    def forward(self, b: torch.Tensor) -> torch.Tensor:
        weights = [1 - self.lam, self.lam][-len(self.ranks) :]
        return b * torch.cat([w.to(b).expand(rank) for w, rank in zip(weights, self.ranks, strict=True)])

    def settle(self, lam: float) -> None:
        """Stay at `lam`: the adapter is then a plain one."""
        self.lam = torch.tensor([lam])
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight")


# --- verdicts -----------------------------------------------------------------------------------------------


def judge_reranker(
    run: Run, reranker: str | Path, embedder: Embedder, alone: Mapping[str, evaluate.ColumnResult], test: Quadruple
) -> dict[str, Any]:
    """What a reranker makes of an embedder's first candidates for the held-out queries: the trained one, and its base.

    alone: the embedder's own results. "ship" is the trained one if it is better than both others, its base if that is
    the better reranker and better than the embedder alone, else None: rank by the embedder alone.
    """
    top_k, size = run.preset.data.rerank_top_k, run.preset.data.batch_size
    results = {ALONE: alone}
    for name, model in ((BASE, run.load(reranker, Reranker)), ("trained", run.model("reranker", Reranker))):
        results[name] = evaluate.evaluate_reranker(model, embedder, [test], top_k=top_k, batch_size=size)

    def against(name: str, other: str) -> dict[str, Any]:
        difference = evaluate.compare(results[name], results[other])[test.task]
        return difference._asdict() | {"word": word(difference)}

    differences = {other: against("trained", other) for other in (BASE, ALONE)}
    better = "trained" if differences[BASE]["word"] == "better" else BASE
    place = {"trained": str(run.folder / "reranker" / "model"), BASE: str(reranker)}[better]
    ship = place if against(better, ALONE)["word"] == "better" else None
    scores = {name: columns[test.task].score for name, columns in results.items()}
    return {"base": str(reranker), "top_k": top_k, "scores": scores, "differences": differences, "ship": ship}


def _for_card(verdict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The lines of the verdict that a model's card shows."""
    own, lost = verdict["own"]["differences"][name], verdict["general"]["forgotten"][name]
    return {
        "on the held-out queries": own["word"],
        "difference": own["difference"],
        "interval": f"{own['low']:.4f} to {own['high']:.4f}",
        "relative loss on MMEB-mini": lost["relative_loss"],
        "recommended": verdict["ship"] == name,
    }
