"""Steps with all singular values near 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miras.algorithm.base import Algorithm, Slots, check_rate
from miras.errors import UsageError
from miras.gates import ETA, THETA, Gate

# Added to the Frobenius norm: a zero gradient gives a zero step.
EPS = 1e-7
# (a, b, c) of each iteration X <- a X + (b X X^T + c (X X^T)^2) X. The first is Keller Jordan's, five times the same;
# the second is what LaCT publishes.
SCHEDULES = {
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "lact": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


@dataclass(frozen=True)
class Muon(Algorithm):
    """step_t = eta_t NS(S_t), S_t = theta_t S_{t-1} + grad_t, NS = five Newton-Schulz iterations (arXiv 2505.23735).

    NS moves all singular values of a matrix near 1 (Atlas, section 5; LaCT, arXiv 2505.23884). Where the rule steps
    once a chunk, each gradient has its own eta before the sum, and the step none.

    Choose it with one step for a large chunk (`step_at="chunk"`, LaCT); with a step a token only the token loop runs
    it. All directions are written alike, noise included: Atlas' own ablation has the lower perplexity without it.

    Args:
        momentum: with theta; without, S_t = grad_t.
        schedule: coefficients of the iterations, "muon" or "lact".
        rate: must be "none": NS does not feel the size of a gradient.
    """

    momentum: bool = True
    schedule: Literal["muon", "lact"] = "muon"
    rate: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        check_rate("Muon", self.rate)
        if self.rate != "none":
            raise UsageError("Muon: rate must be 'none'; an orthogonalised step does not feel the size of a gradient.")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"Muon: schedule must be 'muon' or 'lact', got {self.schedule!r}.")

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (ETA, THETA) if self.momentum else (ETA,)

    @property
    def slots(self) -> int:
        return int(self.momentum)

    @property
    def law(self) -> tuple[str, ...]:
        return ("eta_t NS(S_t)", "S_t = theta_t S_{t-1} + {grad}") if self.momentum else ("eta_t NS({grad})",)

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        total = gates["theta"] * slots[0] + grad if self.momentum else grad
        return gates["eta"] * orthogonalise(total, self.schedule), (total,) if self.momentum else ()


def orthogonalise(matrix: Tensor, schedule: str) -> Tensor:
    """NS(S), [..., o, i]."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    with torch.autocast(matrix.device.type, enabled=False):
        # The square root has no derivative at zero; its tiny addend is below any norm's rounding.
        norm = (wide.square().sum((-2, -1), keepdim=True) + 1e-30).sqrt() + EPS
        x = wide / norm
        for a, b, c in SCHEDULES[schedule]:
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x
