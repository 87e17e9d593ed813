"""Smaller embeddings: fewer dimensions (MRL), fewer bits (LSQ int8, binary), and the objective that trains for both.

Notation: D dimensions of the full embedding, d of a prefix, b bits, s the learned step. Functions of embeddings take
them along the last axis and, unless a type is named, as numpy arrays or torch tensors alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Embeddings = tuple[Tensor | None, ...] | Mapping[str, Tensor | None]


def truncate(embeddings: Tensor | np.ndarray, dim: int) -> Tensor | np.ndarray:
    """The first `dim` entries, L2-normalised again: (..., D) to (..., dim), a shorter unit vector (MRL).

    Half precision becomes float32. An all-zero prefix stays zero.

    Taught in notebooks/06
    """
    full = embeddings.shape[-1]
    if not 1 <= dim <= full:
        raise ValueError(f"cannot truncate embeddings of {full} dimensions to {dim}; ask for 1 to {full}")
    prefix = embeddings[..., :dim]
    if isinstance(prefix, np.ndarray):
        prefix = prefix.astype(np.promote_types(prefix.dtype, np.float32))
        return prefix / np.maximum(np.linalg.norm(prefix, axis=-1, keepdims=True), 1e-12)
    return F.normalize(_at_least_float32(prefix), dim=-1)


def matryoshka(
    loss: Callable[..., Tensor], embeddings: Embeddings, dims: Sequence[int], weights: Sequence[float] | None = None
) -> Tensor:
    """Matryoshka objective: sum over d of w_d * loss(prefixes of d dimensions).

    Args:
        loss: called as `loss(*embeddings)`, or `loss(**embeddings)` if they are a mapping; bind the rest with
            `functools.partial`, e.g. `partial(info_nce, temperature=0.02)`.
        embeddings: tensors with the embedding as last axis (queries, documents, negatives ...); None passes through.
        dims: prefix lengths; put D among them, for the full embedding is one of the prefixes.
        weights: w_d, in the order of `dims`; None means 1 each, as in the MRL paper (Kusupati et al. 2022).

    Taught in notebooks/06
    """
    return compressed_objective(loss, embeddings, dims, weights)


def compressed_objective(
    loss: Callable[..., Tensor],
    embeddings: Embeddings,
    dims: Sequence[int],
    dim_weights: Sequence[float] | None = None,
    quantizers: "Quantizers | None" = None,
    quantizer_weights: Mapping[str, float] | None = None,
    at_prefixes: Callable[..., Tensor] | None = None,
) -> Tensor:
    """What every stage minimises: the loss at every prefix, at full precision and quantised (MRL and QAT together).

    L = sum over d of w_d * [ loss(x_d) + sum over precisions p of v_p * loss(Q_dp(x_d)) ],
    with x_d the re-normalised prefix and Q_dp its fake-quantised counterpart.

    Args:
        loss, embeddings, dims, dim_weights: as in `matryoshka`.
        quantizers: learned steps for all of `dims`.
        quantizer_weights: v_p, e.g. {"int8": 1.0, "binary": 1.0}; None or {} is MRL alone.
        at_prefixes: a faster way to the sum of w_d * loss(x_d) that knows `dims` and w_d, called with the whole
            embeddings (prefix_info_nce.py); None computes one prefix after the other.

    Taught in notebooks/06
    """
    if quantizer_weights and quantizers is None:
        raise ValueError(f"weights for {list(quantizer_weights)} but no quantizers; pass Quantizers(dims)")
    dim_weights = [1.0] * len(dims) if dim_weights is None else dim_weights
    if len(dims) == 0 or len(dims) != len(dim_weights):
        raise ValueError(f"dims {list(dims)} with weights {list(dim_weights)}; give at least one, and a weight each")
    total = 0.0 if at_prefixes is None else _apply(at_prefixes, embeddings)
    for d, w in zip(dims, dim_weights, strict=True):
        prefixes = _map(partial(truncate, dim=d), embeddings)
        if at_prefixes is None:
            total += w * _apply(loss, prefixes)
        for p, v in (quantizer_weights or {}).items():
            total += w * v * _apply(loss, _map(partial(quantizers, dim=d, precision=p), prefixes))
    return total


class LearnedStep(torch.autograd.Function):
    """Forward and the two gradients of `fake_quantise`, equations 1 to 3 and 5 of Esser et al. 2020.

    Taught in notebooks/06
    """

    @staticmethod
    def forward(ctx, v: Tensor, step: Tensor, q_n: int, q_p: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(v, step)
        ctx.constants = q_n, q_p, gradient_scale
        return (v / step).clamp(-q_n, q_p).round() * step

    @staticmethod
    def backward(ctx, gradient: Tensor):
        v, step = ctx.saved_tensors
        q_n, q_p, gradient_scale = ctx.constants
        ratio = v / step
        inside = (-q_n < ratio) & (ratio < q_p)
        d_step = torch.where(inside, -ratio + ratio.round(), ratio.clamp(-q_n, q_p))  # outside: -Q_N or Q_P
        return gradient * inside, (gradient * d_step).sum() * gradient_scale, None, None, None


def fake_quantise(v: Tensor, step: Tensor, bits: int = 8, gradient_scale: float = 1.0) -> Tensor:
    """LSQ (Esser et al. 2020): round(clip(v / s, -Q_N, Q_P)) * s, with its gradients.

    d/dv is 1 strictly inside the clipping limits (straight-through) and 0 outside. d/ds is -v/s + round(v/s) inside,
    -Q_N or Q_P outside, summed over v and times `gradient_scale`. Halves round to even.

    Args:
        v: any shape. step: s > 0, a scalar tensor. bits: b >= 2.

    Taught in notebooks/06
    """
    return LearnedStep.apply(v, step, *integer_range(bits), gradient_scale)


def integer_range(bits: int) -> tuple[int, int]:
    """Q_N and Q_P of signed codes, -Q_N to Q_P: 128 and 127 at 8 bits.

    Taught in notebooks/06
    """
    if bits < 2:
        raise ValueError(f"LSQ needs at least 2 bits, got {bits}: Q_P would be 0; for 1 bit use BinaryQuantizer")
    return 2 ** (bits - 1), 2 ** (bits - 1) - 1


class _Quantizer(nn.Module):
    """What LSQ and binary share: one learned positive step, set from the first training batch."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def learned_step(self) -> Tensor:
        """The step in use, float32 and positive even where an optimiser has pushed the parameter through zero."""
        return self.step.float().abs().clamp_min(1e-8)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the step from embeddings (..., dim). In several processes all must call it: all get the same step."""
        magnitude = x.float().abs().mean()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(magnitude)
            magnitude /= dist.get_world_size()
        self.step.copy_(self._initial_step(magnitude))
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantise embeddings (..., dim) to the values that their codes times the step stand for."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"a quantizer of {self.dim} dimensions got {x.shape[-1]}: a step fits one length only")
        if not self.initialised:
            if not self.training:
                raise RuntimeError("this quantizer has no step yet: train it, load its state or call initialise(x)")
            self.initialise(x)
        x = _at_least_float32(x)
        return self._quantise(x, self.learned_step.to(x.dtype))


class LearnedStepQuantizer(_Quantizer):
    """LSQ for embeddings of `dim` dimensions (Esser et al. 2020; report, section 5).

    The step starts at 2<|v|>/sqrt(Q_P) of the first training batch, and its gradient is scaled by
    1/sqrt(dim * Q_P): dimensions count, not the batch. `initialised` is saved with the step. Keep it out of weight
    decay, with a small learning rate: Adam moves it by about that rate a step, whatever the scale of its gradient,
    and at 8 bits it starts near 0.14 / sqrt(dim).

    Taught in notebooks/06
    """

    def __init__(self, dim: int, bits: int = 8):
        super().__init__(dim)
        self.bits, (_, self.q_p) = bits, integer_range(bits)

    def _initial_step(self, magnitude: Tensor) -> Tensor:
        return 2 * magnitude / math.sqrt(self.q_p)

    def _quantise(self, x: Tensor, step: Tensor) -> Tensor:
        return fake_quantise(x, step, self.bits, gradient_scale=1 / math.sqrt(self.dim * self.q_p))


class BinaryQuantizer(_Quantizer):
    """sign(x) times a learned scale s: our choice for 1 bit, where LSQ is undefined.

    Forward: +s where x > 0, else -s. d/dx is straight-through where |x| <= s and 0 outside, the slope of a hard
    tanh. d/ds is sign(x), scaled by 1/sqrt(dim). The scale starts at <|x|>, where s sign(x) is nearest to x. Cosines
    do not see it, so under a cosine loss its gradient is 0 and it stays; it then sets no more than the size of the
    gradient of x and where that is cut.

    Taught in notebooks/06
    """

    def _initial_step(self, magnitude: Tensor) -> Tensor:
        return magnitude

    def _quantise(self, x: Tensor, step: Tensor) -> Tensor:
        scale = 1 / math.sqrt(self.dim)
        step = (step - step * scale).detach() + step * scale  # the same value, its gradient scaled
        signs = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
        inside = torch.where(x.abs() <= step, x, 0.0)
        return signs * step + (inside - inside.detach())  # adds 0, with the gradient of x


class Quantizers(nn.ModuleDict):
    """An int8 and a binary quantizer for every dimension of `dims`; its state ships with the model.

    One for each, because entries of a unit vector in d dimensions are about 1/sqrt(d): at few bits the step of one
    length clips shorter prefixes, and it is coarse for longer ones.

    Taught in notebooks/06
    """

    def __init__(self, dims: Sequence[int]):
        kinds = {"int8": LearnedStepQuantizer, "binary": BinaryQuantizer}
        super().__init__({name: nn.ModuleDict({str(d): kind(d) for d in dims}) for name, kind in kinds.items()})

    def forward(self, x: Tensor, dim: int, precision: str) -> Tensor:
        """Fake-quantised, re-normalised prefix: (..., D) to (..., dim). "float32" is the prefix alone."""
        x = truncate(x, dim)
        return x if precision == "float32" else self.of(dim, precision)(x)

    def of(self, dim: int, precision: str) -> _Quantizer:
        """The quantizer of one dimension and precision, "int8" or "binary"."""
        if precision not in self or str(dim) not in self[precision]:
            known = f"{list(self)} at {list(self['int8'])}"
            raise ValueError(f"no quantizer for {precision} at {dim} dimensions; this model has {known}")
        return self[precision][str(dim)]

    @torch.no_grad()
    def codes(self, x: Tensor | np.ndarray, dim: int, precision: str) -> np.ndarray:
        """What an index stores: float32 or int8 (N, dim), or for "binary" uint8 (N, dim / 8)."""
        x = truncate(x, dim)
        if precision == "float32":
            return _numpy(x)
        quantizer = self.of(dim, precision)
        if precision == "binary":
            return pack_binary(x)
        if not quantizer.initialised:
            raise RuntimeError(f"the int8 step for {dim} dimensions is not learned yet: train it or load its state")
        return quantise_int8(_numpy(x), quantizer.learned_step.item())


def quantise_int8(x: Tensor | np.ndarray, step: float) -> Tensor | np.ndarray:
    """round(clip(x / step, -128, 127)) as int8, in the shape and kind of `x`; times `step` it is x again, nearly.

    Taught in notebooks/06
    """
    if isinstance(x, np.ndarray):
        return np.rint(np.clip(x / step, -128, 127)).astype(np.int8)
    return (_at_least_float32(x) / step).clamp(-128, 127).round().to(torch.int8)


def pack_binary(x: Tensor | np.ndarray) -> np.ndarray:
    """Signs as bits, 8 dimensions a byte, the first in the highest bit: (N, D) to uint8 (N, D / 8). 1 is x > 0.

    Taught in notebooks/06
    """
    if x.shape[-1] % 8:
        raise ValueError(f"{x.shape[-1]} dimensions do not fill bytes; truncate to a multiple of 8")
    return np.packbits(_numpy(x) > 0, axis=-1)


def unpack_binary(codes: np.ndarray) -> np.ndarray:
    """Packed bits as signs: uint8 (N, D / 8) to float32 (N, D) of +1 and -1.

    Taught in notebooks/06
    """
    return np.unpackbits(codes, axis=-1).astype(np.float32) * 2 - 1


def int8_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cosines of int8 codes, float32 (Q, N), from (Q, D) and (N, D). The step cancels. Queries may stay float.

    Taught in notebooks/06
    """
    queries, documents = (x.astype(np.float32) for x in (queries, documents))  # an int8 product would overflow
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    return queries @ documents.T / np.maximum(norms, 1e-12)


def hamming_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cosines of packed sign vectors, 1 - 2 * hamming / D: float32 (Q, N) from uint8 (Q, D / 8) and (N, D / 8).

    Taught in notebooks/06
    """
    differing = [np.bitwise_count(query ^ documents).sum(axis=1, dtype=np.int32) for query in queries]
    return 1 - 2 * np.stack(differing).astype(np.float32) / (8 * documents.shape[1])


def asymmetric_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cosines of float queries (Q, D) with packed signs (N, D / 8): float32 (Q, N), to rescore a binary search.

    The query need not be stored, so it keeps its precision and breaks the ties of `hamming_scores`.

    Taught in notebooks/06
    """
    return int8_scores(queries, unpack_binary(documents))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _numpy(x: Tensor | np.ndarray) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else _at_least_float32(x.detach()).cpu().numpy()


def _map(function: Callable[[Tensor], Tensor], embeddings: Embeddings) -> Embeddings:
    if isinstance(embeddings, Mapping):
        return {name: None if x is None else function(x) for name, x in embeddings.items()}
    return tuple(None if x is None else function(x) for x in embeddings)


def _apply(loss: Callable[..., Tensor], embeddings: Embeddings) -> Tensor:
    return loss(**embeddings) if isinstance(embeddings, Mapping) else loss(*embeddings)
