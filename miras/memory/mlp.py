"""The deep memory of TTT-MLP, Titans, Moneta, Yaad and Memora."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.memory.activation import ACTIVATIONS
from miras.memory.base import Pullback
from miras.memory.deep import Deep
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weight, Weights, mv, tmv


@dataclass(frozen=True)
class MLP(Deep):
    """M(x) = x + LN(W1 gelu(W2 x)) in k layers, the paper's memory (arXiv 2504.13173, section 5.4); bare it is Mneme's.

    W1 is the outermost matrix, W_k reads the key. The scale and shift of LN are slow parameters. Initial entries have
    std 1 where a unit-norm key is read, so that pre-activations are of order 1, and 1/sqrt(h) behind a hidden layer,
    W1's times `spread`: LN divides by the size of what W1 gives, so that a small W1 learns much from a small eta.

    Choose it where quality counts for more than speed: it is the memory of the paper's three models and of Titans. It
    wants `rate="input"` and decay to the initial memory, and on a CPU it trains more slowly than attention at short
    context (`docs/performance.md`). Bare, without the residual connection and LN, it recalls more of what it has read,
    and needs values of half the size or chunks of one token (`docs/choices.md`).

    Args:
        layers: number of matrices k.
        expansion: hidden size over value size.
        activation: "gelu", "gelu_tanh" (its approximation by tanh, TTT's) or "silu".
        residual: add x.
        norm: apply LN.
        eps: what LN adds to the variance. For a key at which all hidden units are silent LN is of next to nothing, and
            nothing else bounds its derivative 1 / sqrt(variance + eps).
        spread: size of the initial W1.
        bias: every matrix has a last column that a constant 1 is the input of, a bias that is learned with the rest.
    """

    layers: int = 2
    expansion: int = 4
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    residual: bool = True
    norm: bool = True
    eps: float = 1e-5
    spread: float = 1.0
    bias: bool = False

    def __post_init__(self) -> None:
        if self.layers < 1 or self.expansion < 1:
            raise UsageError(f"MLP: layers and expansion must be at least 1, got {self.layers} and {self.expansion}.")
        if not self.eps > 0:
            raise UsageError(f"MLP: eps must be more than 0, got {self.eps}.")
        if not 0 < self.spread <= 1:
            raise UsageError(f"MLP: spread must be more than 0 and at most 1, got {self.spread}.")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"MLP: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        self.check_residual(d_k, d_v)
        hidden = self.expansion * d_v
        leaves = {}
        for i in range(1, self.layers + 1):
            first, last = i == self.layers, i == 1
            rows, cols = (d_v if last else hidden), (d_k if first else hidden) + self.bias
            # Outer matrices carry model channels on the side that faces the stream, hidden units on the other. Columns
            # with one for a bias are no channels.
            if first and not self.bias:
                channel, simplex = COLUMNS, ROWS
            elif last:
                channel, simplex = ROWS, COLUMNS
            else:
                channel, simplex = None, ROWS if first else COLUMNS
            # A unit-norm key or hidden units of order 1, and the 1. A bias is drawn as one more weight: it is where
            # learning starts from, the variance of the sum stays 1, and random offsets tell hidden units apart.
            power = (1.0 if first else float(hidden)) + self.bias
            std = (self.spread if last else 1.0) / math.sqrt(power)
            leaves[f"w{i}"] = Leaf(rows, cols, channel, simplex, power, std)
        return leaves

    def core(self, weights: Weights, x: Tensor) -> Tensor:
        act, h = ACTIVATIONS[self.activation], self._input(x)
        for i in range(self.layers, 1, -1):
            h = self._input(act.forward(mv(weights[f"w{i}"], h)))
        return mv(weights["w1"], h)

    def core_vjp(self, weights: Weights, x: Tensor) -> tuple[Tensor, Pullback]:
        act, h = ACTIVATIONS[self.activation], self._input(x)
        inputs, before = {self.layers: h}, {}
        for i in range(self.layers, 1, -1):
            before[i] = mv(weights[f"w{i}"], h)
            inputs[i - 1] = h = self._input(act.forward(before[i]))

        def pullback(u: Tensor) -> dict[str, Outer]:
            factors = {}
            for i in range(1, self.layers + 1):
                factors[f"w{i}"] = Outer(u, inputs[i])
                if i < self.layers:
                    u = self._through(weights[f"w{i}"], u, before[i + 1])
            return factors

        return mv(weights["w1"], h), pullback

    def _through(self, weight: Weight, u: Tensor, a: Tensor) -> Tensor:
        """Back through one layer; a bias has no input that it could be passed to."""
        act = ACTIVATIONS[self.activation]
        if not self.bias:
            return act.through(weight, u, a)
        if isinstance(weight, Tensor):
            return act.through(weight[..., :-1], u, a)
        return act.backward(tmv(weight, u)[..., :-1], a)

    def _input(self, x: Tensor) -> Tensor:
        """What a matrix is multiplied by: x, with the coordinate 1 behind it where there are biases."""
        return F.pad(x, (0, 1), value=1.0) if self.bias else x
