"""Memora's gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.retention.base import SimplexRetention, check_to, mass
from miras.weights import Leaf


@dataclass(frozen=True)
class KL(SimplexRetention):
    """W_t = c softmax(alpha_t log W_{t-1} - step_t) along the simplex axis (arXiv 2504.13173 eq. 21 and 27).

    Eq. 21 minimises a KL divergence from W_{t-1} plus the Shannon entropy of W, which is what makes its 1 - lambda_t,
    here alpha_t, less than 1. Carried as A_t = alpha_t A_{t-1} - step_t, W_t = c softmax(A_t), which is the same
    wherever alpha_t is constant along that axis: no logarithm, no lag token, and the state cannot leave the simplex.
    The paper gives neither axis nor mass c: the axis is the hidden one (so that channel gates are constant along it),
    and c is its size n for the matrix that reads keys and sqrt(n) for the others, so that entries start at order 1 and
    1/sqrt(n).

    Choose it where weights shall stay positive and bounded whatever is written: Memora's gate. Its range of eta is an
    eighth of that of `L2`, and in the runs of `docs/log.md` Memora learned more slowly than Yaad and Moneta.

    Args:
        to: "zero" (the uniform simplex) or "initial".
    """

    # Steps multiply: an entry is stepped in proportion to its size. The recurrence is chaotic at an eta of 1/2, and at
    # 1/4 single outer gradients are large.
    eta_limit: ClassVar[float] = 0.125

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("KL", self.to)

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return mass(leaf) * dual.softmax(leaf.simplex)

    def slope0(self, leaf: Leaf) -> float:
        return mass(leaf) / leaf.simplex_size
