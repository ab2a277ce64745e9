"""What a memory reads in the lab: key-value pairs, and what it is asked when.

Keys have norm 1 and values variance 1 over their channels, both mean 0: a memory behind a LayerNorm can then represent
them as exactly as a matrix can, and an error of 1 is that of an empty matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.lab.entry import Entry


class Asked(NamedTuple):
    """Questions, the same number at every time of asking: keys [n, m, d] and their right values [n, m, d].

    Values that are NaN are not asked for at that time. Questions with `scored` count in the search for a learning rate.
    """

    k: Tensor
    v: Tensor
    scored: bool = True


@dataclass(frozen=True)
class Stream:
    """T pairs and n times of asking.

    Attributes:
        k: keys [T, d].
        v: values [T, d] as they are written.
        truth: values [T, d] as they should be recalled.
        write: 1 for a pair that is written, 0 for a token that says nothing (its eta is 0), [T].
        marked: the tokens that the scenario is about (outliers, changed pairs), bool [T].
        at: numbers of tokens after which the memory is asked, increasing, the last one T.
        asked: what it is asked then, by name.
        late: the token from which on answers count in summaries; None: from the middle.
    """

    k: Tensor
    v: Tensor
    truth: Tensor
    write: Tensor
    marked: Tensor
    at: tuple[int, ...]
    asked: Mapping[str, Asked]
    late: int | None = None

    @property
    def late_ones(self) -> slice:
        """Which of the times of asking count in summaries."""
        first = self.at[-1] // 2 if self.late is None else self.late
        return slice(sum(t <= first for t in self.at), None)


def together(streams: Sequence[Stream]) -> Stream:
    """Streams with the same times as one, with an axis [S] before the others."""

    def stacked(part: Callable[[Stream], Tensor]) -> Tensor:
        return torch.stack([part(s) for s in streams])

    first = streams[0]
    asked = {
        name: Asked(stacked(lambda s, n=name: s.asked[n].k), stacked(lambda s, n=name: s.asked[n].v), one.scored)
        for name, one in first.asked.items()
    }
    names = ("k", "v", "truth", "write", "marked")
    return replace(first, asked=asked, **{n: stacked(lambda s, n=n: getattr(s, n)) for n in names})


@dataclass(frozen=True)
class Scenario(ABC):
    """A family of streams, one for each seed.

    Args:
        size: channels d of keys and values.
    """

    name: ClassVar[str]
    shows: ClassVar[str]  # one line for the list
    look: ClassVar[str]  # what to look for in the plot

    size: int = field(default=32, kw_only=True)

    @abstractmethod
    def build(self, seed: int) -> Stream:
        """The stream of a seed."""

    @abstractmethod
    def entries(self) -> tuple[Entry, ...]:
        """The memories that are worth comparing on it."""

    def require(self, right: bool, expected: str) -> None:
        """Refuse values that make no stream.

        Raises:
            UsageError: `right` is false.
        """
        if not right or self.size < 4:
            raise UsageError(f"{self}: expected {expected}, and a size of at least 4.")


class Source:
    """Random pairs of one seed."""

    def __init__(self, seed: int, size: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    @cached_property
    def _basis(self) -> Tensor:
        """An orthonormal basis [d - 1, d] of the vectors with mean 0 (Helmert's)."""
        rows = torch.ones(self.size - 1, self.size).tril()
        i = torch.arange(self.size - 1)
        rows[i, i + 1] = -(i + 1.0)
        return F.normalize(rows, dim=-1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def heavy(self, *shape: int) -> Tensor:
        """Student's t with 2 degrees of freedom, whose variance is infinite, by its inverse distribution function."""
        p = self.uniform(*shape).clamp(1e-6, 1 - 1e-6)
        return (2 * p - 1) / (2 * p * (1 - p)).sqrt()

    def embed(self, x: Tensor) -> Tensor:
        """Unit vectors of mean 0, [..., d - 1] -> [..., d]."""
        return F.normalize(x, dim=-1) @ self._basis

    def keys(self, *shape: int) -> Tensor:
        """Random keys [*shape, d]."""
        return self.embed(self.normal(*shape, self.size - 1))

    def values(self, *shape: int) -> Tensor:
        """Random values [*shape, d]."""
        return self.size**0.5 * self.keys(*shape)

    def rotation(self) -> Tensor:
        """A random orthogonal map [d - 1, d - 1]."""
        return torch.linalg.qr(self.normal(self.size - 1, self.size - 1)).Q

    def apply(self, rotation: Tensor, k: Tensor) -> Tensor:
        """The values of keys [..., d] under an orthogonal map [..., d - 1, d - 1]."""
        z = (k @ self._basis.mT).unsqueeze(-1)
        return self.size**0.5 * (rotation @ z).squeeze(-1) @ self._basis


def every(tokens: int, step: int) -> tuple[int, ...]:
    """Times of asking: every `step` tokens, and after the last."""
    return (*range(step, tokens, step), tokens)


def before(at: tuple[int, ...]) -> Tensor:
    """The last token before each time of asking."""
    return torch.tensor(at) - 1
