"""The deep memory of TTT-MLP, Titans, Moneta, Yaad and Memora."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.memory.base import Memory, Pullback
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weights, mv, tmv

NORM_EPS = 1e-5


class Activation(NamedTuple):
    """A function and its backward (gradient of the output, input) -> gradient of the input, one pass each."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(u: Tensor, a: Tensor) -> Tensor:
    """PyTorch has no derivative of its own `silu_backward`, so it is written out: s (1 + a (1 - s)), s = sigmoid(a)."""
    s = torch.sigmoid(a)
    return u * (s * (1 + a * (1 - s)))


# A backward must itself be differentiable, which the outer loop needs; that of gelu in PyTorch is.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, lambda u, a: torch.ops.aten.gelu_backward(u, a)),
    "silu": Activation(F.silu, _silu_backward),
}


@dataclass(frozen=True)
class MLP(Memory):
    """M(x) = x + LN(W1 gelu(W2 x)), the paper's memory (arXiv 2504.13173, section 5.4), in k layers.

    W1 is the outermost matrix, W_k reads the key. The scale and shift of LN are slow parameters. Initial entries have
    std 1 where a unit-norm key is read, so that pre-activations are of order 1, and 1/sqrt(h) behind a hidden layer.

    Args:
        layers: number of matrices k.
        expansion: hidden size over value size.
        activation: "gelu" or "silu".
        residual: add x.
        norm: apply LN.
    """

    layers: int = 2
    expansion: int = 4
    activation: Literal["gelu", "silu"] = "gelu"
    residual: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1 or self.expansion < 1:
            raise UsageError(f"MLP: layers and expansion must be at least 1, got {self.layers} and {self.expansion}.")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"MLP: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")

    @property
    def normalised(self) -> bool:
        return self.norm

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        if self.residual and d_k != d_v:
            raise UsageError(f"MLP: the residual needs d_k = d_v, got {d_k} and {d_v}; write MLP(residual=False).")
        hidden = self.expansion * d_v
        leaves = {}
        for i in range(1, self.layers + 1):
            first, last = i == self.layers, i == 1
            rows, cols = (d_v if last else hidden), (d_k if first else hidden)
            # Outer matrices carry model channels on the side that faces the stream, hidden units on the other.
            channel = COLUMNS if first else ROWS if last else None
            simplex = ROWS if channel == COLUMNS else COLUMNS
            power, std = (1.0, 1.0) if first else (float(hidden), 1 / math.sqrt(hidden))
            leaves[f"w{i}"] = Leaf(rows, cols, channel, simplex, power, std)
        return leaves

    def slow(self, d_k: int, d_v: int) -> dict[str, tuple[int, float]]:
        return {"norm_scale": (d_v, 1.0), "norm_shift": (d_v, 0.0)} if self.norm else {}

    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        act, h = ACTIVATIONS[self.activation], x
        for i in range(self.layers, 1, -1):
            h = act.forward(mv(weights[f"w{i}"], h))
        y = mv(weights["w1"], h)
        if self.norm:
            y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS) * _row(slow["norm_scale"]) + _row(slow["norm_shift"])
        return x + y if self.residual else y

    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        act, h = ACTIVATIONS[self.activation], x
        inputs, before = {self.layers: x}, {}
        for i in range(self.layers, 1, -1):
            before[i] = mv(weights[f"w{i}"], h)
            inputs[i - 1] = h = act.forward(before[i])
        y = z = mv(weights["w1"], h)
        norm_pullback = None
        if self.norm:
            y, norm_pullback = _layer_norm(z, _row(slow["norm_scale"]), _row(slow["norm_shift"]))

        def pullback(u: Tensor) -> dict[str, Outer]:
            u = u if norm_pullback is None else norm_pullback(u)
            factors = {}
            for i in range(1, self.layers + 1):
                factors[f"w{i}"] = Outer(u, inputs[i])
                if i < self.layers:
                    u = act.backward(tmv(weights[f"w{i}"], u), before[i + 1])
            return factors

        return (x + y if self.residual else y), pullback


def _row(slow: Tensor) -> Tensor:
    """A slow vector [..., H, d] against tokens [..., H, C, d]."""
    return slow.unsqueeze(-2)


def _layer_norm(z: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """LN with its pullback: dz = (du - mean du - n mean(du n)) / std, du = scale u, n the normalised z.

    Both are PyTorch's fused operators, whose derivatives PyTorch knows too.
    """
    shape = z.shape[-1:]
    n, mean, rstd = torch.native_layer_norm(z, shape, None, None, NORM_EPS)

    def pullback(u: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            u * scale, z, shape, mean, rstd, None, None, [True, False, False]
        )[0]

    return n * scale + shift, pullback
