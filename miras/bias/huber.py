"""Huber losses: quadratic for ordinary tokens, linear for extreme ones (Yaad)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from miras.bias.base import SMALL, Bias
from miras.errors import UsageError
from miras.gates import DELTA, Gate

# sign(r) ~ r / sqrt(r^2 + eps) in the mixture.
EPS = 1e-6


@dataclass(frozen=True)
class Huber(Bias):
    """L = H(r), H(a) = a^2/2 where |a| <= delta_t, delta_t (|a| - delta_t/2) beyond (arXiv 2504.13173 eq. 13-16).

    Huber's loss of r = y - v with an input-dependent threshold delta_t, in three forms:

    * `form="coordinate"` (eq. 14): sum_j H(r_j); gradient min(max(r, -delta), delta). Continuous, delta may be per
      channel.
    * `form="norm"` (eq. 15): H(||r||); gradient r min(1, delta / ||r||), a clipping of each token's gradient.
    * `form="mixture"` (eq. 16, printed for Yaad): r where rms(r) <= delta, delta sign(r) beyond. The paper tests ||r||;
      taken on the root mean square, the step does not jump by sqrt(d) at the threshold. The sign needs a small eta, a
      sixty-fourth, as `L1` does.

    Choose it where some values are wrong or extreme: the gradient of an outlier stops growing at delta, and ordinary
    tokens are learned as with `L2` (`examples/stream.py` compares them). It is Yaad's bias.

    Args:
        form: "coordinate", "norm" or "mixture".
        clip: shorten each token's gradient to norm sqrt(d).
        delta: threshold that a freshly made layer starts with, in the units of values, which presets bring to 1.

    Raises:
        UsageError: another form, or a threshold that is not above 0.
    """

    form: Literal["coordinate", "norm", "mixture"] = "coordinate"
    clip: bool = False
    delta: float = DELTA.init

    def __post_init__(self) -> None:
        if self.form not in ("coordinate", "norm", "mixture"):
            raise UsageError(f"Huber: form must be 'coordinate', 'norm' or 'mixture', got {self.form!r}.")
        if not 0 < self.delta < math.inf:
            raise UsageError(f"Huber: delta must be a number above 0, got {self.delta!r}.")

    @property
    def eta_limit(self) -> float:
        """That of `L1` where there is a sign in the gradient."""
        return SMALL if self.form == "mixture" else 1.0

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (replace(DELTA, channel=self.form == "coordinate", init=self.delta),)

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r, delta = y - v, gates["delta"]
        if self.form == "coordinate":
            return _huber(r.abs(), delta).sum(-1)
        if self.form == "norm":
            return _huber(torch.linalg.vector_norm(r, dim=-1, keepdim=True), delta).squeeze(-1)
        extreme = delta * (r.square() + EPS).sqrt().sum(-1, keepdim=True)
        return torch.where(_ordinary(r, delta), 0.5 * r.square().sum(-1, keepdim=True), extreme).squeeze(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r, delta = y - v, gates["delta"]
        if self.form == "coordinate":
            return torch.clamp(r, -delta, delta)
        if self.form == "norm":
            # The squared norm is clamped from below, so that the derivative at r = 0 is finite.
            limit = delta.square()
            return r * (limit / torch.maximum(r.square().sum(-1, keepdim=True), limit)).sqrt()
        return torch.where(_ordinary(r, delta), r, delta * r * (r.square() + EPS).rsqrt())

    def extreme(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Share of the error's coordinates on the linear branch, [..., C]; 0 or 1 where the norm decides for all."""
        r, delta = y - v, gates["delta"]
        if self.form == "coordinate":
            beyond = r.abs() > delta
        elif self.form == "norm":
            beyond = torch.linalg.vector_norm(r, dim=-1, keepdim=True) > delta
        else:
            beyond = ~_ordinary(r, delta)
        return beyond.to(r.dtype).mean(-1)


def _huber(size: Tensor, delta: Tensor) -> Tensor:
    return torch.where(size <= delta, 0.5 * size.square(), delta * (size - 0.5 * delta))


def _ordinary(r: Tensor, delta: Tensor) -> Tensor:
    """Which tokens are on the quadratic branch of the mixture, [..., C, 1]."""
    return r.square().mean(-1, keepdim=True) <= delta.square()
