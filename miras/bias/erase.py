"""The generalised delta rule: what is erased is named apart from what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from miras.bias.base import Bias
from miras.errors import UsageError
from miras.gates import ALONG, ERASE, Gate


@dataclass(frozen=True)
class Erase(Bias):
    """grad = (W e_t) b_t^T - v_t k_t^T: removes along b_t what is stored at e_t (RWKV-7, arXiv 2503.14456, and Comba).

    `L2` is the case e = b = k. The transition W (I - eta e b^T) is diagonal plus low rank; with b other than e it is
    the gradient of no loss, so `loss` is that of the write, -<y, v>. For a matrix memory only: its keys are vectors
    that can be named.

    Choose it for RWKV-7 and Comba, or where the outer model shall learn what to remove apart from what to write. It
    needs a matrix memory, and `b` other than `e` gives up that a step lowers a loss.

    Args:
        along: "own", the layer gives b_t (RWKV-7, arXiv 2503.14456: b = a (.) e), or "key", b = k (Comba, arXiv
            2506.02475, whose prediction is W e).
        clip: must be False.
    """

    along: Literal["own", "key"] = "own"
    clip: bool = False

    def __post_init__(self) -> None:
        if self.along not in ("own", "key"):
            raise UsageError(f"Erase: along must be 'own' or 'key', got {self.along!r}.")
        if self.clip:
            raise UsageError("Erase: the gradient is no function of the error alone, so it cannot be clipped.")

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (ERASE, ALONG) if self.along == "own" else (ERASE,)

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -(y * v).sum(-1)

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -v.expand_as(y)
