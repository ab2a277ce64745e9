"""A bias and a retention gate of one's own: all that it takes. `own_rule.py` trains a model with them."""

from dataclasses import dataclass
from typing import Literal

import torch

from miras.bias import Bias
from miras.retention import SlopedRetention
from miras.retention.base import unit


@dataclass(frozen=True)
class Cauchy(Bias):
    """L = 1/2 sum_j log(1 + r_j^2): the further off a value is, the less it pulls, down to nothing."""

    clip: bool = False

    def loss(self, y, v, gates):
        return 0.5 * torch.log1p((y - v).square()).sum(-1)

    def grad(self, y, v, gates):
        r = y - v
        return r / (1 + r.square())


@dataclass(frozen=True)
class Bounded(SlopedRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = 3 s tanh(A_t / 3 s): no weight outgrows three times its first spread s."""

    to: Literal["zero", "initial"] = "initial"

    def primal(self, dual, leaf):
        return 3 * unit(leaf) * torch.tanh(dual / (3 * unit(leaf)))

    def slope0(self, leaf):
        return 1.0

    def linearise(self, origin, leaf):
        return self.primal(origin, leaf), torch.ones_like(origin[..., :1, :1])
