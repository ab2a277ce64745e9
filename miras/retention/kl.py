"""Memora's gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.retention.base import SlopedRetention, check_to
from miras.weights import ROWS, Leaf

EPS = 1e-6


@dataclass(frozen=True)
class KL(SlopedRetention):
    """W_t = c softmax(alpha_t log W_{t-1} - step_t) along the simplex axis (arXiv 2504.13173 eq. 21 and 27).

    Carried as A_t = alpha_t A_{t-1} - step_t, W_t = c softmax(A_t), which is the same wherever alpha_t is constant
    along that axis: no logarithm, no lag token, and the state cannot leave the simplex. The paper gives neither axis
    nor mass
        c:
    the axis is the hidden one (so that channel gates are constant along it), and c is its size n for the matrix that
    reads keys and sqrt(n) for the others, so that entries start at order 1 and 1/sqrt(n).

    Args:
        to: "zero" (the uniform simplex) or "initial".
    """

    on_simplex: ClassVar[bool] = True
    # Steps multiply: an entry is stepped in proportion to its size. The recurrence is chaotic at an eta of 1/2, and at
    # 1/4 single outer gradients are large.
    eta_limit: ClassVar[float] = 0.125

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("KL", self.to)

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return self.mass(leaf) * dual.softmax(leaf.simplex)

    def mass(self, leaf: Leaf) -> float:
        """c, the sum of each slice of the weights."""
        n = leaf.simplex_size
        return float(n) if leaf.simplex == ROWS else math.sqrt(n)

    def slope0(self, leaf: Leaf) -> float:
        return self.mass(leaf) / leaf.simplex_size

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        weights = self.primal(origin, leaf)
        # Least squares of link(O) on O in each slice, c/n where O is constant. O is centred first: differences of
        # large means would leave nothing of a small variance.
        o = self.centre(origin, leaf)
        variance = o.square().mean(leaf.simplex, keepdim=True)
        covariance = (o * weights).mean(leaf.simplex, keepdim=True)
        return weights, (covariance + EPS * self.slope0(leaf)) / (variance + EPS)
