"""Test-time training by mini-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.algorithm.base import LinearAlgorithm, Slots, check_rate
from miras.gates import ETA, RHO, Gate


@dataclass(frozen=True)
class MiniBatch(LinearAlgorithm):
    """W_t = W_0 - rho_t sum_{s <= t in the chunk} eta_s grad_s: mini-batch gradient descent (TTT, arXiv 2407.04620).

    The read factor rho_t belongs to the reading token: TTT's learned 1 / (j + 1) for the j-th of a mini-batch. With
    rho = 1 it is `GradientDescent`. As steps: S_t = S_{t-1} + eta_t grad_t, step_t = rho_t S_t - rho_{t-1} S_{t-1},
    S = 0 where a chunk begins.

    Choose it for TTT-Linear and TTT-MLP, or where a token shall see only part of what its running chunk has learned;
    otherwise `GradientDescent` does the same with less state.

    Args:
        rate: "none" or "input", see `Algorithm`.
    """

    gates: ClassVar[tuple[Gate, ...]] = (ETA, RHO)
    law: ClassVar[tuple[str, ...]] = ("(rho_t S_t - rho_{t-1} S_{t-1})", "S_t = sum_{s <= t in chunk} eta_s {grad}")
    slots: ClassVar[int] = 2
    resets: ClassVar[bool] = True

    rate: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        check_rate("MiniBatch", self.rate)

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        total = slots[0] + gates["eta"] * grad
        seen = gates["rho"] * total
        return seen - slots[1], (total, seen)
