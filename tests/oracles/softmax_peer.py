"""Softmax attention by PyTorch and Hugging Face: `scaled_dot_product_attention` with Llama's rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def attention(inputs: dict[str, Tensor], window: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """q k v [B, T, H, n], over the last `window` tokens. The angles are ours to give: position / 10000^(2 j / d)."""
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    time, d = q.shape[-2:]
    position = torch.arange(time)
    angle = position[:, None] / 10000.0 ** (torch.arange(0, d, 2).double() / d)
    angle = torch.cat([angle, angle], -1)[None]
    q, k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    distance = position[:, None] - position
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < (window or time)))
    return y.transpose(1, 2), {}
