"""LoRA as one matrix product: the same numbers as peft's, with fewer small operations.

peft computes W x + s B (A x): three products and two sums for each projection. On a small model on a CPU
the extra operations cost as much as the products. (W + s B A) x is the same by associativity; the sum of
weights is made once a call, gradients flow through it to A and B, and the adapter is saved as ever. Without
gradients a small one is kept from call to call, until a step changes a part of it. On a large model peft's own
order is the better one: the summed weights would double the model's memory.
"""

import types

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

KEPT = 2**20  # numbers in a matrix whose sum is kept: all of Q3VL-tiny's, none of the 2B model's


def _forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    base = self.get_base_layer()
    if self.disable_adapters or self.merged:
        return base(x)
    [name] = self.active_adapters
    parts = base.weight, self.lora_A[name].weight, self.lora_B[name].weight
    if torch.is_grad_enabled() or base.weight.numel() > KEPT:
        self.folded = None  # a step follows, and not every optimiser's counts as a new version
        return F.linear(x, _sum(*parts, self.scaling[name]), base.bias)
    half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    state = [(id(part), part._version) for part in parts] + [half]
    if self.folded is None or self.folded[0] != state:
        weight = _sum(*parts, self.scaling[name])
        self.folded = state, parts, weight.to(half or weight.dtype)  # the parts are held: no other gets their id
    return F.linear(x, self.folded[2], base.bias)


def _sum(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return weight + (scaling * (b @ a)).to(weight.dtype)


def fold_lora(model: nn.Module) -> nn.Module:
    """Give every LoRA projection of a peft model the forward of this file, in place; returns the model.

    Raises ValueError for adapters that are more than B A: dropout or variants such as DoRA.
    """
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            dropouts = [d for d in module.lora_dropout.values() if not isinstance(d, nn.Identity)]
            if dropouts or module.lora_variant or len(module.lora_A) != 1:
                raise ValueError(f"{path}: only a single plain LoRA without dropout folds into its weight")
            module.folded = None
            module.forward = types.MethodType(_forward, module)
    return model
