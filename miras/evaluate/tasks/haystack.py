"""A needle in a haystack, by models that learn nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miras.data import load_tokenizer
from miras.data.tokenizer import plain_backend
from miras.evaluate.tasks.base import IGNORE, Examples, TokenTask, as_examples
from miras.evaluate.tasks.needle import Kind, Needle

Level = tuple[Kind, int]


def levels(kinds: Sequence[Kind], *lengths: int) -> tuple[Level, ...]:
    """Each kind at each length."""
    return tuple((kind, length) for kind in kinds for length in lengths)


@dataclass(frozen=True)
class Haystack(TokenTask):
    """The needles of `Needle`, looked for by a model that learned to (after RULER's, arXiv 2404.06654).

    Language models of some minutes' training find no needles at all, which tells nothing of their memories. Here a
    model learns prompts of one length, byte by byte, and is asked prompts of that length and longer ones: what it can
    do is known, and how far its memory carries it is what is measured. A sequence is a prompt of `Needle`, the needle
    at any depth, and the answer behind it, `length` bytes in all; the bytes of the answer are the targets, of which a
    model that remembers nothing has a tenth right (of a uuid a fifth). Keys and values are drawn anew for each prompt;
    prose in training and tests is from the same text.

    Args:
        data: where prose comes from.
        train: levels (kind, length) to train on; kinds as in `Needle`.
        test: levels to score.
        examples: test sequences per level.
    """

    data: str = "stdlib"
    train: tuple[Level, ...] = levels(("passkey", "number", "uuid"), 512)
    test: tuple[Level, ...] = levels(("passkey", "number", "uuid"), 512, 1024, 2048, 4096)
    examples: int = 64

    level = ("kind", "length")

    def __post_init__(self) -> None:
        for kind, _ in (*self.train, *self.test):
            Needle(kind)  # which refuses one that there is not

    @property
    def tokens(self) -> int:
        return len(load_tokenizer("bytes"))

    def length(self, level: Level) -> int:
        return level[1]

    def draw(self, rng: np.random.Generator, level: Level, count: int) -> Examples:
        """See `SyntheticTask.draw`.

        Raises:
            UsageError: a length that question and answer alone exceed.
        """
        kind, length = level
        needle, backend = Needle(kind, self.data, distractors=1), plain_backend(load_tokenizer("bytes"))
        draw = random.Random(rng.bytes(8))
        answer = 36 if kind == "uuid" else 7
        inputs, targets = np.empty((count, length), np.int64), np.full((count, length), IGNORE)
        for row in range(count):
            prompt = needle.prompt(backend, length - answer, draw.random(), draw)
            said = prompt.candidates[0]  # with the blank in front
            inputs[row], targets[row, -answer:] = prompt.tokens + said[:-1], said[1:]
        return as_examples(inputs, targets)
