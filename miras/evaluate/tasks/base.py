"""What a task is: a frozen dataclass that says what is asked of a model, and how its answers count."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miras.hf import MirasForCausalLM
from miras.registry import Axis

IGNORE = -100
"""Stands in targets where nothing is asked."""

RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Shares that are corrupted, of tasks that corrupt something."""

Row = dict[str, Any]
"""A line of results: the level under the names in `Task.level`, then what was measured."""

Report = Callable[[int, int, str], None]
"""Is told how far a measurement is: done, of how much, and a word on it."""


class Task(Axis):
    """A question to a model, at one or more levels of difficulty.

    Attributes:
        level: names of the numbers that tell its levels apart.
        measures: what is compared between models; a line may hold more.
        less: those of them of which less is better.
        data: text it is made from, see `miras.data.load_corpus`; None: it is made from none.
    """

    axis = "task"
    data: str | None = None
    level: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[str, ...]]
    less: ClassVar[tuple[str, ...]] = ()

    def named(self, level: Any) -> Row:
        """A level as the beginning of a line of results."""
        return dict(zip(self.level, level if isinstance(level, tuple) else (level,), strict=True))


class LanguageTask(Task):
    """Asked of a trained language model.

    Attributes:
        seeded: whether the seed changes anything.
    """

    seeded: ClassVar[bool]
    data: str

    @abstractmethod
    def measure(
        self, model: MirasForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
    ) -> list[Row]:
        """The results, a line per level, in memory that does not grow with the length of the text.

        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            seed: of what is random in the task.
            report: is told of every line.

        Raises:
            UsageError: the data cannot be used, or are too few.
        """


class Examples(NamedTuple):
    """Sequences of one level.

    Attributes:
        inputs: tokens int64 [N, T].
        targets: int64 [N, T], what is to be answered where a token of `inputs` was just read (not the next input);
            `IGNORE` where nothing is asked.
        noise: float [N, T], how much is added to a token's embedding in a random direction, in units of the embedding's
            own size; None: nothing.
        inside: it is added to the values that the memory of each layer reads of the token, behind all norms, instead.
    """

    inputs: Tensor
    targets: Tensor
    noise: Tensor | None = None
    inside: bool = False

    def part(self, start: int, end: int) -> Examples:
        """Some of the sequences."""
        noise = None if self.noise is None else self.noise[start:end]
        return Examples(self.inputs[start:end], self.targets[start:end], noise, self.inside)


class Readings(NamedTuple):
    """Sequences of vectors of one level.

    Attributes:
        inputs: float32 [N, T, I].
        targets: float32 [N, T, O], what is to be answered at each token; NaN where nothing is asked.
    """

    inputs: Tensor
    targets: Tensor

    def part(self, start: int, end: int) -> Readings:
        """Some of the sequences."""
        return Readings(self.inputs[start:end], self.targets[start:end])


class Built(NamedTuple):
    """A synthetic task with its random choices made.

    Attributes:
        train: batches without end, fresh ones at every step, each of one level.
        test: the same for every model and every run with this seed, per level.
    """

    train: Iterator[Any]
    test: dict[Any, Any]


class SyntheticTask(Task):
    """Learned from nothing, from sequences that are drawn.

    Attributes:
        train: levels that are trained on, in equal parts.
        test: levels that are scored.
        examples: test sequences per level.
    """

    train: tuple[Any, ...]
    test: tuple[Any, ...]
    examples: int

    @abstractmethod
    def length(self, level: Any) -> int:
        """Tokens of a sequence."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, level: Any, count: int) -> Examples | Readings:
        """`count` independent sequences of one level."""

    @staticmethod
    @abstractmethod
    def score(predicted: Tensor, targets: Tensor) -> float:
        """The one measure, of answers to a level's sequences that are shaped as its targets."""

    def build(self, seed: int, batch: int = 4096) -> Built:
        """Training batches and test sets; training and test draw from independent streams of random numbers.

        Args:
            seed: decides everything that is random.
            batch: tokens of a training batch, about.
        """
        rng = np.random.default_rng([seed, 1])
        return Built(self._batches(seed, batch), {level: self.draw(rng, level, self.examples) for level in self.test})

    def _batches(self, seed: int, batch: int) -> Iterator[Examples | Readings]:
        rng = np.random.default_rng([seed, 0])
        while True:
            level = self.train[rng.integers(len(self.train))]
            yield self.draw(rng, level, max(1, batch // self.length(level)))


class TokenTask(SyntheticTask):
    """Tokens in, a label where one is asked for."""

    measures = ("accuracy",)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Size of the vocabulary."""

    @staticmethod
    def score(predicted: Tensor, targets: Tensor) -> float:
        """Share of right answers among those asked for; both int64 [N, T]."""
        asked = targets != IGNORE
        return (predicted == targets)[asked].float().mean().item()


def distinct(rng: np.random.Generator, count: int, size: int, choices: int) -> np.ndarray:
    """`size` different numbers below `choices`, in random order, for each of `count` rows."""
    drawn = rng.random((count, choices))
    smallest = np.argpartition(drawn, size - 1, axis=1)[:, :size]
    return np.take_along_axis(smallest, np.argsort(np.take_along_axis(drawn, smallest, 1), 1), 1)


def as_examples(
    inputs: np.ndarray, targets: np.ndarray, noise: np.ndarray | None = None, inside: bool = False
) -> Examples:
    """NumPy's arrays as tensors."""
    size = None if noise is None else torch.from_numpy(noise).float()
    return Examples(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long(), size, inside)
