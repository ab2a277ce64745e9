"""Elastic nets: entries that are not repeated are forgotten altogether."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.retention.base import Retention, SlopedRetention, check_to, unit
from miras.weights import Leaf


def _check_gamma(name: str, gamma: float) -> None:
    if not gamma >= 0:
        raise UsageError(f"{name}: gamma must be at least 0, got {gamma}.")


@dataclass(frozen=True)
class ElasticNet(SlopedRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = S_gamma(A_t), S_g(a) = sign(a) max(0, |a| - g) (arXiv 2504.13173 eq. 23).

    The minimiser of 1/2 ||W - A||^2 + gamma ||W||_1: small entries of the dual are exactly zero in the weights, but
    remembered. The paper's arctan surrogate of S has no zeros and is not offered.

    Choose it where a single small write shall not be read until it is repeated: sparse weights, and still linear in the
    dual, so that it trains in parallel.

    Args:
        gamma: threshold over the initial standard deviation of the matrix' entries (over 1 where it starts at zero).
        to: "zero" or "initial".
    """

    singular_at_zero: ClassVar[bool] = True

    gamma: float = 0.05
    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        _check_gamma("ElasticNet", self.gamma)
        check_to("ElasticNet", self.to)

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return F.softshrink(dual, self.gamma * unit(leaf))

    def slope0(self, leaf: Leaf) -> float:
        return 1.0

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        return self.primal(origin, leaf), torch.ones_like(origin[..., :1, :1])


@dataclass(frozen=True)
class LocalElasticNet(Retention):
    """W_t = S_gamma(alpha_t W_{t-1} - step_t), S_g(a) = sign(a) max(0, |a| - g) (arXiv 2504.13173 eq. 22).

    A gradient step that both norms of W and the distance from W_{t-1} hold back; alpha_t is the paper's lambda. Every
    token takes gamma off every entry, and what is zero is forgotten: not linear in any dual, so that with a step a
    token only the token loop runs it. Carried as W/s, s the initial standard deviation of the matrix' entries (1 where
    it starts at zero).

    Choose it where what is not repeated shall be forgotten for good, on short sequences or with one step a chunk
    (`step_at="chunk"`), which alone is fast. With a deep memory keep gamma far below one over the length.

    Args:
        gamma: threshold over s. An entry that is never written vanishes within 1/gamma tokens or so, and a normalised
            memory that has lost most of its entries takes ever larger steps (see `L2`).
        to: "zero", to which the threshold draws.
    """

    singular_at_zero: ClassVar[bool] = True
    law: ClassVar[str] = "W_t = S_gamma(alpha_t W_{t-1} - {step})"

    gamma: float = 1e-3
    to: Literal["zero"] = "zero"

    def __post_init__(self) -> None:
        _check_gamma("LocalElasticNet", self.gamma)
        if self.to != "zero":
            raise UsageError(
                f"LocalElasticNet: to must be 'zero', got {self.to!r}: the threshold draws the weights to zero. "
                "Write ElasticNet(to='initial')."
            )

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return unit(leaf) * dual

    def retain(self, dual: Tensor, step: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return F.softshrink(gates["alpha"] * dual - step, self.gamma)

    def slope0(self, leaf: Leaf) -> float:
        return unit(leaf)
