"""Memories without a hidden layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miras.errors import UsageError
from miras.memory.base import Memory, Pullback
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weights, mv


@dataclass(frozen=True)
class Linear(Memory):
    """M(W, x) = W x: the matrix memory of linear attention and DeltaNet (arXiv 2504.13173 table 1).

    Choose it first: it is the smallest memory that associates, all engines know it, at chunk 1 in an exact parallel
    form, and most published models have it. In the paper's ablation of Yaad (its table 4) it does worse than `MLP`.

    Args:
        gated: which side channel gates act on, the keys (columns of W: GLA, KDA, RWKV-7) or the values (rows).
        start: "zero", or "learned" for a learned initial matrix (gates whose link is singular or dead at zero need it).
    """

    gated: Literal["keys", "values"] = "keys"
    start: Literal["zero", "learned"] = "zero"

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        channel, simplex = (COLUMNS, ROWS) if self.gated == "keys" else (ROWS, COLUMNS)
        return {"w": Leaf(d_v, d_k, channel, simplex, power=1.0, std=float(self.start == "learned"))}

    def slow(self, d_v: int) -> dict[str, tuple[int, float]]:
        return {}

    @property
    def normalised(self) -> bool:
        return False

    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        return mv(weights["w"], x)

    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        return self.read(weights, x, slow), lambda u: {"w": Outer(u, x)}


@dataclass(frozen=True)
class Vector(Memory):
    """M(w, x) = w (.) x: one number per channel, kept as a matrix of one column (arXiv 2504.13173 section 4).

    Choose it for the smallest state there is, or to see what a matrix adds: it scales channels and cannot associate one
    with another.

    Args:
        start: "zero" or "learned", as for `Linear`.
    """

    start: Literal["zero", "learned"] = "zero"

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        if d_k != d_v:
            raise UsageError(
                f"Vector: keys and values must have one size, got d_k={d_k}, d_v={d_v}; write Linear() instead."
            )
        return {"w": Leaf(d_k, 1, ROWS, ROWS, power=1.0, std=float(self.start == "learned"))}

    def slow(self, d_v: int) -> dict[str, tuple[int, float]]:
        return {}

    @property
    def normalised(self) -> bool:
        return False

    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        return mv(weights["w"], torch.ones_like(x[..., :1])) * x

    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        one = torch.ones_like(x[..., :1])
        return mv(weights["w"], one) * x, lambda u: {"w": Outer(u * x, one)}
