"""Gates whose dual coordinates are the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from miras.gates import Gate
from miras.retention.base import EuclideanRetention, check_to


@dataclass(frozen=True)
class NoRetention(EuclideanRetention):
    """W_t = W_{t-1} - step_t: nothing is forgotten but by being overwritten (DeltaNet; arXiv 2504.13173 eq. 5).

    Choose it for sequences in which nothing becomes outdated, and as the negative control: removing retention costs the
    paper's Yaad more than any other part (its table 4).
    """

    gates: ClassVar[tuple[Gate, ...]] = ()

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("NoRetention", self.to)


@dataclass(frozen=True)
class L2(EuclideanRetention):
    """W_t = alpha_t W_{t-1} - step_t, or W_0 + alpha_t (W_{t-1} - W_0) - step_t (arXiv 2504.13173 eq. 26).

    The first is the paper's (Titans' and Mamba2's gate), the second `to="initial"`. A normalised memory is invariant to
    the scale of its last matrix, so decay to zero raises its effective inner step without bound and the recurrence
    becomes chaotic within a few thousand tokens; decay to the learned initial memory does not.

    Choose it first: its link is the identity, so every engine takes it and no weights need to be written out. With a
    normalised deep memory choose `to="initial"`, with a matrix either.
    """

    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        check_to("L2", self.to)
