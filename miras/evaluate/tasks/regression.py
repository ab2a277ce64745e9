"""Regression: what an instrument will show, from readings of which some are wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miras.errors import UsageError
from miras.evaluate.tasks.base import RATES, Readings, SyntheticTask


@dataclass(frozen=True)
class Regression(SyntheticTask):
    """Linear regression inside a sequence, from corrupted readings (after arXiv 2208.01066).

    Every sequence has an instrument of its own, y_t = W x_t, the states x_t normal and the entries of W with variance
    1 / states. A token is the last state, what was read of it, and the new state; asked is what the instrument will
    show, without noise, in training too. A level is a rate: to so large a share of the readings heavy-tailed noise is
    added, normal numbers times Student's t with 1.5 degrees of freedom, whose mean is finite and whose variance is not.
    Nothing is asked of a token that itself holds such a reading: what counts is what it left in the memory. The error
    is that of the second half of a sequence, its squares over those of the targets; who knows nothing has 1.

    Unlike the embedding of a token, readings can be extreme in size, and no norm stands before the memory here. Models
    have seen no noise (`train=0`, the default) or were trained with it.

    Args:
        states: numbers of a state.
        readings: numbers of a reading.
        span: tokens of a sequence.
        train: rates to train on.
        test: rates to score.
        examples: test sequences per rate.
    """

    states: int = 8
    readings: int = 4
    span: int = 128
    train: tuple[float, ...] = (0.0,)
    test: tuple[float, ...] = RATES
    examples: int = 256

    level = ("rate",)
    measures = ("error",)
    less = ("error",)

    def __post_init__(self) -> None:
        if min(self.states, self.readings) < 1 or self.span < 2:
            raise UsageError("regression: expected a state, a reading and a span of 2 at least.")
        if not all(0 <= rate <= 1 for rate in (*self.train, *self.test)):
            raise UsageError("regression: expected rates from 0 to 1.")

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers a token holds, and how many are asked."""
        return 2 * self.states + self.readings, self.readings

    def length(self, level: float) -> int:
        return self.span

    def draw(self, rng: np.random.Generator, level: float, count: int) -> Readings:
        x = rng.standard_normal((count, self.span, self.states))
        w = rng.standard_normal((count, self.readings, self.states)) / self.states**0.5
        y = np.einsum("noi,nti->nto", w, x)
        hit, size = rng.random((*y.shape[:2], 1)) < level, rng.standard_t(1.5, (*y.shape[:2], 1))
        read = y + np.where(hit, size * rng.standard_normal(y.shape), 0.0)
        past = np.concatenate([x, read], -1)[:, :-1]
        inputs = np.concatenate([np.pad(past, ((0, 0), (1, 0), (0, 0))), x], -1)
        y[:, 1:][hit[:, :-1, 0]] = np.nan
        return Readings(torch.from_numpy(inputs).float(), torch.from_numpy(y).float())

    @staticmethod
    def score(predicted: Tensor, targets: Tensor) -> float:
        half = targets.shape[1] // 2
        wrong, power = (predicted - targets)[:, half:].square().nansum(), targets[:, half:].square().nansum()
        return (wrong / power).item()
