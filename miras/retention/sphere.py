"""Weights of fixed norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.retention.base import EPS, SlopedRetention, check_to
from miras.weights import COLUMNS, ROWS, Leaf


@dataclass(frozen=True)
class Sphere(SlopedRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = A_t with each row scaled to norm r (as in LaCT, arXiv 2505.23884).

    W = A / sqrt(mean A^2 / s^2 + eps), the mean over a row and s the initial standard deviation of the matrix' entries,
    so that r = s sqrt(columns) is the norm that rows begin with. Only directions are read: a step turns a row by its
    size relative to that row of A. Lattice (arXiv 2504.05646) steps orthogonally to the row, then renormalises it.

    Choose it where norms must not drift over long sequences, as in LaCT; what the norm of a row could say is lost.

    Args:
        to: "zero" (directions stay, and later steps turn them more) or "initial".
    """

    singular_at_zero: ClassVar[bool] = True

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("Sphere", self.to)

    def slope0(self, leaf: Leaf) -> float:
        return 1.0

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return self.linearise(dual, leaf)[0]

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        # A vector memory is one column: its only row, transposed. Rows of one entry could but change their sign.
        axis = COLUMNS if leaf.cols > 1 else ROWS
        factor = (origin.square().mean(axis, keepdim=True) / leaf.std**2 + EPS).rsqrt()
        return factor * origin, factor
