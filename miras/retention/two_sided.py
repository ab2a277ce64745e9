"""A decay on each side of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from miras.errors import UsageError
from miras.gates import ALPHA, BETA, Gate
from miras.retention.base import Retention
from miras.weights import Leaf


@dataclass(frozen=True)
class TwoSided(Retention):
    """W_t = (beta_t alpha_t^T) (.) W_{t-1} - step_t: alpha_t decays keys, beta_t values (DFW, arXiv 2210.04243).

    Decaying fast weights, a row of table 1 of arXiv 2504.13173. Keys are columns, values rows of a matrix memory.

    Choose it where channels of keys and of values shall be forgotten at rates of their own. It runs in parallel with
    `Dot` and gradient descent only, else token by token.

    Args:
        to: must be "zero".
    """

    gates: ClassVar[tuple[Gate, ...]] = (ALPHA, BETA)
    law: ClassVar[str] = "W_t = (beta_t alpha_t^T) (.) W_{t-1} - {step}"

    to: Literal["zero"] = "zero"

    def __post_init__(self) -> None:
        if self.to != "zero":
            raise UsageError(f"TwoSided: decays to zero only, got to={self.to!r}; write to='zero'.")

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return dual

    def slope0(self, leaf: Leaf) -> float:
        return 1.0

    def retain(self, dual: Tensor, step: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return gates["alpha"] * gates["beta"] * dual - step
