"""Saved models of one base merged into a new one, and the scores on the way from one to another.

merge.py has the arithmetic of task vectors; here they come from checkpoints and go back into one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from . import backbone, evaluate, merge
from .choices import MERGE_METHODS
from .compression import Quantizers
from .embedder import Embedder
from .records import Quadruple


def vector_of(model: PeftModel) -> merge.Vector:
    """The task vector of a model's LoRA adapter, {module: scaling * B @ A}, with the scaling that its config states.

    Raises:
        ValueError: ranks or scalings by module, or anything but LoRA's pairs of A and B.
    """
    return merge.task_vector(get_peft_model_state_dict(model), _scaling(model))


def factors_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The same, not multiplied out: {module: (A (r, in), scaling * B (out, r))}, float32.

    Raises:
        ValueError: ranks or scalings by module.
    """
    scaling, state = _scaling(model), get_peft_model_state_dict(model)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    pairs = {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}
    return {
        name.removeprefix(merge.PEFT_PREFIX): (a.detach().float(), scaling * b.detach().float())
        for name, (a, b) in pairs.items()
    }


def _scaling(model: PeftModel) -> float:
    config = model.peft_config["default"]
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("the adapter has ranks or alphas by module; one scaling is expected: save it with one rank")
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def side_by_side(base: nn.Module, adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> PeftModel:
    """The base with the sum of several adapters (factors_of) as one, of the sum of their ranks, in place.

    [B0, B1] [A0; A1] = B0 A0 + B1 A1, so nothing is multiplied out or rounded.
    """
    state = {}
    for name in adapters[0]:
        pairs = [adapter[name] for adapter in adapters]
        state[f"{merge.PEFT_PREFIX}{name}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        state[f"{merge.PEFT_PREFIX}{name}.lora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
    rank = sum(next(iter(adapter.values()))[0].shape[0] for adapter in adapters)
    model = backbone.add_lora(base, rank, rank)
    set_peft_model_state_dict(model, state)
    return model


def add_delta(base: nn.Module, delta: Mapping[str, Any], rank: int | None) -> tuple[PeftModel, merge.LowRank]:
    """The base with `delta` as its LoRA adapter of a stated rank (None: the lowest that is exact), in place."""
    adapter = merge.to_adapter(delta, rank)
    model = backbone.add_lora(base, adapter.rank, adapter.rank)
    set_peft_model_state_dict(model, adapter.state)
    return model, adapter


def mean_quantizers(quantizers: Sequence[Quantizers | None]) -> Quantizers | None:
    """Learned steps that are the means of several models'; None if one has none."""
    if None in quantizers:
        return None
    mean, states = Quantizers([int(d) for d in quantizers[0]["int8"]]), [q.state_dict() for q in quantizers]
    first = states[0].items()
    average = {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v for k, v in first}
    mean.load_state_dict(average)
    return mean.eval()


def merge_checkpoints(
    paths: Sequence[str | Path],
    folder: str | Path,
    method: str = "slerp",
    weights: Sequence[float] | None = None,
    *,
    density: float = 0.5,
    scale: float = 1.0,
    rank: int | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """Merge LoRA checkpoints of one base and role into a new checkpoint: an adapter again, or full weights.

    The deltas B @ A are merged, never A and B apart. The learned steps of the quantisers are the means.

    Args:
        paths: folders, shipped names or Hub ids.
        method: "linear" (merge.linear), "slerp" (merge.iterated_slerp) or "ties" (merge.ties).
        weights: one for each model; None weighs all alike. linear does not normalise them.
        density: of TIES. scale: the merged task vector is multiplied by it (the lambda of Self Positioning).
        rank: of the merged adapter; None is the lowest that is exact, which for TIES is high.
        full: write full weights instead; they are W0 + delta, rounded once.

    Returns:
        What the card records under "merge": method, models, weights, scale, and rank and relative error of an adapter.

    Raises:
        ValueError: an unknown method, or models of different base, role or template.
    """
    if method not in MERGE_METHODS:
        raise ValueError(f"no method {method!r}; choose one of {list(MERGE_METHODS)}")
    vectors, kinds, quantizers, rates = [], [], [], []
    for path in paths:
        loaded = backbone.load(path, device="cpu")
        if not isinstance(loaded.model, PeftModel):
            raise ValueError(f"{path} has full weights; expected a LoRA adapter (full weights: merge.full_task_vector)")
        base = loaded.model.peft_config["default"].base_model_name_or_path
        kinds.append((base, loaded.card.get("role", "embedder"), loaded.card["template"]))
        vectors.append(vector_of(loaded.model))
        quantizers.append(loaded.quantizers)
        rates.append(loaded.card.get("fps"))
    if len(set(kinds)) != 1:
        raise ValueError(f"{list(map(str, paths))} are of (base, role, template) {kinds}; merge models of one kind")
    numbers = [1.0] * len(vectors) if weights is None else list(weights)
    delta = {
        "linear": lambda: merge.linear(vectors, weights),
        "slerp": lambda: merge.iterated_slerp(vectors, numbers),
        "ties": lambda: merge.ties(vectors, density, numbers),
    }[method]()
    delta = merge.linear([delta], [scale])
    facts: dict[str, Any] = {"method": method, "models": [Path(path).name for path in paths], "weights": weights}
    facts |= {"scale": scale} | ({"density": density} if method == "ties" else {})
    model = loaded.model.unload()
    if full:
        model.load_state_dict(merge.to_full(model.state_dict(), delta))
    else:
        model, adapter = add_delta(model, delta, rank)
        facts |= {"rank": adapter.rank, "error": adapter.error}
    _, role, template = kinds[0]
    card = {"role": role, "template": template, "merge": facts}
    card |= {"fps": rates[0]} if rates[0] and len(set(rates)) == 1 else {}
    backbone.save(folder, model, loaded.processor, card, mean_quantizers(quantizers))
    return facts


def scores_at(
    embedder: Embedder, delta: merge.Vector, quadruples: Sequence[Quadruple], batch_size: int = 32
) -> dict[str, float]:
    """{column: score, ..., "mean"} of the model that `delta` makes of `embedder`, whose weights are not touched.

    embedder: around the base, without an adapter.
    """
    with merge.apply_delta(embedder.model, delta):
        columns = evaluate.evaluate_embedder(embedder, quadruples, batch_size)
    return {name: column.score for name, column in columns.items()} | {"mean": evaluate.mean_score(columns)}


def path_scores(
    embedder: Embedder,
    one: merge.Vector,
    other: merge.Vector,
    quadruples: Sequence[Quadruple],
    ts: Iterable[float],
    batch_size: int = 32,
) -> list[dict[str, float]]:
    """[{"t", column: score, ..., "mean"}, ...] on the SLERP path from one task vector (t = 0) to another (t = 1).

    Each point is a model of its own, and everything is embedded anew; see `scores_at`. report.plot_path draws it.
    """
    points = merge.path(one, other, ts)
    return [{"t": float(t), **scores_at(embedder, delta, quadruples, batch_size)} for t, delta in points]
