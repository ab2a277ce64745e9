"""The element-wise parts of a layer as operators of PyTorch: `miras::short_conv`, `miras::gated_norm` and their ways
back. What they compute is said in `miras.pointwise`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from miras.engines.native.build import REAL, fits, library, missing
from miras.engines.native.scan import point

# Tokens of a sequence, or rows, that a program has.
SEGMENT = 128


def runs(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels compute there, in a dtype, for heads of this size."""
    return device.type == "cpu" and dtype in REAL and fits(size) and missing(dtype) is None


def _fields(sizes: str, numbers: str, tensors: str) -> Any:
    """Sizes, numbers and pointers: in the order of pointwise.h."""
    return (
        *((name, ctypes.c_int64) for name in (*sizes.split(), "segment", "threads")),
        *((name, ctypes.c_double) for name in numbers.split()),
        *((name, ctypes.c_void_p) for name in tensors.split()),
    )


class ConvolutionCall(ctypes.Structure):
    """`ConvolutionCall` of pointwise.h."""

    _fields_ = _fields(
        "sequences heads tokens d past unit", "eps rest", "before x weight from_y y to_before to_x to_weight"
    )


class GatedNormCall(ctypes.Structure):
    """`GatedNormCall` of pointwise.h."""

    _fields_ = _fields("rows d", "eps", "x weight gate from_y y to_x to_weight to_gate")


def _convolution(unit: int, size: int, rest: float, eps: float, **tensors: Tensor) -> Any:
    rows, tokens, channels = tensors["x"].shape
    sizes = (rows, channels // size, tokens, size, tensors["before"].shape[1], unit // size)
    return ctypes.byref(point(ConvolutionCall(*sizes, SEGMENT, torch.get_num_threads(), eps, rest), tensors))


def _norm(eps: float, **tensors: Tensor) -> Any:
    size = tensors["weight"].numel()
    sizes = (tensors["x"].numel() // size, size)
    return ctypes.byref(point(GatedNormCall(*sizes, SEGMENT, torch.get_num_threads(), eps), tensors))


@torch.library.custom_op("miras::short_conv", mutates_args=(), device_types="cpu")
def short_conv(before: Tensor, x: Tensor, weight: Tensor, unit: int, size: int, rest: float, eps: float) -> Tensor:
    """silu of the causal convolution of x [N, T, C] after the J inputs before, [N, J, C], by weight [J + 1, C]; the
    first `unit` channels over the norm of their heads of `size` channels, or `eps` if that is more; the others alike,
    times `rest`, if that is not 0.
    """
    before, x, weight = before.contiguous(), x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    library(x.dtype).conv_forwards(_convolution(unit, size, rest, eps, before=before, x=x, weight=weight, y=y))
    return y


@torch.library.custom_op("miras::short_conv_backward", mutates_args=(), device_types="cpu")
def short_conv_backward(
    from_y: Tensor, before: Tensor, x: Tensor, weight: Tensor, unit: int, size: int, rest: float, eps: float
) -> list[Tensor]:
    """The cotangents of before, x and weight."""
    given = {"before": before, "x": x, "weight": weight, "from_y": from_y}
    given = {name: tensor.contiguous() for name, tensor in given.items()}
    to_before, to_x = torch.empty_like(given["before"]), torch.empty_like(given["x"])
    to_weight = x.new_empty(x.shape[0] * -(-x.shape[1] // SEGMENT), *weight.shape)
    made = {"to_before": to_before, "to_x": to_x, "to_weight": to_weight}
    library(x.dtype).conv_backwards(_convolution(unit, size, rest, eps, **given, **made))
    return [to_before, to_x, to_weight.sum(0)]


@torch.library.custom_op("miras::gated_norm", mutates_args=(), device_types="cpu")
def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """weight (.) x / rms(x) (.) silu(gate) for x and gate [..., d], weight [d]."""
    x, weight, gate = x.contiguous(), weight.contiguous(), gate.contiguous()
    y = torch.empty_like(x)
    library(x.dtype).norm_forwards(_norm(eps, x=x, weight=weight, gate=gate, y=y))
    return y


@torch.library.custom_op("miras::gated_norm_backward", mutates_args=(), device_types="cpu")
def gated_norm_backward(from_y: Tensor, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> list[Tensor]:
    """The cotangents of x, weight and gate."""
    given = {"x": x, "weight": weight, "gate": gate, "from_y": from_y}
    given = {name: tensor.contiguous() for name, tensor in given.items()}
    to_x, to_gate = torch.empty_like(given["x"]), torch.empty_like(given["gate"])
    to_weight = x.new_empty(-(-x.shape[:-1].numel() // SEGMENT), *weight.shape)
    made = {"to_x": to_x, "to_weight": to_weight, "to_gate": to_gate}
    library(x.dtype).norm_backwards(_norm(eps, **given, **made))
    return [to_x, to_weight.sum(0), to_gate]


@short_conv.register_fake
def _(before: Any, x: Any, *_: Any) -> Any:
    return x.new_empty(x.shape)


@short_conv_backward.register_fake
def _(from_y: Any, *rest: Any) -> Any:
    return [x.new_empty(x.shape) for x in rest[:3]]


@gated_norm.register_fake
def _(x: Any, *_: Any) -> Any:
    return x.new_empty(x.shape)


@gated_norm_backward.register_fake
def _(from_y: Any, *rest: Any) -> Any:
    return [x.new_empty(x.shape) for x in rest[:3]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.numbers = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors)


def _back(backward: Any, ctx: Any, from_y: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(from_y, *ctx.saved_tensors, *ctx.numbers), *(None for _ in ctx.numbers)


short_conv.register_autograd(
    lambda ctx, from_y: _back(torch.ops.miras.short_conv_backward, ctx, from_y), setup_context=_save
)
gated_norm.register_autograd(
    lambda ctx, from_y: _back(torch.ops.miras.gated_norm_backward, ctx, from_y), setup_context=_save
)
