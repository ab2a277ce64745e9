"""Copying what matters out of what does not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miras.errors import UsageError
from miras.evaluate.tasks.base import IGNORE, Examples, TokenTask, as_examples, distinct


@dataclass(frozen=True)
class SelectiveCopy(TokenTask):
    """Selective copying: repeat the items that stood between blanks (arXiv 2312.00752, 2403.17844).

    Of `length` tokens the first length - items - 1 are blanks with `items` random items at random places among them;
    then comes a marker, and `items` more blanks, at each of which the next item is the target.

    Args:
        vocabulary: size of the vocabulary, its last two tokens the blank and the marker.
        train: levels (length, items) to train on.
        test: levels to score.
        examples: test sequences per level.
    """

    vocabulary: int = 16
    train: tuple[tuple[int, int], ...] = ((256, 16),)
    test: tuple[tuple[int, int], ...] = ((256, 16), (512, 16), (1024, 16))
    examples: int = 256

    level = ("length", "items")

    def __post_init__(self) -> None:
        for length, items in (*self.train, *self.test):
            if not 1 <= items <= (length - 1) // 2:
                raise UsageError(f"selective_copy: {items} items and their answers do not fit into {length} tokens.")
        if self.vocabulary < 3:
            raise UsageError(f"selective_copy: expected a vocabulary of at least 3, got {self.vocabulary}.")

    @property
    def tokens(self) -> int:
        return self.vocabulary

    def length(self, level: tuple[int, int]) -> int:
        return level[0]

    def draw(self, rng: np.random.Generator, level: tuple[int, int], count: int) -> Examples:
        length, items = level
        marker = length - items - 1
        what = rng.integers(self.vocabulary - 2, size=(count, items))
        inputs = np.full((count, length), self.vocabulary - 2)
        np.put_along_axis(inputs, np.sort(distinct(rng, count, items, marker), axis=1), what, axis=1)
        inputs[:, marker] = self.vocabulary - 1
        targets = np.full((count, length), IGNORE)
        targets[:, marker + 1 :] = what
        return as_examples(inputs, targets)
