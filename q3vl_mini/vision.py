"""The vision tower at the speed of its matrix products, with the numbers of transformers' own code.

On many small pictures Qwen3-VL's tower spends most of its time outside of its matrix products: its
attention runs once a picture, and its patch embedding is a 3-D convolution whose stride equals its
kernel, so a plain matrix product with the same weights. `speed_up` changes the two, in place; weights,
checkpoints and results stay as they are. tests/test_vision.py holds the numbers together.
"""

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision


def patchify(images: Tensor, patch: int = 16, merge: int = 2, temporal: int = 2) -> tuple[Tensor, Tensor]:
    """Equal-sized pictures as Qwen3-VL's processor lays them out.

    images: float (B, 3, H, W) in [0, 1], H and W multiples of patch * merge. Returns pixel_values
    (B * h * w, 3 * temporal * patch * patch), normalised to [-1, 1], patches of one visual token next to
    each other, the frame repeated `temporal` times; and grid_thw (B, 3) with h, w in patches.
    """
    b, _, height, width = images.shape
    h, w = height // patch, width // patch
    x = (images * 2 - 1).view(b, 3, h // merge, merge, patch, w // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, h/m, w/m, m, m, 3, patch, patch)
    x = x.unsqueeze(6).expand(*x.shape[:6], temporal, patch, patch)
    return x.reshape(b * h * w, -1), torch.tensor([[1, h, w]]).expand(b, 3)


def _patch_embed(self, hidden_states: Tensor) -> Tensor:
    weight = self.proj.weight
    return F.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def _attention(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
    """Self-attention within each frame; frames of equal length are attended as one batch."""
    n = len(hidden_states)
    q, k, v = self.qkv(hidden_states).view(n, 3, self.num_heads, -1).unbind(1)  # (n, heads, head_dim)
    cos, sin = position_embeddings
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    lengths = cu_seqlens.diff()
    out = torch.empty_like(v) if len(lengths.unique()) > 1 else None
    for length in lengths.unique().tolist():
        rows = slice(None)
        if out is not None:
            starts = cu_seqlens[:-1][lengths == length]
            rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        frames = [x[rows].view(-1, length, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v)]
        if length <= 128 and hidden_states.device.type == "cpu":  # a short softmax in the open beats sdpa on CPU
            weights = (frames[0] * self.scaling) @ frames[1].transpose(2, 3)
            mixed = weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ frames[2]
        else:
            mixed = F.scaled_dot_product_attention(*frames, scale=self.scaling)
        mixed = mixed.transpose(1, 2).reshape(-1, self.num_heads, self.head_dim)
        if out is None:
            out = mixed
        else:
            out = out.index_copy(0, rows, mixed)
    return self.proj(out.reshape(n, -1))


def speed_up(visual: nn.Module) -> nn.Module:
    """Give a Qwen3VLVisionModel the faster forward of this file, in place; returns it."""
    visual.patch_embed.forward = types.MethodType(_patch_embed, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = types.MethodType(_attention, block.attn)
    return visual
