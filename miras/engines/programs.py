"""Sequences as the programs of kernels walk over them: each over its own chunks, those that run longest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from miras.engines.unroll import Decay, Ends
from miras.layout import Grid, Layout
from miras.rule import State


class Programs(NamedTuple):
    """Chunk i of sequence n is number first[i] + n of all; it has count[n]."""

    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, cells: Grid, rows: int, dtype: torch.dtype, device: torch.device) -> Programs:
        """Those of a call."""
        sizes = torch.tensor([0, *cells.sizes[:-1]], device=device)
        count = [sum(size > n for size in cells.sizes) for n in range(rows)]
        return cls(sizes.cumsum(0, dtype=dtype), torch.tensor(count, dtype=dtype, device=device))


def renewed(cells: Grid, start: State, after: State, where: Layout, found: Mapping[str, Tensor]) -> State:
    """The state at the end where tokens may stop in the middle of a chunk: its origin is what that chunk found.

    Args:
        cells: the chunks.
        start: the state before the call.
        after: the dual and the slots after it.
        where: the layout of the call.
        found: {leaf: the duals [N, H, o, i] that the `last_chunks` have found}.
    """
    tokens, last = _tokens(cells, where), last_chunks(cells, start, where)
    filled = (start.offset + tokens) % cells.chunk
    full, begun = ((filled == 0) & (tokens > 0))[:, None, None, None], (last == 0)[:, None, None, None]
    origin = {n: torch.where(full, end, torch.where(begun, start.origin[n], found[n])) for n, end in after.dual.items()}
    return replace(after, origin=origin, offset=filled, aligned=False)


def last_chunks(cells: Grid, start: State, where: Layout) -> Tensor:
    """The chunk of each sequence that its last token is in, int64 [N]; chunks of nothing but holes may follow."""
    return (start.offset + _tokens(cells, where) - 1).clamp_min(0) // cells.chunk


def _tokens(cells: Grid, where: Layout) -> Tensor:
    return where.count if cells.order is None else where.count[cells.order]


def update_rows(coefficients: Ends | Decay) -> Tensor:
    """Coefficients of a chunk's end, [M, H, 1 + S, 1 + S + C, 1 | d]."""
    if isinstance(coefficients, Decay):
        log, last = coefficients.log, coefficients.log[..., -1:, :]
        return torch.cat([last.exp(), -(last - log).exp() * coefficients.eta], -2).unsqueeze(-3)
    return torch.cat([coefficients.dual.unsqueeze(-3), coefficients.slots], -3)
