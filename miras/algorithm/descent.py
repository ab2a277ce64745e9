"""First-order algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.algorithm.base import LinearAlgorithm, Slots, check_rate
from miras.errors import UsageError
from miras.gates import ETA, THETA, Gate


@dataclass(frozen=True)
class GradientDescent(LinearAlgorithm):
    """step_t = eta_t grad_t (arXiv 2504.13173 eq. 5), the algorithm of Moneta, Yaad and Memora.

    Choose it first: no state of its own, and every engine knows it. Take `rate="input"` with a deep memory, and several
    steps where a token shall do more than one change to the memory.

    Args:
        rate: "none" or "input", see `Algorithm`.
        steps: n steps a token, each with its own key, value and eta (DeltaProduct, arXiv 2502.10297): k, v and eta have
            n T tokens where q has T; decay acts before the first step, the read comes after the last. The rule's chunk
            counts steps.
    """

    rate: Literal["none", "input"] = "none"
    steps: int = 1

    def __post_init__(self) -> None:
        check_rate("GradientDescent", self.rate)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UsageError(f"GradientDescent: steps must be a whole number, at least 1, got {self.steps!r}.")

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return gates["eta"] * grad, ()


@dataclass(frozen=True)
class Momentum(LinearAlgorithm):
    """S_t = theta_t S_{t-1} + eta_t grad_t, step_t = S_t: past and momentary surprise (Titans, arXiv 2501.00663).

    Choose it where what surprises should colour the tokens after it as well: Titans' algorithm. It costs one more copy
    of the memory in the state, and a large theta makes a repeated key overshoot: a gradient that stays is stepped by
    eta / (1 - theta) in the end, ten times eta at the theta that layers start with. So eta ranges to an eighth. With
    `Huber` and `KL` outer gradients grow nonetheless at 2,048 tokens (`docs/log.md`).

    Args:
        rate: "none" or "input", see `Algorithm`.
    """

    gates: ClassVar[tuple[Gate, ...]] = (ETA, THETA)
    law: ClassVar[tuple[str, ...]] = ("S_t", "S_t = theta_t S_{t-1} + eta_t {grad}")
    slots: ClassVar[int] = 1
    eta_limit: ClassVar[float] = 0.125

    rate: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        check_rate("Momentum", self.rate)

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        surprise = gates["theta"] * slots[0] + gates["eta"] * grad
        return surprise, (surprise,)
