"""Attention: the non-parametric memory, which keeps every key and value (arXiv 2504.13173, table 1, "Transformer")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.gates import Gate
from miras.layout import Layout, take
from miras.mixer import Mixer
from miras.state import BatchState


@dataclass(frozen=True)
class CacheState(BatchState):
    """What attention has seen, the latest token of each row in the last place.

    Attributes:
        k: keys [B, L, H, d_k], already rotated; rows that have seen fewer tokens have their last ones valid.
        v: values [B, L, H, d_v].
        position: tokens seen, int64 [B].
    """

    k: Tensor
    v: Tensor
    position: Tensor


@dataclass(frozen=True)
class Attention(Mixer):
    """Softmax attention over PyTorch's scaled_dot_product_attention, with rotary positions.

    In the four words of the framework: memory of growing size, l_2 bias, no retention (or a window), solved without
    parameters (Nadaraya-Watson). It shares the state and layout contract of `Rule`, not the axes.

    Args:
        window: how many tokens, the present one included, each token sees; None: all.
        rope: rotate queries and keys by their position (arXiv 2104.09864).
    """

    window: int | None = None
    rope: bool = True
    gates: ClassVar[tuple[Gate, ...]] = ()

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UsageError(f"Attention: window must be at least 1 token or None, got {self.window}.")

    def describe(self) -> dict[str, str]:
        """See `Mixer`."""
        kept = "all tokens" if self.window is None else f"the last {self.window} tokens"
        return {
            "memory": f"keys and values of {kept}",
            "bias": "L2, weighted by exp(q . k / sqrt(d))",
            "retention": "NoRetention()" if self.window is None else f"window {self.window}",
            "algorithm": "non-parametric (Nadaraya-Watson)",
            "update": "M_t = M_{t-1} + {(k_t, v_t)}"
            + ("" if self.window is None else f" - {{(k, v) older than {self.window}}}"),
            "inputs": "",
        }

    def state_bytes(self, heads: int, d_k: int, d_v: int, tokens: int) -> int:
        """See `Mixer`."""
        return 4 * heads * (d_k + d_v) * (tokens if self.window is None else min(tokens, self.window - 1))

    def init(self, batch: int, heads: int, d_k: int, d_v: int, like: Tensor) -> CacheState:
        """An empty state."""
        position = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return CacheState(like.new_zeros(batch, 0, heads, d_k), like.new_zeros(batch, 0, heads, d_v), position)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: CacheState | None, where: Layout
    ) -> tuple[Tensor, CacheState]:
        """q, k [B, T, H, d_k], v [B, T, H, d_v] -> y [B, T, H, d_v] and the state with these tokens seen."""
        rows = where.padded()
        q, k, v = where.to_rows(q), where.to_rows(k), where.to_rows(v)
        if state is None:
            state = self.init(rows.rows, k.shape[2], k.shape[3], v.shape[3], k)
        position = state.position[:, None] + rows.rank.clamp_min(0)
        if self.rope:
            q, k = rotate(q, position), rotate(k, position)
        seen = state.position + rows.count
        plain = rows.dense and state.k.shape[1] == 0
        all_k, all_v = torch.cat([state.k.to(k), k], 1), torch.cat([state.v.to(v), v], 1)
        if not rows.dense:
            all_k, all_v = self._align(all_k, rows, state), self._align(all_v, rows, state)
        if plain and (self.window is None or self.window >= rows.length):
            y = _sdpa(q, k, v, None, causal=True)
        else:
            y = _sdpa(q, all_k, all_v, self._visible(position, rows, seen, all_k.shape[1]), causal=False)
        kept = all_k.shape[1] if self.window is None else min(all_k.shape[1], self.window - 1)
        cut = all_k.shape[1] - kept
        y = torch.where(rows.valid[:, :, None, None], y, 0.0) if not rows.dense else y
        return where.from_rows(y), CacheState(all_k[:, cut:], all_v[:, cut:], seen)

    def _align(self, x: Tensor, rows: Layout, state: CacheState) -> Tensor:
        """Old and new tokens of each row side by side with the last one in the last place, [B, L + T, H, n]."""
        old, total = state.k.shape[1], x.shape[1]
        # Number of each place's token in the row's own count, the last one being seen - 1.
        number = torch.arange(total, device=x.device) - total + (state.position + rows.count)[:, None]
        first = rows.start % rows.length
        new = number - state.position[:, None]
        place = torch.where(new >= 0, old + first[:, None] + new, old + new)
        index = torch.where(
            (number >= 0) & (place >= 0), place + torch.arange(x.shape[0], device=x.device)[:, None] * total, -1
        )
        return take(x.flatten(0, 1), index)

    def _visible(self, position: Tensor, rows: Layout, seen: Tensor, places: int) -> Tensor:
        """Which places each token sees, bool [B, 1, T, L + T]."""
        number = torch.arange(places, device=seen.device) - places + seen[:, None]
        distance = position[:, :, None] - number[:, None, :]
        visible = (distance >= 0) & (number >= 0)[:, None, :]
        if self.window is not None:
            visible &= distance < self.window
        # A row of the softmax needs one place; padding reads nothing else and is dropped.
        return (visible | ~rows.valid[:, :, None])[:, None]


def rotate(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding: pairs (x_j, x_{j + d/2}) of [B, T, H, d] turned by position / base^(2 j / d)."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position.double()[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=1 / math.sqrt(q.shape[-1]), enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
