"""The gated deep memory of LaCT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from miras.errors import UsageError
from miras.memory.activation import ACTIVATIONS
from miras.memory.base import Pullback
from miras.memory.deep import Deep
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weights, mv, tmv


@dataclass(frozen=True)
class SwiGLU(Deep):
    """M(x) = x + LN(W1 (silu(W3 x) (.) W2 x)), a gated MLP; bare it is the memory of LaCT (arXiv 2505.23884).

    Initial entries are those of `MLP`.

    Choose it for LaCT, or as the gated alternative to `MLP` with 6 d^2 instead of 8 d^2 weights by default; which of
    the two learns better has not been measured here.

    Args:
        expansion: hidden size over value size.
        residual: add x; not in LaCT.
        norm: apply LN; not in LaCT.
    """

    activation: ClassVar[str] = "silu"
    eps: ClassVar[float] = 1e-5

    expansion: int = 2
    residual: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        if self.expansion < 1:
            raise UsageError(f"SwiGLU: expansion must be at least 1, got {self.expansion}.")

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        self.check_residual(d_k, d_v)
        hidden = self.expansion * d_v
        reading = Leaf(hidden, d_k, COLUMNS, ROWS, power=1.0, std=1.0)
        writing = Leaf(d_v, hidden, ROWS, COLUMNS, power=float(hidden), std=1 / math.sqrt(hidden))
        return {"w1": writing, "w2": reading, "w3": reading}

    def core(self, weights: Weights, x: Tensor) -> Tensor:
        gate = ACTIVATIONS[self.activation].forward(mv(weights["w3"], x))
        return mv(weights["w1"], gate * mv(weights["w2"], x))

    def core_vjp(self, weights: Weights, x: Tensor) -> tuple[Tensor, Pullback]:
        act, a, b = ACTIVATIONS[self.activation], mv(weights["w3"], x), mv(weights["w2"], x)
        gate = act.forward(a)
        h = gate * b

        def pullback(u: Tensor) -> dict[str, Outer]:
            dh = tmv(weights["w1"], u)
            return {"w1": Outer(u, h), "w2": Outer(dh * gate, x), "w3": Outer(act.backward(dh * b, a), x)}

        return mv(weights["w1"], h), pullback
