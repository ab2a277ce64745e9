"""The loss that expects values to shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from miras.bias.base import Bias
from miras.gates import SHIFT, Gate

# ||r|| = sqrt(||r||^2 + eps), where values have a norm of about sqrt(d). The curvature at r = 0, where a memory is that
# has learned its values, is Delta / sqrt(eps): with the eps of 1e-6 of other losses 1000 Delta.
EPS = 1e-2


@dataclass(frozen=True)
class Robust(Bias):
    """L = max_{||dv|| <= Delta_t} 1/2 ||r - dv||^2 = 1/2 (||r|| + Delta_t)^2, r = y - v (arXiv 2504.13173 eq. 17).

    Least squares against the worst value within Delta_t of the one seen (arXiv 2504.13173 eq. 17). The gradient is
    r + Delta_t r / ||r||, with ||r|| smoothed at 0, where the paper's has no derivative.

    Choose it where every value may be off by about the same known amount, in an unknown direction. Against single
    outliers choose `Huber`: here the step grows with the error, and is larger than that of `L2`.

    Args:
        clip: shorten each token's gradient to norm sqrt(d).
    """

    gates: ClassVar[tuple[Gate, ...]] = (SHIFT,)

    clip: bool = False

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        square, shift = (y - v).square().sum(-1), gates["shift"].squeeze(-1)
        return 0.5 * square + shift * (square + EPS).sqrt() + 0.5 * shift.square()

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r = y - v
        return r + gates["shift"] * r * (r.square().sum(-1, keepdim=True) + EPS).rsqrt()
