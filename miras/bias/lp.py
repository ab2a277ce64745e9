"""l_p losses: Moneta's p = 3, the value-less p = 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miras.bias.base import SMALL, Bias
from miras.errors import UsageError

# |x| = sqrt(x^2 + eps), the paper's remark 5.
EPS = 1e-6


def _check_form(name: str, form: str, sharpness: float) -> None:
    if form not in ("smooth", "paper"):
        raise UsageError(f"{name}: form must be 'smooth' or 'paper', got {form!r}.")
    if sharpness <= 0:
        raise UsageError(f"{name}: sharpness must be positive, got {sharpness}.")


def _slope(p: float, form: str, sharpness: float) -> float:
    """The gradient over the error, at an error of `SMALL`."""
    sign = math.tanh(sharpness * SMALL) if form == "paper" else 1.0
    return p * sign * SMALL ** (p - 2)


@dataclass(frozen=True)
class Lp(Bias):
    """L = sum_j (r_j^2 + eps)^(p/2), r = y - v (arXiv 2504.13173 eq. 10-11).

    `form="smooth"` is the gradient p r (r^2 + eps)^((p-2)/2) of that loss; `form="paper"` replaces the sign by
    tanh(sharpness r) and |r| by sqrt(r^2 + eps) separately, p tanh(a r) (r^2 + eps)^((p-1)/2), which is the gradient of
    no loss in closed form. The paper does not give its sharpness.

    Choose it for Moneta, or to study p: the paper's sweep over p from 1 to 4 (its figure 4) is best at 3 and worst at
    4. For p > 2 it amplifies errors instead of bounding them, and eta has to be smaller: a twelfth at p = 3.

    Args:
        p: exponent, at least 1. p > 2 amplifies large errors, so `clip` is on there.
        form: "smooth" or "paper".
        sharpness: a of tanh(a r) in the paper's form.
        clip: shorten each token's gradient to norm sqrt(d); None means p > 2.
    """

    p: float = 3.0
    form: Literal["smooth", "paper"] = "smooth"
    sharpness: float = 10.0
    clip: bool | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise UsageError(f"Lp: p must be at least 1, got {self.p}.")
        _check_form("Lp", self.form, self.sharpness)
        if self.clip is None:
            object.__setattr__(self, "clip", self.p > 2)

    @property
    def eta_limit(self) -> float:
        """One over the slope of the gradient, where that of l_2 is 1: for p > 2 the curvature p (p - 1) |r|^(p-2) at an
        error of 2, else the gradient over the error at one of 1/64.
        """
        steep = self.p * (self.p - 1) * 2 ** (self.p - 2) if self.p > 2 else _slope(self.p, self.form, self.sharpness)
        return 1 / max(1.0, steep)

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return ((y - v).square() + EPS).pow(self.p / 2).sum(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r = y - v
        size = r.square() + EPS
        if self.form == "paper":
            return self.p * torch.tanh(self.sharpness * r) * size.pow((self.p - 1) / 2)
        return self.p * r * size.pow((self.p - 2) / 2)


@dataclass(frozen=True)
class L1(Bias):
    """Value-less memory, L = sum_j sqrt(r_j^2 + eps): only the sign of the error is written (arXiv 2504.13173 eq. 12).

    Choose it where values have outliers of any size and their sign is enough: the step has the same size however small
    the error is, so with a constant eta the memory never settles on a value, and eta has to be small: a sixty-fourth at
    most, or a tenth in the paper's form.

    Args:
        form: "smooth", r / sqrt(r^2 + eps), or "paper", tanh(sharpness r).
        sharpness: a of the paper's form.
        clip: shorten each token's gradient to norm sqrt(d), which it never exceeds: without effect here.
    """

    form: Literal["smooth", "paper"] = "smooth"
    sharpness: float = 10.0
    clip: bool = False

    def __post_init__(self) -> None:
        _check_form("L1", self.form, self.sharpness)

    @property
    def eta_limit(self) -> float:
        """One over the gradient at an error of 1/64 over that error."""
        return 1 / max(1.0, _slope(1.0, self.form, self.sharpness))

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return ((y - v).square() + EPS).sqrt().sum(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r = y - v
        return torch.tanh(self.sharpness * r) if self.form == "paper" else r * (r.square() + EPS).rsqrt()
