"""Merging models of one base: linear, SLERP, TIES, and Self Positioning (s1 and s2 become s3).

A *task vector* V_i = W_i - W0 says what training changed. It is a dict of tensors: for a LoRA
adapter `{module: scaling * B @ A}`, each (out, in), for full weights `{parameter: W_i - W0}`; all
its tensors count as one flat vector. A is never merged with A and B with B: (B1 + B2)(A1 + A2) has
the cross terms B1 A2 and B2 A1, which neither model learned.

Every merge but TIES is V = sum_i c_i V_i, and SLERP's c_i need only the inner products of the
vectors. So the large vectors are read once, for their Gram matrix, and the rest is arithmetic on n
numbers. Two more baselines of Li et al. 2024, Fisher and RegMean, need statistics of the training
data and are not here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Vector = dict[str, Tensor]
Numbers = Sequence[float | Tensor] | Tensor

PEFT_PREFIX = "base_model.model."
# Below this sine of their angle, two vectors count as parallel: SLERP's quotient sin/sin then loses
# digits (0/0 at angle 0) and differs from the straight line by less than the square of this.
PARALLEL_SINE = 1e-3


def task_vector(adapter_state: Mapping[str, Tensor], scaling: float) -> Vector:
    """The change of weights that a LoRA adapter makes: `{module: scaling * B @ A}`, each (out, in).

    `adapter_state`: what peft saves, `...lora_A.weight` (r, in) and `...lora_B.weight` (out, r).
    `scaling`: alpha / r (alpha / sqrt(r) for rsLoRA). Modules get their names in the base model;
    the product is taken in float32 or wider. ValueError for anything but pairs of A and B (DoRA,
    biases, saved modules): merge such models by `full_task_vector`. Taught in notebooks/12.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in adapter_state.items():
        match = re.fullmatch(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight", key.removeprefix(PEFT_PREFIX))
        if match:
            pairs.setdefault(match["module"], {})[match["factor"]] = value.detach()
        else:
            strange.append(key)
    strange += [f"{module} with lora_{'/'.join(pair)} only" for module, pair in pairs.items() if len(pair) < 2]
    if strange or not pairs:
        raise ValueError(
            f"expected pairs of lora_A.weight and lora_B.weight, got {strange[:3] or 'an empty dict'}; take them from "
            "peft.get_peft_model_state_dict or the saved file; merge other adapters by full_task_vector"
        )
    return {module: scaling * (_widen(pair["B"]) @ _widen(pair["A"])) for module, pair in pairs.items()}


def full_task_vector(state: Mapping[str, Tensor], base_state: Mapping[str, Tensor]) -> Vector:
    """The change of weights of a fully fine-tuned model: `{parameter: W - W0}`, float32 or wider.

    ValueError if the two hold different tensors; integer buffers are left out. Taught in notebooks/12.
    """
    _require_same([state, base_state])
    return {k: _widen(w.detach()) - _widen(base_state[k]) for k, w in state.items() if w.is_floating_point()}


def linear(vectors: Sequence[Vector], weights: Numbers | None = None) -> Vector:
    """sum_i w_i V_i, by default the mean. Weights need not sum to one (task arithmetic).

    Gradients flow into weights that are tensors. Taught in notebooks/12.
    """
    _require_same(vectors)
    weights = [1 / len(vectors)] * len(vectors) if weights is None else weights
    _require_one_each(vectors, weights, "weights")
    return {
        name: sum(_like(w, v[name]) * v[name] for w, v in zip(weights, vectors, strict=True)) for name in vectors[0]
    }


def gram_matrix(vectors: Sequence[Vector]) -> Tensor:
    """Inner products <V_i, V_j> over all parameters, (n, n), float64 on the CPU. Taught in notebooks/12."""
    _require_same(vectors)
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i, v in enumerate(vectors):
        for j, w in enumerate(vectors[: i + 1]):
            gram[i, j] = gram[j, i] = sum((v[name] * w[name]).sum().cpu().double() for name in v)
    return gram


def angle(v1: Vector, v2: Vector) -> float:
    """The one global angle W between two task vectors, radians in [0, pi]; nan if one is zero.

    s2 is trained on from s1, so they share most of their way from W0: expect a small angle, and
    SLERP close to the straight line. Taught in notebooks/12.
    """
    gram = gram_matrix([v1, v2])
    return torch.acos((gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()).clamp(-1, 1)).item()


def slerp(v1: Vector, v2: Vector, t: float | Tensor) -> Vector:
    """Spherical interpolation [sin((1-t)W) V1 + sin(tW) V2] / sin W, W the angle between V1 and V2.

    The vectors are not normalised: t = 0 gives V1 and t = 1 gives V2, lengths included. Where W or
    the arc is not defined (parallel, opposite or zero vectors) it is the line (1-t) V1 + t V2.
    Source: the report's section 4, after Li et al. 2024 (arXiv 2410.15035). Taught in notebooks/12.
    """
    gram = gram_matrix([v1, v2])
    return linear([v1, v2], _slerp_weights(gram[0, 1], gram[0, 0], gram[1, 1], t))


def _slerp_weights(dot: Tensor, square1: Tensor, square2: Tensor, t: float | Tensor) -> tuple:
    """SLERP's factors of V1 and V2, from <V1, V2>, |V1|^2 and |V2|^2."""
    if square1 == 0 or square2 == 0:
        return 1 - t, t
    omega = torch.acos((dot / (square1 * square2).sqrt()).clamp(-1, 1))
    if torch.sin(omega) < PARALLEL_SINE:
        return 1 - t, t
    return torch.sin((1 - t) * omega) / torch.sin(omega), torch.sin(t * omega) / torch.sin(omega)


def iterated_slerp_weights(gram: Tensor, a: Numbers) -> Tensor:
    """The c_i (n,) of iterated_slerp(vectors, a) = sum_i c_i V_i, from the Gram matrix (n, n).

    V_1 and V_2 meet at t = a_2 / (a_1 + a_2); a further V_n joins the result so far at
    t = a_n / (mean(a_1 .. a_{n-1}) + a_n). Only ratios of the a_i matter, and for n > 2 their
    order. ValueError unless all a_i > 0. Taught in notebooks/12.
    """
    a = torch.stack([torch.as_tensor(x, dtype=gram.dtype) for x in a])
    if not (a > 0).all():
        raise ValueError(f"the a_i of iterated SLERP must be positive, got {a.tolist()}")
    unit = torch.eye(len(a), dtype=gram.dtype)
    c = unit[0]  # the vector so far is sum_i c_i V_i
    for n in range(1, len(a)):
        t = a[n] / (a[:n].mean() + a[n])
        so_far, joining = _slerp_weights(c @ gram[n], c @ gram @ c, gram[n, n], t)
        c = so_far * c + joining * unit[n]
    return c


def iterated_slerp(vectors: Sequence[Vector], a: Numbers) -> Vector:
    """All V_i joined one after the other by SLERP; `a` has one positive number for each.

    See `iterated_slerp_weights`; gradients flow into `a`. Taught in notebooks/12.
    """
    return position(vectors, a, 1.0)


def path(
    v1: Vector, v2: Vector, ts: Iterable[float], combine: Callable[[Vector, Vector, float], Vector] = slerp
) -> Iterator[tuple[float, Vector]]:
    """Pairs (t, vector) on the way from V1 to V2, made one at a time: a vector may be as large as a model.

    For the straight line, `combine=lambda v1, v2, t: linear([v1, v2], [1 - t, t])`. Taught in notebooks/12.
    """
    return ((t, combine(v1, v2, t)) for t in ts)


def ties(vectors: Sequence[Vector], density: float, weights: Sequence[float] | None = None) -> Vector:
    """TIES merging: trim each vector, elect a sign for each parameter, average those that agree.

    1. Trim: of each vector the share `density` (0, 1] of largest magnitudes stays, counted over all
       its parameters at once; equal magnitudes at the threshold all stay.
    2. Elect: the sign of sum_i w_i V_i. A draw elects none, and the parameter stays as in W0.
    3. Disjoint mean: the w-weighted mean of the entries that have the elected sign.

    `weights` (n,) not negative, by default one each. The paper scales the result by a lambda:
    `linear([merged], [lam])`. Source: Yadav et al. 2023 (arXiv 2306.01708), where w_i = 1.
    Taught in notebooks/12.
    """
    _require_same(vectors)
    weights = [1.0] * len(vectors) if weights is None else list(weights)
    _require_one_each(vectors, weights, "weights")
    if not 0 < density <= 1 or min(weights) < 0:
        raise ValueError(f"TIES needs a density in (0, 1] and weights >= 0, got {density} and {weights}")
    trimmed = [_trim(v, density) for v in vectors]
    return {name: _disjoint_mean([v[name] for v in trimmed], weights) for name in vectors[0]}


def _trim(vector: Vector, density: float) -> Vector:
    magnitudes = torch.cat([x.abs().flatten() for x in vector.values()])
    keep = max(1, round(density * len(magnitudes)))
    threshold = magnitudes.kthvalue(len(magnitudes) - keep + 1).values
    return {name: torch.where(x.abs() >= threshold, x, 0) for name, x in vector.items()}


def _disjoint_mean(tensors: list[Tensor], weights: list[float]) -> Tensor:
    weighted = [w * x for w, x in zip(weights, tensors, strict=True)]
    elected = sum(weighted).sign()
    agree = [(x.sign() == elected).to(x.dtype) for x in weighted]
    total = sum(x * mask for x, mask in zip(weighted, agree, strict=True))
    mass = sum(w * mask for w, mask in zip(weights, agree, strict=True))
    return torch.where(mass > 0, total / mass, 0)


class Position(NamedTuple):
    """W0 + lam * iterated_slerp(vectors, a), and for each step {"loss" (without penalty), "a", "lam"} before it."""

    a: tuple[float, ...]
    lam: float
    history: list[dict]


def position(vectors: Sequence[Vector], a: Numbers, lam: float | Tensor, gram: Tensor | None = None) -> Vector:
    """lam * V of the position W0 + lam * V, where V = iterated_slerp(vectors, a).

    Gradients flow into `a` and `lam`. `gram`: gram_matrix(vectors), if known. Taught in notebooks/12.
    """
    _require_one_each(vectors, a, "a")
    return linear(vectors, lam * iterated_slerp_weights(gram_matrix(vectors) if gram is None else gram, a))


def self_position(
    loss_at: Callable[[Vector], Tensor],
    vectors: Sequence[Vector],
    *,
    mu: float = 0.01,
    steps: int = 100,
    lr: float = 0.02,
    a_init: float | Sequence[float] = 1.0,
    lambda_init: float = 1.0,
) -> Position:
    """Learn where to stand among the models: minimise loss(W0 + lam * V(a)) + mu * lam by Adam.

    `loss_at(delta)` is the contrastive loss of the base model moved by `delta`, over the probe set
    or a batch of it drawn anew at each call; it runs the model inside `apply_delta(model, delta)`,
    or by torch.func.functional_call with `to_full`. Only the n numbers a_i and lam are learned, and
    no gradient is left on the model. Adam moves log a_i, so a_i stays positive and `lr` is a
    relative step for a_i (an absolute one for lam).

    Source: Li et al. 2024 (arXiv 2410.15035), Self Positioning; Adam, log a_i and the defaults are
    this project's choice. Taught in notebooks/12.
    """
    a_start = [float(a_init)] * len(vectors) if isinstance(a_init, (int, float)) else a_init
    _require_one_each(vectors, a_start, "a_init")
    log_a = torch.tensor(a_start, dtype=torch.float64).log().requires_grad_()
    lam = torch.tensor(lambda_init, dtype=torch.float64, requires_grad=True)
    gram = gram_matrix(vectors)
    optimizer = torch.optim.Adam([log_a, lam], lr=lr)
    history = []
    for step in range(steps):
        loss = loss_at(position(vectors, log_a.exp(), lam, gram))
        if not loss.requires_grad or not loss.isfinite():
            raise ValueError(
                f"loss_at must return a finite loss with a gradient through delta, got {loss} at step {step}; "
                "check that it uses delta outside no_grad, and the probe set"
            )
        history.append({"loss": loss.item(), "a": tuple(log_a.exp().tolist()), "lam": lam.item()})
        # not backward(), which would fill .grad of the model's weights too
        log_a.grad, lam.grad = torch.autograd.grad(loss + mu * lam, [log_a, lam], materialize_grads=True)
        optimizer.step()
    return Position(tuple(log_a.exp().tolist()), lam.item(), history)


@contextmanager
def apply_delta(model: nn.Module, delta: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside the context each linear layer that `delta` names computes base(x) + x @ delta.T.

    Forward hooks add the term: no weight is touched, gradients flow into `delta`, and afterwards
    the model is what it was. Names are those of `task_vector`. A peft model is moved from where it
    stands; to replace its adapter instead, also enter `model.disable_adapter()`. ValueError with
    gradient checkpointing, which runs layers again in backward, when the context is over.
    Taught in notebooks/12.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = dict(base.named_modules())
    if torch.is_grad_enabled() and any(m.training and getattr(m, "gradient_checkpointing", 0) for m in layers.values()):
        raise ValueError("gradient checkpointing would lose delta in backward; call model.eval() before apply_delta")
    for name, d in delta.items():
        _require_linear(name, layers.get(name), d)
    handles = [layers[name].register_forward_hook(_adds(d)) for name, d in delta.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _adds(delta: Tensor) -> Callable:
    return lambda layer, args, output: output + F.linear(args[0], delta.to(args[0])).to(output.dtype)


def _require_linear(name: str, layer: nn.Module | None, delta: Tensor) -> None:
    layer = getattr(layer, "base_layer", layer)  # peft wraps the layers that it adapts
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"delta names {name!r}, here a {type(layer).__name__}; expected an nn.Linear of the base")
    expected = (layer.out_features, layer.in_features)
    if delta.shape != expected:
        raise ValueError(f"delta of {name!r} has shape {tuple(delta.shape)}; expected (out, in) = {expected}")


class LowRank(NamedTuple):
    """A delta as a LoRA adapter: peft state dict, rank, and relative Frobenius error over all modules."""

    state: dict[str, Tensor]
    rank: int
    error: float


def to_adapter(delta: Mapping[str, Tensor], rank: int | None = None) -> LowRank:
    """Factorise a delta into a LoRA adapter of scaling 1: load with LoraConfig(r=rank, lora_alpha=rank).

    By singular value decomposition in float64, so no adapter of this rank comes closer. A linear or
    SLERP merge of n adapters of rank r has rank n * r at most; from there on the error is rounding.
    TIES cuts entries out, and its merge has a high rank. `rank=None`: the lowest that is exact.
    Modules of lower rank are padded with zeros. Taught in notebooks/12.
    """
    if not delta or (rank is not None and rank < 1):
        raise ValueError(f"expected a delta with modules and rank >= 1 or None, got {len(delta)} modules, rank {rank}")
    factors = {name: _factorise(d, rank) for name, d in delta.items()}
    rank = max(len(a) for a, _ in factors.values()) if rank is None else rank
    state, missed, total = {}, 0.0, 0.0
    for name, (a, b) in factors.items():
        padding = rank - len(a)
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, padding)).contiguous()  # (rank, in)
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = F.pad(b, (0, padding)).contiguous()  # (out, rank)
        missed += (delta[name].double() - b.double() @ a.double()).square().sum().item()
        total += delta[name].double().square().sum().item()
    return LowRank(state, rank, (missed / total) ** 0.5 if total else 0.0)


def _factorise(d: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) with B @ A closest to d, k the rank or, if None, d's numerical rank, at least 1."""
    u, s, vt = torch.linalg.svd(d.double(), full_matrices=False)
    if rank is None:  # singular values above the rounding of d's own dtype
        rank = max(1, int((s > s[0] * max(d.shape) * torch.finfo(d.dtype).eps).sum()))
    root = s[:rank].sqrt()  # shared evenly, so that neither factor is badly scaled in half precision
    return (root[:, None] * vt[:rank]).to(d.dtype), (u[:, :rank] * root).to(d.dtype)


def to_full(base_state: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full weights W0 + delta in the base's dtypes; tensors that delta does not name are the base's own.

    A name is a parameter, or a module whose `.weight` is meant. The sum is rounded once, which in
    bfloat16 loses changes below 2^-8 of a weight: there an adapter is more exact. Gradients flow
    into `delta`. Taught in notebooks/12.
    """
    merged = dict(base_state)
    for name, d in delta.items():
        key = name if name in base_state else f"{name}.weight"
        if key not in base_state:
            raise ValueError(f"delta names {name!r}, but the base has no {name!r} or {key!r}; is it the same base?")
        w0 = base_state[key]
        merged[key] = (_widen(w0) + d.to(w0.device)).to(w0.dtype)
    return merged


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(number: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(number).to(x.dtype).to(x.device)  # in this order: Apple's MPS has no float64


def _require_same(vectors: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = [{name: tuple(x.shape) for name, x in v.items()} for v in vectors]
    if not shapes:
        raise ValueError("got no vectors to merge; give at least one")
    for i, other in enumerate(shapes):
        for name in shapes[0].keys() | other.keys():
            if shapes[0].get(name) != other.get(name):
                raise ValueError(
                    f"{name!r} has shape {shapes[0].get(name)} in vector 0 and {other.get(name)} in vector {i} (None: "
                    "not there); merge models of one base, and give zeros for a module that one of them lacks"
                )


def _require_one_each(vectors: Sequence, numbers: Numbers, what: str) -> None:
    if len(numbers) != len(vectors):
        raise ValueError(f"{what} has {len(numbers)} numbers for {len(vectors)} vectors; give one each")
