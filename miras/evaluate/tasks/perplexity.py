"""Perplexity by context length, and loss by position in one long text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miras.data import load_corpus
from miras.data.corpus import Corpus
from miras.errors import UsageError
from miras.evaluate.perplexity import losses, mean_loss, tokenise
from miras.evaluate.tasks.base import LanguageTask, Report, Row
from miras.hf import MirasForCausalLM
from miras.train.progress import bits_per_byte

Part = Literal["validation", "train", "all"]


@dataclass(frozen=True)
class Perplexity(LanguageTask):
    """Perplexity and bits per byte on text, at several context lengths, all over the same tokens.

    A line is a context length: the text is cut into windows of so many tokens, each read from a fresh state. `tokens`
    are those predicted, all but the first of each window; `loss` is their mean in nats, `perplexity` its exponential,
    and `bits_per_byte` the loss in bits per byte of text.

    Args:
        data: the text.
        part: "validation", what a training on these data has not seen; "train"; or "all", for text that was never
            trained on.
        contexts: lengths of windows, in tokens.
        limit: tokens to look at, at most.
    """

    data: str = "stdlib"
    part: Part = "validation"
    contexts: tuple[int, ...] = (256, 1024, 4096)
    limit: int = 131_072

    level = ("context",)
    measures = ("bits_per_byte",)
    less = ("bits_per_byte",)
    seeded = False

    def __post_init__(self) -> None:
        if self.part not in ("validation", "train", "all"):
            raise UsageError(f"perplexity: part is {self.part!r}, expected validation, train or all.")
        if not self.contexts or min(self.contexts) < 2:
            raise UsageError(f"perplexity: expected contexts of at least 2, such as 256,1024, got {self.contexts}.")

    def measure(
        self, model: MirasForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
    ) -> list[Row]:
        del seed
        corpus, longest = load_corpus(self.data), max(self.contexts)
        tokens, bytes_per_token = tokenise(_documents(corpus, self.part), tokenizer, max(self.limit, longest))
        if len(tokens) < longest:
            raise UsageError(
                f"perplexity: the {self.part} part of {corpus.name} has {len(tokens)} tokens, and a context is "
                f"{longest}. Write --set contexts={len(tokens)} or less, give more text with --data, or, where the "
                "model has not seen it, write --set part=all."
            )
        tokens = tokens[: len(tokens) // longest * longest]
        rows: list[Row] = []
        for context in self.contexts:
            report(len(rows), len(self.contexts), f"context {context}")
            rows.append(self._row(model, tokens, context, bytes_per_token))
        return rows

    def _row(self, model: MirasForCausalLM, tokens: Tensor, context: int, bytes_per_token: float) -> Row:
        count = len(tokens) // context
        start = time.perf_counter()
        loss = mean_loss(model, tokens[: count * context].view(count, context))
        predicted = count * (context - 1)
        return {
            **self.named(context),
            "tokens": predicted,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits_per_byte(loss, bytes_per_token),
            "tokens_per_second": predicted / (time.perf_counter() - start),
        }


@dataclass(frozen=True)
class Positions(LanguageTask):
    """Loss by position in one long text that is read without a break: length extrapolation, flat or not.

    `windows` stretches of `length` tokens of the held-out text are read side by side, each from a fresh state that is
    carried on to its end. A line is the mean over the positions from `position` to `last` of all of them, by powers of
    two; position 0 is the first token, which nothing predicts. A model that uses what it has read gets better along the
    lines, one that has forgotten it stays flat, and one that breaks beyond its training length shows where.

    Args:
        data: the text.
        length: tokens of a stretch, as far beyond the training length as the text goes; memory does not grow with it
            but for the cache of softmax attention.
        windows: stretches.
    """

    data: str = "stdlib"
    length: int = 16384
    windows: int = 4

    level = ("position", "last")
    measures = ("bits_per_byte",)
    less = ("bits_per_byte",)
    seeded = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.windows < 1:
            raise UsageError("positions: expected a length of at least 2 and at least 1 window.")

    def measure(
        self, model: MirasForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
    ) -> list[Row]:
        del seed
        corpus, needed = load_corpus(self.data), self.length * self.windows
        tokens, bytes_per_token = tokenise(corpus.documents("validation"), tokenizer, needed)
        if len(tokens) < needed:
            raise UsageError(
                f"positions: the held-out part of {corpus.name} has {len(tokens)} tokens, and {self.windows} windows "
                f"of {self.length} need {needed}. Write for example --set length={len(tokens) // self.windows}."
            )
        report(0, needed, "tokens")
        by_position = losses(model, tokens.view(self.windows, self.length)).mean(0)
        rows = []
        for first, end in octaves(self.length):
            loss = by_position[first - 1 : end - 1].mean().item()
            bits = bits_per_byte(loss, bytes_per_token)
            rows.append({**self.named((first, end - 1)), "loss": loss, "bits_per_byte": bits})
        return rows


def octaves(length: int) -> Iterator[tuple[int, int]]:
    """(1, 2), (2, 4), (4, 8), ... up to `length`."""
    first = 1
    while first < length:
        yield first, min(2 * first, length)
        first *= 2


def _documents(corpus: Corpus, part: Part) -> Iterable[str]:
    if part in ("validation", "all"):
        yield from corpus.documents("validation")
    if part in ("train", "all"):
        yield from corpus.documents("train")
