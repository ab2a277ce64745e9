"""Sequences of a pack end at different chunks: rows leave the running state and come together again at the end.

Everything here maps trees of tensors: states, dicts and tuples of them, single tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from miras.layout import Grid
from miras.rule import State
from miras.state import tree_map

T = TypeVar("T")


def split(chunks: T, sizes: list[int]) -> Iterator[T]:
    """The chunks of each step. Split at once: the backward of a slice fills a tensor of all chunks for each step."""
    parts: list[tuple[Tensor, ...]] = []
    tree_map(lambda x: parts.append(x.split(sizes)) or x, chunks)
    for step in range(len(sizes)):
        found = iter(part[step] for part in parts)
        yield tree_map(lambda _, found=found: next(found), chunks)


def in_order(cells: Grid, rows: T) -> T:
    """The rows with those first that run longest."""
    order = cells.order
    return rows if order is None else tree_map(lambda x: x.index_select(0, order), rows)


def running(rows: T, size: int, finished: list[T]) -> T:
    """The first `size` rows; the others are added to `finished`."""
    counts: list[int] = []
    tree_map(lambda x: counts.append(x.shape[0]) or x, rows)
    if size == counts[0]:
        return rows
    finished.append(tree_map(lambda x: x[size:], rows))
    return tree_map(lambda x: x[:size], rows)


def reassemble(cells: Grid, rows: T, finished: list[T]) -> T:
    """All rows in their own order; those that ended early stand behind the running ones."""
    rows = cat([rows, *reversed(finished)])
    if cells.order is None:
        return rows
    back = torch.argsort(cells.order)
    return tree_map(lambda x: x.index_select(0, back), rows)


def cat(parts: list[Any]) -> Any:
    """Trees joined along the rows."""
    first = parts[0]
    if len(parts) == 1 or isinstance(first, int):
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {n: cat([part[n] for part in parts]) for n in first}
    if isinstance(first, State):
        return _cat_states(parts)
    joined = [cat(list(fields)) for fields in zip(*parts, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


def _cat_states(parts: list[State]) -> State:
    first = parts[0]
    rows = {n: cat([getattr(part, n) for part in parts]) for n in ("dual", "slots", "offset", "pending")}
    # A dual that is its chunk's origin stays it: one base less to read with.
    same = all(part.origin[n] is part.dual[n] for part in parts for n in first.dual)
    origin = rows["dual"] if same else cat([part.origin for part in parts])
    return replace(first, **rows, origin=origin, aligned=all(p.aligned for p in parts))
