"""State tracking: a state that every token changes, asked for at every token."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from miras.errors import UsageError
from miras.evaluate.tasks.base import Examples, TokenTask, as_examples


@dataclass(frozen=True)
class Parity(TokenTask):
    """Parity: after every bit, whether the number of ones so far is odd (arXiv 2411.12537).

    Trained to length 40 and tested to 256, as there. Guessing gives 0.5. A length beyond the trained ones asks whether
    the state is tracked or the lengths were learned.

    Args:
        train: lengths to train on; a label at every position trains all shorter ones too.
        test: lengths to score.
        examples: test sequences per length.
    """

    train: tuple[int, ...] = (40,)
    test: tuple[int, ...] = (40, 64, 128, 256)
    examples: int = 256

    level = ("length",)

    def __post_init__(self) -> None:
        _check_lengths("parity", (*self.train, *self.test))

    @property
    def tokens(self) -> int:
        return 2

    def length(self, level: int) -> int:
        return level

    def draw(self, rng: np.random.Generator, level: int, count: int) -> Examples:
        bits = rng.integers(2, size=(count, level))
        return as_examples(bits, bits.cumsum(axis=1) % 2)


@dataclass(frozen=True)
class Permutations(TokenTask):
    """The word problem of S_n: after every permutation, the composition of all so far (arXiv 2404.08819).

    A token is one of the n! permutations in lexicographic order (token 0 is the identity), and the target at t is
    x_t o ... o x_1, x_1 applied first. Guessing gives 1 / n!. S_5 is not solvable: no fixed number of layers of a
    model that only reads in parallel tracks it at all lengths (NC1 against TC0).

    Args:
        degree: n, 2 to 5.
        train: lengths to train on.
        test: lengths to score.
        examples: test sequences per length.
    """

    degree: int = 3
    train: tuple[int, ...] = (32,)
    test: tuple[int, ...] = (32, 64, 128, 256)
    examples: int = 256

    level = ("length",)

    def __post_init__(self) -> None:
        if not 2 <= self.degree <= 5:
            raise UsageError(f"permutations: expected a degree from 2 to 5, got {self.degree}.")
        _check_lengths("permutations", (*self.train, *self.test))

    @property
    def tokens(self) -> int:
        return len(products(self.degree))

    def length(self, level: int) -> int:
        return level

    def draw(self, rng: np.random.Generator, level: int, count: int) -> Examples:
        table = products(self.degree)
        inputs = rng.integers(len(table), size=(count, level))
        targets = inputs.copy()
        for t in range(1, level):
            targets[:, t] = table[inputs[:, t], targets[:, t - 1]]
        return as_examples(inputs, targets)


@lru_cache
def products(degree: int) -> np.ndarray:
    """The table [n!, n!] whose entry (a, b) is the index of a o b, b applied first."""
    elements = list(itertools.permutations(range(degree)))
    index = {p: i for i, p in enumerate(elements)}
    return np.array([[index[tuple(a[x] for x in b)] for b in elements] for a in elements])


def _check_lengths(task: str, lengths: tuple[int, ...]) -> None:
    if min(lengths, default=0) < 1:
        raise UsageError(f"{task}: expected lengths of at least 1, got {lengths}.")
