"""Attention on a CPU: in the open for short prompts, where that is faster, and in blocks for long ones.

In the open, each layer holds a weight for every pair of tokens: at 32,768 tokens 4 GB a head. The blocks of
`scaled_dot_product_attention` hold a few of them at a time; the numbers are the same up to rounding.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.qwen3_vl.modeling_qwen3_vl import eager_attention_forward

BY_LENGTH = "by_length"  # the name for `attn_implementation`
LONG = 2048  # tokens


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any):
    attend = sdpa_attention_forward if key.shape[2] > LONG else eager_attention_forward
    return attend(module, query, key, value, attention_mask, **options)


def _mask(*, kv_length: int, **options: Any) -> Tensor | None:
    mask = sdpa_mask if kv_length > LONG else eager_mask
    return mask(kv_length=kv_length, **options)


AttentionInterface.register(BY_LENGTH, _attention)
AttentionMaskInterface.register(BY_LENGTH, _mask)
