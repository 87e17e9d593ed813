"""LoRA as one matrix product: the same numbers as peft's, with fewer small operations.

peft computes W x + s B (A x): three products and two sums for each projection. On a small model on a CPU
the extra operations cost as much as the products. (W + s B A) x is the same by associativity; the sum of
weights is made once a call, gradients flow through it to A and B, and the adapter is saved as ever. On a
large model peft's own order is the better one: the summed weights would double the model's memory.
"""

import types

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def _forward(self, x: Tensor, *args, **kwargs) -> Tensor:
    base = self.get_base_layer()
    if self.disable_adapters or self.merged:
        return base(x)
    [name] = self.active_adapters
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    weight = base.weight + (self.scaling[name] * (b @ a)).to(base.weight.dtype)
    return F.linear(x, weight, base.bias)


def fold_lora(model: nn.Module) -> nn.Module:
    """Give every LoRA projection of a peft model the forward of this file, in place; returns the model.

    Raises ValueError for adapters that are more than B A: dropout or variants such as DoRA.
    """
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            dropouts = [d for d in module.lora_dropout.values() if not isinstance(d, nn.Identity)]
            if dropouts or module.lora_variant or len(module.lora_A) != 1:
                raise ValueError(f"{path}: only a single plain LoRA without dropout folds into its weight")
            module.forward = types.MethodType(_forward, module)
    return model
