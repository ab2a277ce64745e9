"""NumPy loops of one sequence and one head as functions of torch tensors with batch and heads, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import autograd.numpy as np
import torch
from autograd.core import make_vjp
from oracles.numpy_loops import TOKENS
from torch import Tensor
from torch.autograd.function import once_differentiable


def oracle(loop: Callable) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The loop as `call(inputs, **constants) -> (y, memory)`.

    inputs {name: float64 tensor}: tokens' tensors [B, T, H, n]; initial memories [B, H, o, i], or [H, o, i] for all
    rows; vectors of a head [H, n]. y is [B, T, H, d_v], each tensor of the memory [B, H, o, i].
    """

    def call(inputs: dict[str, Tensor], **constants) -> tuple[Tensor, dict[str, Tensor]]:
        batch, _, heads, _ = inputs["q"].shape
        function = partial(loop, **constants)
        rows = [[_row(function, inputs, b, h) for h in range(heads)] for b in range(batch)]
        y = torch.stack([torch.stack([y for y, _ in row], 1) for row in rows])
        memory = {n: torch.stack([torch.stack([m[n] for _, m in row]) for row in rows]) for n in rows[0][0][1]}
        return y, memory

    return call


def _row(function, inputs: dict[str, Tensor], b: int, h: int) -> tuple[Tensor, dict[str, Tensor]]:
    parts = {n: x[b, :, h] if n in TOKENS else x[b, h] if x.dim() == 4 else x[h] for n, x in inputs.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    flat = _Loop.apply(function, tuple(parts), shapes, *parts.values())
    pieces = flat.split([int(np.prod(shape)) for shape in shapes.values()])
    found = {n: x.reshape(shape) for (n, shape), x in zip(shapes.items(), pieces, strict=True)}
    return found.pop("y"), found


class _Loop(torch.autograd.Function):
    """One row: all that the loop returns as one vector. `shapes` is filled with what lies in it."""

    @staticmethod
    def forward(ctx, function, names, shapes, *tensors):
        def flat(arrays):
            y, memory = function({n: arrays[i] for i, n in enumerate(names)})
            found = {"y": y, **memory}
            shapes.update({n: np.shape(x) for n, x in found.items()})
            return np.concatenate([np.ravel(x) for x in found.values()])

        ctx.vjp, out = make_vjp(flat, tuple(x.detach().numpy() for x in tensors))
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return None, None, None, *(torch.from_numpy(np.array(g)) for g in ctx.vjp(cotangent.numpy()))
