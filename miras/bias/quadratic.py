"""The two losses of today's linear models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from miras.bias.base import Bias


@dataclass(frozen=True)
class Dot(Bias):
    """Dot product, L = -<y, v>: Hebbian learning, linear attention (arXiv 2504.13173 eq. 8).

    Choose it for speed, or as the baseline of what correcting errors is worth: the gradient does not look at the
    memory, so chunks change nothing for a matrix, but what is written twice counts twice.
    """

    clip: bool = False

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -(y * v).sum(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -v.expand_as(y)


@dataclass(frozen=True)
class L2(Bias):
    """Least squares, L = 1/2 ||y - v||^2: the delta rule (arXiv 2504.13173 eq. 9).

    Choose it first: what is stored is corrected instead of added to, and every closed form and most published models
    are made for it. The step grows with the error, so for values with outliers see `Huber`.
    """

    clip: bool = False

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (y - v).square().sum(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return y - v
