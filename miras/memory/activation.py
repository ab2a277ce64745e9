"""Activations with their derivatives, and the way back through a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from miras.products import Cast, matmul
from miras.weights import Weight, tmv

DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)


class Activation(NamedTuple):
    """An activation s(a).

    Attributes:
        forward: s(a).
        backward: (u, a) -> u s'(a).
        curvature: s''(a), a tensor of its own; None: left to autograd.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor] | None = None

    def through(self, weight: Weight, u: Tensor, a: Tensor) -> Tensor:
        """The way back through a layer W s(a): s'(a) (.) W^T u."""
        if self.curvature is None or not isinstance(weight, Tensor) or weight.dim() != u.dim():
            return self.backward(tmv(weight, u), a)
        found = _Through.apply(u, weight, a, self)
        assert isinstance(found, Tensor)
        return found


class _Through(torch.autograd.Function):
    """`Activation.through` with its derivative written out.

    Autograd keeps every intermediate of it, in memory that is new each time; on a CPU that costs more than computing
    the product again, and the derivative of a derivative takes it twice as many passes.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, a: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(u, weight, a)
        ctx.activation = activation
        ctx.cast = Cast.now(u.device.type)
        return activation.backward(matmul(u, weight), a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        u, weight, a = ctx.saved_tensors
        with ctx.cast.again():
            inner = ctx.activation.backward(grad, a)
            grad_a = ctx.activation.curvature(a).mul_(grad).mul_(matmul(u, weight))
            grad_weight = matmul(u.mT, inner) if ctx.needs_input_grad[1] else None  # of first order it is a constant
            return matmul(inner, weight.mT), grad_weight, grad_a, None


def _gelu(approximate: Literal["none", "tanh"], curvature: Callable[[Tensor], Tensor] | None = None) -> Activation:
    backward = partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return Activation(partial(F.gelu, approximate=approximate), backward, curvature)


def _gelu_curvature(a: Tensor) -> Tensor:
    """phi(a) (2 - a^2), phi the normal density."""
    square = a.square()
    density = torch.exp(square * -0.5)
    return square.neg_().add_(2).mul_(density).mul_(DENSITY_AT_0)


def _silu_backward(u: Tensor, a: Tensor) -> Tensor:
    """PyTorch has no derivative of its own `silu_backward`, so it is written out: s (1 + a (1 - s)), s = sigmoid(a)."""
    s = torch.sigmoid(a)
    return u * (s * (1 + a * (1 - s)))


def _silu_curvature(a: Tensor) -> Tensor:
    """s (1 - s) (2 + a (1 - 2 s)), s = sigmoid(a)."""
    s = torch.sigmoid(a)
    return (1 - 2 * s).mul_(a).add_(2).mul_(1 - s).mul_(s)


# A backward must itself be differentiable, which the outer loop needs; that of gelu in PyTorch is.
ACTIVATIONS = {
    "gelu": _gelu("none", _gelu_curvature),
    "gelu_tanh": _gelu("tanh"),
    "silu": Activation(F.silu, _silu_backward, _silu_curvature),
}
