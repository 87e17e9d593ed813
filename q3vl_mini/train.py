"""One training loop in full view, and the three objectives that it minimises.

An objective is a function `loss_on_batch(encode, batch)`. `encode(rows, instruction)` collates rows and runs the model
with gradient: instances to unit vectors (an Embedder), pairs to margins (a Reranker). So an objective does not know
how many rows fit into memory: `gradient_cache` hands it an `encode` that works in parts.

Several processes (`accelerate launch`): every process draws the same batch and embeds its share of the rows. The
losses see the whole batch (`gather`); gradients are averaged over the processes. A process holds the whole model.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from .checkpoint import load_checkpoint, save_checkpoint
from .compression import Quantizers, compressed_objective
from .config import TERMS, StageConfig
from .data import Batch, save_batch
from .forward import split_rows
from .losses import (
    classification_loss,
    cosent_loss,
    distillation_loss,
    info_nce,
    info_nce_masks,
    info_nce_scores,
    yes_no_loss,
)
from .memory import LITTLE_MB, give_back_freed
from .prefix_info_nce import prefix_info_nce
from .sharding import shard_frozen
from .zero import ZeroOptimizer

Encode = Callable[[Sequence[Any], str | None], Tensor]
LossOnBatch = Callable[[Encode, Batch], Tensor]

EXPLODED = 1_000  # times the first step's loss, or 1 if that is less

# Every other task has InfoNCE (report, section 5).
LOSS_OF_TASK = {
    "image_cls": classification_loss,
    "video_cls": classification_loss,
    "text_cls": classification_loss,
    "sts": cosent_loss,
}


def loss_of(task: str, stage: StageConfig) -> Callable[..., Tensor]:
    """The loss of a task, or InfoNCE for all where the stage has no loss a task (stage 1)."""
    return LOSS_OF_TASK.get(task, info_nce) if stage.loss_per_task else info_nce


def embedding_loss(
    encode: Encode,
    batch: Batch,
    stage: StageConfig,
    *,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    quantizers: Quantizers | None = None,
    quantizer_weights: dict[str, float] | None = None,
) -> Tensor:
    """Contrastive loss of one batch by its task, at every prefix and precision (stages 1 and 2): a scalar.

    Two forwards: the queries with the instruction, and every document of the batch once with the default one.

    Raises:
        ValueError: graded pairs, of which some are unlike, would be taken as positives by InfoNCE.
    """
    loss = loss_of(batch.task, stage)
    if loss is info_nce and batch.scores is not None:
        raise ValueError(
            f"{batch.name} has graded pairs, and InfoNCE takes each for a positive; leave it out of this stage, or "
            "set loss_per_task"
        )
    queries = encode(batch.queries, batch.instruction)  # (B, D)
    width = stage.n_negatives + stage.n_random if "others_negatives" in stage.terms else None
    documents, negatives, mask, negative_ids = encode_documents(encode, batch, width)
    embeddings: dict[str, Tensor | None] = {"queries": queries, "documents": documents}
    constants: dict[str, Any] = {"temperature": stage.temperature}
    at_prefixes = None
    if loss is cosent_loss:
        embeddings = {name: gather(x) for name, x in embeddings.items()}
        constants["scores"] = gather(torch.tensor(batch.scores, device=queries.device))
    elif loss is classification_loss:
        embeddings["negatives"], constants["negatives_mask"] = negatives, mask
    else:
        ids = torch.tensor(batch.positive_ids, device=queries.device)
        rank, processes = _process()
        others_negatives = "others_negatives" in stage.terms
        embeddings["negatives"] = negatives
        constants |= {"negatives_mask": mask, "document_ids": ids, "negative_ids": negative_ids, "margin": stage.margin}
        constants |= {term: term in stage.terms for term in ("query_document", "query_query", "document_document")}
        constants |= {"others_negatives": others_negatives, "offset": rank * len(queries)}
        if processes > 1:
            embeddings |= {"all_queries": gather(queries), "all_documents": gather(documents)}
            constants["all_document_ids"] = gather(ids)
        if processes > 1 and others_negatives:
            embeddings["all_negatives"] = gather(negatives)
            constants |= {"all_negatives_mask": gather(mask), "all_negative_ids": gather(negative_ids)}
        if stage.masks_of == "whole":
            constants["masks"] = masks_of_whole(embeddings, constants)
        else:
            loss = prefix_info_nce  # the numbers of info_nce at every prefix, faster
            at_prefixes = partial(loss, dims=dims, dim_weights=dim_weights, **constants)
    return compressed_objective(
        partial(loss, **constants), embeddings, dims, dim_weights, quantizers, quantizer_weights, at_prefixes
    )


@torch.no_grad()
def masks_of_whole(embeddings: Mapping[str, Tensor | None], constants: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of equation 1 for embeddings that are not cut or quantised, with the arguments of `info_nce`."""
    scores = info_nce_scores(**embeddings, **{name: on for name, on in constants.items() if name in TERMS})
    return info_nce_masks(scores, **{k: x for k, x in constants.items() if k not in (*TERMS, "temperature")})


def distillation_step(
    encode: Encode,
    batch: Batch,
    stage: StageConfig,
    *,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    quantizers: Quantizers | None = None,
    quantizer_weights: dict[str, float] | None = None,
) -> Tensor:
    """Equation 3 against the batch's precomputed teacher logits, at every prefix and precision (stage 3)."""
    if batch.teacher is None:
        raise ValueError(f"{batch.name} has no teacher logits; precompute them for every sub-dataset of this stage")
    queries = encode(batch.queries, batch.instruction)
    documents, negatives, mask, _ = encode_documents(encode, batch)
    logits = torch.zeros(len(queries), 1 + negatives.shape[1], device=queries.device)
    for row, values in enumerate(batch.teacher):
        logits[row, : len(values)] = torch.tensor(values, device=queries.device)
    loss = partial(
        distillation_loss,
        teacher_logits=logits,
        temperature=stage.temperature,
        teacher_temperature=stage.teacher_temperature,
        mask=torch.cat([mask.new_ones(len(mask), 1), mask], dim=1),
    )
    embeddings = {"queries": queries, "candidates": torch.cat([documents[:, None], negatives], dim=1)}
    return compressed_objective(loss, embeddings, dims, dim_weights, quantizers, quantizer_weights)


def reranker_step(encode: Encode, batch: Batch) -> Tensor:
    """Equation 4: "yes" for every query with its positive, "no" with each of its negatives; mean over all pairs."""
    pairs, labels = [], []
    for query, positive, negatives in zip(batch.queries, batch.positives, batch.negatives, strict=True):
        pairs += [(query, document) for document in (positive, *negatives)]
        labels += [1] + [0] * len(negatives)
    margins = encode(pairs, batch.instruction)  # (pairs,)
    # processes may have unequal numbers of pairs: each counts by its share, so that their mean is the joint mean
    counts = gather(torch.tensor([float(len(pairs))], device=margins.device))
    return yes_no_loss(margins, torch.tensor(labels, device=margins.device)) * len(pairs) / counts.mean()


def encode_documents(encode: Encode, batch: Batch, width: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives (B, D), negatives (B, K, D) padded to the longest list (or `width`), their mask and ids (B, K).

    A document that occurs more than once in the batch (a label, a shared negative) is embedded once.
    """
    rows = dict(zip(batch.positive_ids, batch.positives, strict=True))
    for ids, documents in zip(batch.negative_ids, batch.negatives, strict=True):
        rows |= dict(zip(ids, documents, strict=True))
    vectors = encode(list(rows.values()), None)
    place = {document: i for i, document in enumerate(rows)}
    k = max(map(len, batch.negative_ids), default=0) if width is None else width
    padded = [[*ids, *[-1] * (k - len(ids))] for ids in batch.negative_ids]
    shape, device = (len(padded), k), vectors.device
    negative_ids = torch.tensor(padded, dtype=torch.long, device=device).reshape(shape)
    index = torch.tensor([[place.get(i, 0) for i in ids] for ids in padded], dtype=torch.long, device=device)
    positives = vectors[[place[i] for i in batch.positive_ids]]
    return positives, vectors[index.reshape(shape)], negative_ids >= 0, negative_ids


# --- memory and processes -----------------------------------------------------------------------------------


def gradient_cache(model: nn.Module, max_tokens: int, in_step: bool = False) -> tuple[Encode, Callable[[], None]]:
    """GradCache: an `encode` for batches that do not fit, and `replay`, to be called after the loss's backward.

    The first pass embeds parts of the rows, each of at most `max_tokens`, without a graph. The loss's backward leaves
    on each vector its gradient; `replay` embeds each part again, with a graph, and sends those gradients on into the
    weights. The gradients are those of the whole batch, up to rounding; the price is a second forward. Rows that fit
    at once are embedded once. The model must be deterministic (no dropout). Source: Gao et al. 2021 (arXiv
    2101.06983).

    in_step: every process embeds as often as that with the most parts, as split weights need it (sharding.py): it
    repeats its last part, to no effect.
    """
    pending: list[tuple[Tensor, list[dict[str, Any]], int]] = []

    def cached(rows: Sequence[Any], instruction: str | None) -> Tensor:
        inputs = model.collate(rows, instruction)
        parts = split_rows(inputs, max_tokens, share=not in_step)  # in step, a forward is one call
        if len(parts) == 1 and not in_step:
            return model(inputs)
        own = len(parts)
        if in_step:
            parts += [parts[-1]] * (_most(own, next(model.parameters()).device) - own)
        with torch.no_grad():
            vectors = torch.cat([model(part) for part in parts][:own])
        pending.append((vectors.requires_grad_(), parts, own))
        return vectors

    def replay() -> None:
        for vectors, parts, own in pending:
            if vectors.grad is None and not in_step:
                continue
            gradient = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
            gradients = list(gradient.split([len(part["input_ids"]) for part in parts[:own]]))
            gradients += [torch.zeros_like(gradients[-1])] * (len(parts) - own)
            for part, gradient in zip(parts, gradients, strict=True):
                model(part).backward(gradient)
        pending.clear()

    return cached, replay


def embed_again(model: nn.Module, max_tokens: int, forward: Callable[[Any], Tensor] | None = None) -> Encode:
    """An `encode` that keeps of parts of at most `max_tokens` only their vectors, and embeds each again in backward.

    For gradients with respect to something else than weights, where `gradient_cache` has nothing to replay into; its
    numbers and its price are the same. Rows that fit at once are embedded once. max_tokens 0: all at once.

    Args:
        forward: one part to its vectors, as often as it is called; the model's own if None.
    """
    forward = forward or model

    def encode(rows: Sequence[Any], instruction: str | None) -> Tensor:
        inputs = model.collate(rows, instruction)
        parts = split_rows(inputs, max_tokens) if max_tokens else [inputs]
        if len(parts) == 1:
            return forward(inputs)
        return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts])

    return encode


def _process() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _most(n: int, device: torch.device) -> int:
    """The largest n of all processes."""
    counts = torch.tensor([n], device=device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)  # what every process's loss says about this process's rows
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in rank order, with gradient: (B, ...) to (N, ...). One process: `x` itself."""
    if _process()[1] == 1:
        return x
    return _Gather.apply(x) if x.is_floating_point() else _Gather.apply(x.long()).to(x.dtype)


def share_of(batch: Batch, rank: int, world: int) -> Batch:
    """This process's rows of a batch, as many as every other's; up to world - 1 rows at the end are left out."""
    size = len(batch.queries) // world
    if size == 0:
        raise ValueError(f"{batch.name}: a batch of {len(batch.queries)} queries for {world} processes; enlarge it")
    rows = slice(rank * size, (rank + 1) * size)
    lists = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: value[rows] for name, value in lists.items() if isinstance(value, list)})


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if _process()[1] == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])
    dist.all_reduce(flat)
    parts = (flat / _process()[1]).split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p).to(p.dtype)


# --- the loop -----------------------------------------------------------------------------------------------


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: linear warm-up over a share of the steps, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def fit(
    model: nn.Module,
    loss_on_batch: LossOnBatch,
    batches: Callable[[int], Iterable[Batch]],
    config: StageConfig,
    folder: str | Path,
    *,
    quantizers: Quantizers | None = None,
    accelerator: Accelerator | None = None,
    shard: bool = False,
    zero: Mapping[str, Any] | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train the adapter (and the quantisers' steps) in place; the curve is returned and in folder/log.jsonl.

    AdamW, linear warm-up and cosine. A run cut short goes on from folder/state, to the same weights. With a loss scaler
    (float16) a step whose gradient overflows is left out; its grad_norm in the curve is None.

    Args:
        model: an Embedder or a Reranker whose trainable parameters are the adapter's.
        batches: `batches(k)` gives batch k, k + 1, ... of the training; the same k gives the same batch.
        config: steps, rates, clipping, accumulation, chunk_tokens.
        quantizers: learned steps, with a rate of their own and no weight decay (see LearnedStepQuantizer).
        shard: split the frozen weights among the processes while they train (sharding.py). Alone, one keeps them.
        zero: DeepSpeed's settings, to split moments and averaged gradients among the processes (zero.py).
        stop_after: end after that many steps of the schedule, as an interruption would, with a checkpoint.

    Raises:
        FloatingPointError: the loss or the gradient is not finite, or the loss has exploded (EXPLODED); names the step,
            and the folder where the batch is kept.
        ValueError: nothing is to be trained; zero with float16's loss scaling.
    """
    accelerator = accelerator or Accelerator()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    steps_of = list(quantizers.parameters()) if quantizers is not None else []
    if not named:
        raise ValueError("the model has nothing to train; add_lora() first, or load an adapter with trainable=True")
    groups = [
        {"params": list(named.values()), "lr": config.lr, "weight_decay": config.weight_decay, "peak": config.lr},
        {"params": steps_of, "lr": config.quantizer_lr, "weight_decay": 0.0, "peak": config.quantizer_lr},
    ]
    parameters = [*named.values(), *steps_of]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))
    start, seconds, history = 0, 0.0, []
    resumed = load_checkpoint(folder / "state", [optimizer])
    if resumed:
        modules, meta = resumed
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(modules["model"][name])
        if quantizers is not None:
            quantizers.load_state_dict(modules["quantizers"])
        start, seconds, history = meta["step"], meta["seconds"], meta["history"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(meta["scaler"])
    if _process()[1] > 1:  # all start from the same weights, whatever their random generators did
        for p in parameters:
            dist.broadcast(p.data, src=0)
    zero = zero if _process()[1] > 1 else None
    if zero and accelerator.scaler is not None:
        raise ValueError("a launch with DeepSpeed trains without loss scaling; set dtype=bfloat16")
    optimizer = ZeroOptimizer(optimizer, zero, config.clip) if zero else accelerator.prepare(optimizer)
    shard = shard and _process()[1] > 1
    make_whole = shard_frozen(model) if shard else lambda: None
    model.one_call = shard

    def encode(rows: Sequence[Any], instruction: str | None) -> Tensor:
        return model(model.collate(rows, instruction))

    def keep_state(step: int) -> None:
        moments = optimizer.state_dict()  # split ones come together
        if accelerator.is_main_process:
            state = {"model": dict(named)} | ({} if quantizers is None else {"quantizers": quantizers.state_dict()})
            meta = {"step": step, "seconds": time.monotonic() - began, "history": history}
            meta["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            save_checkpoint(folder / "state", state, [moments], meta, keep_previous=True)
        accelerator.wait_for_everyone()

    in_parts, replay = encode, lambda: None
    if config.chunk_tokens or shard:
        in_parts, replay = gradient_cache(model, config.chunk_tokens or sys.maxsize, in_step=shard)
    give_back_freed()  # what preparing the data took
    model.train()
    if quantizers is not None:
        quantizers.train()
    end, began = min(config.steps, stop_after or config.steps), time.monotonic() - seconds
    stream = iter(batches(start * config.accumulate))
    is_main = accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=start, desc=folder.name, disable=not (progress and is_main))
    with bar, open(folder / "log.jsonl", "w") if is_main else nullcontext() as log:
        for row in history if log else []:  # without the steps after the checkpoint, which come again
            log.write(json.dumps(row) + "\n")
        for step in range(start, end):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, config.steps, config.warmup)
            ceiling = EXPLODED * max(1.0, history[0]["loss"]) if history else sys.float_info.max
            losses, drawn = [], []
            with optimizer.accumulating() if zero else nullcontext():
                for _ in range(config.accumulate):
                    batch = next(stream)
                    drawn.append(batch)
                    loss = loss_on_batch(in_parts, share_of(batch, *_process()))
                    value = accelerator.reduce(loss.detach(), "mean").item()
                    if not value <= ceiling:  # nor is nan
                        rows = f"{batch.task}, documents {batch.positive_ids[:8]}"
                        raise FloatingPointError(
                            f"step {step}: the loss of {batch.name} ({rows}) is {value}; weights are those of the "
                            f"last step. {_kept([batch], folder, step, is_main)} Lower lr, or look at these rows and "
                            "the dtype"
                        )
                    if loss.requires_grad:  # a batch without anything to contrast has none
                        accelerator.backward(loss / config.accumulate)
                    replay()
                    losses.append(value)
            names = [batch.name for batch in drawn]
            if zero:
                norm = optimizer.norm()
            else:
                average_gradients(parameters)
                norm = float(accelerator.clip_grad_norm_(parameters, config.clip))
            scaler = accelerator.scaler
            if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):  # a scaler leaves the step out
                raise FloatingPointError(
                    f"step {step}: the gradient of {names} is {norm}. {_kept(drawn, folder, step, is_main)} Lower lr, "
                    "or compute in bfloat16 or float32"
                )
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            lr, seconds = optimizer.param_groups[0]["lr"], round(time.monotonic() - began, 2)
            row = {"step": done, "loss": sum(losses) / len(losses), "lr": lr}
            row["grad_norm"] = norm if math.isfinite(norm) else None
            row |= {"seconds": seconds, "data": names}
            history.append(row)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}", data=names[-1])
            curves = {key: row[key] for key in ("loss", "lr", "grad_norm") if row[key] is not None}
            accelerator.log({f"{folder.name}/{key}": value for key, value in curves.items()}, step=done)
            if log:
                log.write(json.dumps(row) + "\n")
                if done % config.log_every == 0:
                    log.flush()
            give_back_freed(above_mb=0 if done % 10 == 0 else LITTLE_MB)
            if done % config.checkpoint_every == 0 or done == end:
                keep_state(done)
    make_whole()
    model.one_call = False
    model.eval()
    if quantizers is not None:
        quantizers.eval()
    return history


def _kept(batches: Sequence[Batch], folder: Path, step: int, is_main: bool) -> str:
    """Keep batches that stopped a training for study; a sentence that says where."""
    places = [folder / f"batch-{step}-{i}" for i in range(len(batches))]
    try:
        for batch, place in zip(batches, places, strict=True):
            if is_main:
                save_batch(batch, place)
    except (ValueError, OSError) as error:  # what stopped the training is the news, not this
        return f"The batch could not be kept ({error})."
    return f"The batch is in {', '.join(map(str, places))}: q3vl_mini.data.load_quadruple(folder) reads it."
