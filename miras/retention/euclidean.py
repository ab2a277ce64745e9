"""Gates whose dual coordinates are the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from miras.gates import Gate
from miras.retention.base import EuclideanRetention, check_to


@dataclass(frozen=True)
class NoRetention(EuclideanRetention):
    """W_t = W_{t-1} - step_t: nothing is forgotten but by being overwritten (DeltaNet, linear attention)."""

    gates: ClassVar[tuple[Gate, ...]] = ()

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("NoRetention", self.to)


@dataclass(frozen=True)
class L2(EuclideanRetention):
    """W_t = alpha_t W_{t-1} - step_t, or with `to="initial"` W_t = W_0 + alpha_t (W_{t-1} - W_0) - step_t.

    The first is the paper's (arXiv 2504.13173 eq. 26, Titans' and Mamba2's gate). A normalised memory is invariant to
    the scale of its last matrix, so decay to zero raises its effective inner step without bound and the recurrence
    becomes chaotic within a few thousand tokens; decay to the learned initial memory does not.
    """

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("L2", self.to)
