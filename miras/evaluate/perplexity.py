"""Perplexity and bits per byte at any context length, in bounded memory: the state is carried from piece to piece."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miras.data import load_corpus
from miras.data.corpus import Corpus
from miras.data.tokenizer import plain_backend
from miras.errors import UsageError
from miras.evaluate.loading import load_model
from miras.hf import MirasForCausalLM
from miras.train.progress import bits_per_byte

PIECE = 1024
"""Tokens of one sequence that are taken at once."""

TOKENS_AT_ONCE = 8192
"""Tokens of all sequences that are taken at once."""

Part = Literal["validation", "train", "all"]


@dataclass(frozen=True)
class Row:
    """A model on some text at one context length.

    Attributes:
        context: tokens of each window; none of it remembers another.
        tokens: tokens predicted, all but the first of each window.
        loss: mean in nats per token.
        perplexity: exp(loss).
        bits_per_byte: loss in bits, per byte of text.
        tokens_per_second: how fast.
    """

    context: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens_per_second: float


def evaluate(path: str, data: str, contexts: Sequence[int], limit: int, part: Part = "validation") -> list[Row]:
    """A table of a trained model: one row per context length, all over the same tokens.

    Args:
        path: see `load_model`.
        data: see `miras.data.load_corpus`.
        contexts: lengths of windows, in tokens.
        limit: tokens to look at, at most.
        part: "validation", what a training on these data has not seen; "train"; or "all", for text that was never
            trained on.

    Raises:
        UsageError: no such model or data, or too little text for the longest window.
    """
    if not contexts or min(contexts) < 2:
        raise UsageError(f"--context {','.join(map(str, contexts))}: expected lengths of at least 2, such as 256,1024.")
    model, tokenizer = load_model(path)
    corpus = load_corpus(data)
    tokens, bytes_per_token = tokenise(_documents(corpus, part), tokenizer, max(limit, max(contexts)))
    if len(tokens) < max(contexts):
        raise UsageError(
            f"--context {max(contexts)}: the {part} part of {corpus.name} has {len(tokens)} tokens. Write --context "
            f"{len(tokens)} or less, give more text with --data, or, where the model has not seen it, write --part all."
        )
    tokens = tokens[: len(tokens) // max(contexts) * max(contexts)]
    return [_row(model, tokens, context, bytes_per_token) for context in contexts]


def mean_loss(model: MirasForCausalLM, windows: Tensor, piece: int = PIECE) -> float:
    """Mean loss of the next token in nats, every window from a fresh state.

    Args:
        model: in evaluation mode.
        windows: tokens int [N, context].
        piece: tokens of a window that are taken at once; it changes the memory needed, not the result.
    """
    rows = max(1, TOKENS_AT_ONCE // min(windows.shape[1], piece))
    total = sum(_loss_of(model, batch, piece) for batch in windows.split(rows))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def tokenise(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, limit: int) -> tuple[Tensor, float]:
    """The first `limit` tokens of a text, an end-of-text token after each document, as training packs them.

    Returns:
        Tokens int64 [N], and the bytes of text per token of the documents they come from.
    """
    backend, end = plain_backend(tokenizer), tokenizer.get_vocab()[str(tokenizer.eos_token)]
    parts: list[np.ndarray] = []
    count = size = 0
    for document in documents:
        ids = backend.encode(document, add_special_tokens=False).ids
        parts.append(np.asarray([*ids, end], dtype=np.int64))
        count, size = count + len(ids) + 1, size + len(document.encode("utf-8"))
        if count >= limit:
            break
    return torch.from_numpy(np.concatenate(parts))[:limit], size / count


@torch.no_grad()
def _loss_of(model: MirasForCausalLM, windows: Tensor, piece: int) -> float:
    """Sum of the losses of some windows."""
    windows, cache, total, last = windows.to(model.device), None, 0.0, windows.shape[1] - 1
    for start in range(0, last, piece):
        end = min(start + piece, last)
        out = model(windows[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        target = windows[:, start + 1 : end + 1]
        total += F.cross_entropy(out.logits.flatten(0, 1).float(), target.flatten(), reduction="sum").item()
    return total


def _row(model: MirasForCausalLM, tokens: Tensor, context: int, bytes_per_token: float) -> Row:
    count = len(tokens) // context
    start = time.perf_counter()
    loss = mean_loss(model, tokens[: count * context].view(count, context))
    seconds = time.perf_counter() - start
    predicted = count * (context - 1)
    bits = bits_per_byte(loss, bytes_per_token)
    return Row(context, predicted, loss, math.exp(min(loss, 700.0)), bits, predicted / seconds)


def _documents(corpus: Corpus, part: Part) -> Iterable[str]:
    if part in ("validation", "all"):
        yield from corpus.documents("validation")
    if part in ("train", "all"):
        yield from corpus.documents("train")
