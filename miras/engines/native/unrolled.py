"""The coefficients of chunks as an operator of PyTorch: `miras::unrolled` and its way back."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from miras.engines.native.build import library
from miras.engines.native.scan import point


class UnrolledCall(ctypes.Structure):
    """`UnrolledCall` of unrolled.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("chunks", "tokens", "slots", "before", "threads")),
        *((name, ctypes.c_void_p) for name in ("steps", "from_read", "from_write", "read", "write", "to_steps")),
    )


def _call(before: bool, **tensors: Tensor) -> Any:
    chunks, heads, tokens, copies, _ = tensors["steps"].shape
    sizes = (chunks * heads, tokens, copies - 1, before, torch.get_num_threads())
    return ctypes.byref(point(UnrolledCall(*sizes), tensors))


@torch.library.custom_op("miras::unrolled", mutates_args=(), device_types="cpu")
def unrolled(steps: Tensor, before: bool) -> list[Tensor]:
    """The map from (dual, slots, grad_1 .. grad_C) of a chunk to what its tokens read with and to what it leaves.

    Args:
        steps: what each token makes of them, [M, H, C, 1 + S, 2 + S]; see `unroll.steps`.
        before: tokens read with what they find, not with what they leave.

    Returns:
        The rows of the dual for each token [M, H, C, 1 + S + C], and of dual and slots at the end
        [M, H, 1 + S, 1 + S + C].
    """
    steps = steps.contiguous()
    read, write = _empty(steps)
    library(steps.dtype).unrolled_forwards(_call(before, steps=steps, read=read, write=write))
    return [read, write]


@unrolled.register_fake
def _empty(steps: Any, *_: Any) -> Any:
    chunks, heads, tokens, copies, _ = steps.shape
    return [steps.new_empty(chunks, heads, rows, copies + tokens) for rows in (tokens, copies)]


@torch.library.custom_op("miras::unrolled_backward", mutates_args=(), device_types="cpu")
def unrolled_backward(from_read: Tensor, from_write: Tensor, steps: Tensor, before: bool) -> Tensor:
    """The cotangent of the steps."""
    given = {"from_read": from_read.contiguous(), "from_write": from_write.contiguous(), "steps": steps.contiguous()}
    to_steps = torch.empty_like(given["steps"])
    library(steps.dtype).unrolled_backwards(_call(before, **given, to_steps=to_steps))
    return to_steps


@unrolled_backward.register_fake
def _(from_read: Any, from_write: Any, steps: Any, before: Any) -> Any:
    return torch.empty_like(steps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    steps, ctx.before = inputs
    ctx.save_for_backward(steps)


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Tensor, None]:
    (steps,) = ctx.saved_tensors
    return torch.ops.miras.unrolled_backward(*cotangents, steps, ctx.before), None


unrolled.register_autograd(_backward, setup_context=_save)
