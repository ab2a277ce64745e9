"""Gates: the per-token numbers that the outer model sets and the inner learning obeys.

Axes declare them, the layer makes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """One gate of a rule.

    Attributes:
        name: key in the `gates` dict of `miras.run`.
        low: infimum of its range.
        high: supremum of its range.
        init: value that a freshly made layer gives it.
        channel: whether it may also be given per channel.
        meaning: one line for people.
        vector: it is a vector of the size of a key, not a number: always [B, T, H, d_k], and unbounded.
    """

    name: str
    low: float
    high: float
    init: float
    channel: bool
    meaning: str
    vector: bool = False

    def squash(self, raw: Tensor) -> Tensor:
        """Map the real line onto the range, increasing: sigmoid on a bounded range, softplus on a half line."""
        # torch.compile may have a symbol for an end of the range, which math.isinf does not take.
        if self.low == -math.inf:
            return self.high - F.softplus(-raw)
        if self.high == math.inf:
            return self.low + F.softplus(raw)
        return self.low + (self.high - self.low) * torch.sigmoid(raw)

    def unsquash(self, value: float) -> float:
        """The raw number that `squash` maps to `value`."""
        if self.low == -math.inf:
            return -math.log(math.expm1(self.high - value))
        if self.high == math.inf:
            return math.log(math.expm1(value - self.low))
        share = (value - self.low) / (self.high - self.low)
        return math.log(share / (1 - share))


def hole(name: str) -> float:
    """A gate's value where there is no token: one that keeps everything, so that no formula meets 0 / 0."""
    return 0.0 if name.startswith("log_") else 1.0


def silence(name: str) -> float:
    """The same for who goes through holes as through tokens: with eta 0 nothing is written either."""
    return 0.0 if name == "eta" else hole(name)


ALPHA = Gate(
    "log_alpha", -math.inf, 0.0, -1 / 2048, True, "retention, log alpha_t <= 0: how much of the memory is kept"
)
ETA = Gate("eta", 0.0, 1.0, 0.25, True, "inner learning rate eta_t: how much of the surprise is written")
BETA = Gate(
    "log_beta", -math.inf, 0.0, -1 / 2048, True, "retention of the values' side, log beta_t <= 0, where it has its own"
)
RHO = Gate("rho", 0.0, 1.0, 1.0, False, "read factor rho_t: how much of the running mini-batch is seen")
THETA = Gate("theta", 0.0, 1.0, 0.9, True, "momentum theta_t: how much of the past step is repeated")
DELTA = Gate("delta", 0.0, math.inf, 1.0, False, "Huber threshold delta_t: errors beyond it are extreme events")
GAMMA = Gate("gamma", 0.0, 1.0, 0.5, False, "weight gamma_t of a token while it is in the window")
ERASE = Gate("erase", -math.inf, math.inf, 0.0, True, "erase key e_t: where the memory is asked what to remove", True)
ALONG = Gate("along", -math.inf, math.inf, 0.0, True, "key b_t along which that is removed", True)
SHIFT = Gate("shift", 0.0, math.inf, 0.5, False, "shift Delta_t: how far off a value may be, in the worst case")
