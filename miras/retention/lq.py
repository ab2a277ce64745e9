"""Moneta's gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.errors import UsageError
from miras.retention.base import SlopedRetention, check_to
from miras.weights import Leaf

EPS = 1e-6


@dataclass(frozen=True)
class Lq(SlopedRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = A_t / ||A_t||_q^(q-2) (arXiv 2504.13173 eq. 24), per matrix and head.

    With m = mean |A/s|^q and s such that m = 1 in expectation for the initial memory (a change of unit only):

    * `link="paper"`: W = A / (m + eps)^((q-2)/q). As printed it has degree 3 - q in A: for q = 4 a smaller A gives
      larger weights, and it is singular at A = 0.
    * `link="mirror"`: W = A (A^2/s^2 + eps)^((q-2)/2) / (m + eps)^((q-2)/q), the mirror map of the regulariser with the
      element-wise power that the print lost; degree 1 in A.

    q = 2 is `L2` for both.

    Choose it for Moneta, or to study q. `link="paper"` is what was trained here; the corrected `"mirror"` cubes the
    entries of A at q = 4 and diverged in a wider model (`docs/log.md`).

    Args:
        q: exponent, greater than 1; the paper's Moneta has 4.
        link: "paper" or "mirror".
        to: "zero" or "initial".
    """

    singular_at_zero: ClassVar[bool] = True

    q: float = 4.0
    link: Literal["paper", "mirror"] = "paper"
    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        if not self.q > 1:
            raise UsageError(f"Lq: q must be greater than 1, got {self.q}.")
        if self.link not in ("paper", "mirror"):
            raise UsageError(f"Lq: link must be 'paper' or 'mirror', got {self.link!r}.")
        check_to("Lq", self.to)

    def slope0(self, leaf: Leaf) -> float:
        return 1.0

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return self.linearise(dual, leaf)[0]

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        factor = self._factor(origin, leaf)
        if self.link == "paper":
            return factor * origin, factor
        weights = factor * origin * ((origin / self.unit(leaf)).square() + EPS).pow((self.q - 2) / 2)
        # The secant: the multiple of O nearest to link(O).
        power = origin.square().sum((-2, -1), keepdim=True)
        return weights, ((origin * weights).sum((-2, -1), keepdim=True) + EPS) / (power + EPS)

    def _factor(self, dual: Tensor, leaf: Leaf) -> Tensor:
        # A power of the square is several times faster for q = 4; below 2 it has no derivative at 0.
        power = dual.square().pow(self.q / 2) if self.q >= 2 else dual.abs().pow(self.q)
        mean = power.mean((-2, -1), keepdim=True) / self.unit(leaf) ** self.q
        return (mean + EPS).pow((2 - self.q) / self.q)

    def unit(self, leaf: Leaf) -> float:
        """S = std (E|N(0,1)|^q)^(1/q)."""
        moment = 2 ** (self.q / 2) * math.gamma((self.q + 1) / 2) / math.sqrt(math.pi)
        return leaf.std * moment ** (1 / self.q)
