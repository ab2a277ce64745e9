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
    """

    name: str
    low: float
    high: float
    init: float
    channel: bool
    meaning: str

    def squash(self, raw: Tensor) -> Tensor:
        """Map the real line onto the range, increasing: sigmoid on a bounded range, softplus on a half line."""
        if math.isinf(self.low):
            return self.high - F.softplus(-raw)
        if math.isinf(self.high):
            return self.low + F.softplus(raw)
        return self.low + (self.high - self.low) * torch.sigmoid(raw)

    def unsquash(self, value: float) -> float:
        """The raw number that `squash` maps to `value`."""
        if math.isinf(self.low):
            return -math.log(math.expm1(self.high - value))
        if math.isinf(self.high):
            return math.log(math.expm1(value - self.low))
        share = (value - self.low) / (self.high - self.low)
        return math.log(share / (1 - share))


ALPHA = Gate(
    "log_alpha", -math.inf, 0.0, -1 / 2048, True, "retention, log alpha_t <= 0: how much of the memory is kept"
)
ETA = Gate("eta", 0.0, 1.0, 0.25, True, "inner learning rate eta_t: how much of the surprise is written")
THETA = Gate("theta", 0.0, 1.0, 0.9, True, "momentum theta_t: how much of the past step is repeated")
DELTA = Gate("delta", 0.0, math.inf, 1.0, False, "Huber threshold delta_t: errors beyond it are extreme events")
