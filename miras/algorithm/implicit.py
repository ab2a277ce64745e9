"""The step to the minimum itself instead of along the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.algorithm.base import LinearAlgorithm, Slots, check_rate
from miras.errors import UsageError
from miras.weights import Outer


@dataclass(frozen=True)
class Implicit(LinearAlgorithm):
    """W_t = argmin_W 1/2 ||W - W_{t-1}||^2 + eta_t L(W), steps of eta / (1 + eta ||k||^2) (arXiv 2407.14207).

    That closed form, Longhorn's, is exact for a matrix memory with the l_2 bias, and `Rule` refuses others. The
    published code of Longhorn replaces ||k||^2 k k^T by its diagonal, which is another step.

    Choose it where keys are not of norm 1 or eta may become large: a step never passes the value. With keys of norm 1
    it is `GradientDescent` with another parametrisation of eta.

    Args:
        rate: must be "none": the step size is what this algorithm is about.
    """

    law: ClassVar[tuple[str, ...]] = ("eta_t / (1 + eta_t |k_t|^2) {grad}",)

    rate: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        check_rate("Implicit", self.rate)
        if self.rate != "none":
            raise UsageError("Implicit: rate must be 'none'; the key's own norm sets the step.")

    def shrink(self, grad: Outer, gates: Mapping[str, Tensor]) -> Outer:
        """The gradient at the new weights, from the one at the old: over 1 + eta ||k||^2."""
        power = grad.right.square().sum(-1, keepdim=True)
        return grad._replace(left=grad.left / (1 + gates["eta"] * power))

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return gates["eta"] * grad, ()
