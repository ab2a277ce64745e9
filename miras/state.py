"""States: everything that a mixer remembers, batch first, so that it can be moved, forked, reordered and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="BatchState")
Tree = Any  # a tensor, None, or a dict / tuple / BatchState of trees


def tree_map(fn: Callable[[Tensor], Tensor], tree: Tree, shared: bool = False) -> Tree:
    """The same tree with `fn` applied to each tensor, of states to the shared ones only where asked."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, dict):
        return {name: tree_map(fn, part, shared) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [tree_map(fn, part, shared) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, BatchState):
        return tree.map(fn, shared)
    return tree


def tensors(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a tree by dotted name."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    if isinstance(tree, BatchState):
        items = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    elif isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, tuple):
        items = [(str(i), part) for i, part in enumerate(tree)]
    else:
        return {}
    return {n: t for name, part in items for n, t in tensors(part, f"{prefix}.{name}".lstrip(".")).items()}


@dataclass(frozen=True)
class BatchState:
    """Base of states. Fields named in `shared` belong to all rows (parameters, by reference); the rest is [B, ...]."""

    shared: ClassVar[tuple[str, ...]] = ()

    def map(self: S, fn: Callable[[Tensor], Tensor], shared: bool = False) -> S:
        """A state with `fn` applied to each tensor of the rows, and to the shared ones where asked."""
        changed = {
            field.name: tree_map(fn, getattr(self, field.name), shared)
            for field in dataclasses.fields(self)
            if shared or field.name not in self.shared
        }
        return dataclasses.replace(self, **changed)

    def detach(self: S) -> S:
        """Cut the outer gradient here (truncated backpropagation through time)."""
        return self.map(Tensor.detach, shared=True)

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Move to a device; dtypes stay (a state is float32 or float64 for a reason)."""
        return self.map(lambda x: x.to(*args, **kwargs), shared=True)

    def clone(self: S) -> S:
        """A copy of the rows' tensors."""
        return self.map(Tensor.clone)

    def index_select(self: S, index: Tensor) -> S:
        """The rows `index` (int64 [M]), in that order; rows may repeat: beam search, sorting, forking."""
        return self.map(lambda x: x.index_select(0, index.to(x.device)))

    def fork(self: S, copies: int) -> S:
        """Each row `copies` times, in place of the row."""
        return self.map(lambda x: x.repeat_interleave(copies, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of all rows; shared parameters do not count."""
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        self.map(count)
        return total

    def health(self) -> dict[str, float]:
        """Root mean square of every floating-point tensor of the rows by name; NaN or inf shows where a state broke."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.shared}
        return {
            n: x.float().square().mean().sqrt().item() for n, x in tensors(own).items() if torch.is_floating_point(x)
        }
