"""Recall: which value stood behind a key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miras.errors import UsageError
from miras.evaluate.tasks.base import IGNORE, RATES, Examples, TokenTask, as_examples, distinct

NOISES = ("value", "token", "heavy", "inside")


@dataclass(frozen=True)
class MQAR(TokenTask):
    """Multi-query associative recall: a key's value when the key comes back (zoology, arXiv 2312.04927).

    A sequence of `length` tokens begins with `pairs` of different keys, 1 to vocabulary / 2 - 1, and different values,
    from vocabulary / 2. Each key comes once more, at a distance 2 g behind the pairs, the gaps g drawn without
    replacement by p(g) ~ (g + 1)^(power - 1); there its value is the target. All other tokens behind the pairs are
    random ones of the whole vocabulary. Levels as in zoology's standard configuration, which trains on a fixed set of
    180,000 sequences and tests on 1,000 a level; here every batch is new.

    Args:
        vocabulary: size of the vocabulary.
        power: of the power law of gaps; 1: all gaps alike.
        train: levels (length, pairs) to train on.
        test: levels to score.
        examples: test sequences per level.
    """

    vocabulary: int = 8192
    power: float = 0.01
    train: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
    test: tuple[tuple[int, int], ...] = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    examples: int = 256

    level = ("length", "pairs")

    def __post_init__(self) -> None:
        for length, pairs in (*self.train, *self.test):
            if length % 2 or not 1 <= pairs <= length // 4:
                raise UsageError(f"mqar: expected an even length of at least 4 tokens a pair, got ({length}, {pairs}).")
            if self.vocabulary // 2 - 1 < pairs:
                raise UsageError(f"mqar: {pairs} different keys need a vocabulary of {2 * pairs + 2} at least.")

    @property
    def tokens(self) -> int:
        return self.vocabulary

    def length(self, level: tuple[int, int]) -> int:
        return level[0]

    def draw(self, rng: np.random.Generator, level: tuple[int, int], count: int) -> Examples:
        length, pairs = level
        half, context = self.vocabulary // 2, 2 * pairs
        keys = 1 + distinct(rng, count, pairs, half - 1)
        values = half + distinct(rng, count, pairs, self.vocabulary - half)
        # The largest of log p + Gumbel noise are a draw by p without replacement, in the order of drawing.
        log_p = (self.power - 1) * np.log(np.arange(1, (length - context) // 2 + 1))
        gaps = np.argsort(-(log_p + rng.gumbel(size=(count, len(log_p)))), axis=1)[:, :pairs]
        asked = context + 2 * gaps
        inputs = rng.integers(self.vocabulary, size=(count, length))
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        np.put_along_axis(inputs, asked, keys, axis=1)
        targets = np.full((count, length), IGNORE)
        np.put_along_axis(targets, asked, values, axis=1)
        return as_examples(inputs, targets)


@dataclass(frozen=True)
class NoisyRecall(TokenTask):
    """Recall from pairs shown several times, a share of the showings corrupted; scored on the clean values.

    `pairs` different keys and values are shown `repeats` times each, all showings in random order, then each key is
    asked for once, in random order with a blank (token 0) behind it. The target is always the clean value. A level is
    a kind of noise and the rate of corruption. Of what is corrupted, "value": a showing's value becomes a random value;
    "token": each token of a showing becomes a random one; "heavy": the embedding of a showing's value gets noise of a
    random direction whose size is Student's t with 1.5 degrees of freedom, in units of the embedding's own: its mean is
    finite, its variance is not; "inside": the same noise at the values that memories read, where no norm bounds it.
    This asks whether a rule that is robust to outliers (arXiv 2504.13173, section 5.1, "coping with extreme events") is
    so inside a trained model; `train=[value,0]` asks it of models that have seen no noise, the default of models that
    were trained with it.

    Args:
        vocabulary: size of the vocabulary.
        pairs: different pairs of a sequence.
        repeats: showings of each.
        train: levels (noise, rate) to train on.
        test: levels to score.
        examples: test sequences per level.
    """

    vocabulary: int = 512
    pairs: int = 16
    repeats: int = 4
    train: tuple[tuple[str, float], ...] = tuple(("value", rate) for rate in RATES)
    test: tuple[tuple[str, float], ...] = tuple(("value", rate) for rate in RATES)
    examples: int = 256

    level = ("noise", "rate")

    def __post_init__(self) -> None:
        for noise, rate in (*self.train, *self.test):
            if noise not in NOISES:
                raise UsageError(f"noisy_recall: noise is {noise!r}, expected value, token, heavy or inside.")
            if not 0 <= rate <= 1:
                raise UsageError("noisy_recall: expected rates from 0 to 1.")
        if not 1 <= self.pairs < self.vocabulary // 2 or self.repeats < 1:
            raise UsageError("noisy_recall: expected at least one pair and one showing, and a vocabulary of 2 per key.")

    @property
    def tokens(self) -> int:
        return self.vocabulary

    def length(self, level: tuple[str, float]) -> int:
        return 2 * self.pairs * (self.repeats + 1)

    def draw(self, rng: np.random.Generator, level: tuple[str, float], count: int) -> Examples:
        noise, rate = level
        half, shown = self.vocabulary // 2, self.pairs * self.repeats
        pairs = np.stack(
            [
                1 + distinct(rng, count, self.pairs, half - 1),
                half + distinct(rng, count, self.pairs, self.vocabulary - half),
            ],
            axis=-1,
        )
        order = distinct(rng, count, shown, shown) % self.pairs
        showings = np.take_along_axis(pairs, order[..., None], axis=1)
        hit, size = rng.random(showings.shape) < rate, np.abs(rng.standard_t(1.5, showings.shape))
        hit[..., 0] &= noise == "token"
        wrong = np.where(
            noise == "token",
            rng.integers(1, self.vocabulary, showings.shape),
            rng.integers(half, self.vocabulary, showings.shape),
        )
        if noise in ("value", "token"):
            showings = np.where(hit, wrong, showings)
        queries = np.take_along_axis(pairs, distinct(rng, count, self.pairs, self.pairs)[..., None], axis=1)
        asked = np.stack([queries[..., 0], np.zeros_like(queries[..., 0])], axis=-1)
        answers = np.stack([queries[..., 1], np.full_like(queries[..., 1], IGNORE)], axis=-1)
        inputs = np.concatenate([showings.reshape(count, -1), asked.reshape(count, -1)], axis=1)
        targets = np.concatenate([np.full((count, 2 * shown), IGNORE), answers.reshape(count, -1)], axis=1)
        if noise in ("value", "token"):
            return as_examples(inputs, targets)
        added = np.zeros(inputs.shape)
        added[:, : 2 * shown] = np.where(hit, size, 0.0).reshape(count, -1)
        return as_examples(inputs, targets, added, noise == "inside")


@dataclass(frozen=True)
class Memorisation(TokenTask):
    """Memorisation: learn one fixed dictionary by heart (MAD, arXiv 2403.17844).

    A sequence is made of random keys, each followed by the token that asks for its value. The dictionary, a one-to-one
    map of the lower half of the vocabulary to the upper, is the same in all sequences, so that it can only be in the
    model's weights: a control, on which what is learned while reading should not matter.

    Args:
        vocabulary: size of the vocabulary, the asking token included; half of it are keys.
        dictionary: seed of the dictionary.
        train: lengths to train on.
        test: lengths to score.
        examples: test sequences per length.
    """

    vocabulary: int = 256
    dictionary: int = 12345
    train: tuple[int, ...] = (32,)
    test: tuple[int, ...] = (32,)
    examples: int = 256

    level = ("length",)

    def __post_init__(self) -> None:
        if self.vocabulary < 3 or not all(n > 0 and n % 2 == 0 for n in (*self.train, *self.test)):
            raise UsageError("memorisation: expected even lengths and a vocabulary of 3 at least.")

    @property
    def tokens(self) -> int:
        return self.vocabulary

    def length(self, level: int) -> int:
        return level

    def draw(self, rng: np.random.Generator, level: int, count: int) -> Examples:
        half = (self.vocabulary - 1) // 2
        values = half + np.random.default_rng(self.dictionary).permutation(half)
        keys = rng.integers(half, size=(count, level // 2))
        inputs = np.stack([keys, np.full_like(keys, self.vocabulary - 1)], axis=-1)
        targets = np.stack([np.full_like(keys, IGNORE), values[keys]], axis=-1)
        return as_examples(inputs.reshape(count, level), targets.reshape(count, level))
