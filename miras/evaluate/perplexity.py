"""Losses at any context length, in bounded memory: the state is carried from piece to piece."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miras.data.tokenizer import plain_backend
from miras.hf import MirasForCausalLM

PIECE = 1024
"""Tokens of one sequence that are taken at once."""

TOKENS_AT_ONCE = 8192
"""Tokens of all sequences that are taken at once."""


def mean_loss(model: MirasForCausalLM, windows: Tensor, piece: int = PIECE) -> float:
    """Mean loss of the next token in nats, every window from a fresh state.

    Args:
        model: in evaluation mode.
        windows: tokens int [N, context].
        piece: tokens of a window that are taken at once; it changes the memory needed, not the result.
    """
    rows = max(1, TOKENS_AT_ONCE // min(windows.shape[1], piece))
    total = sum(losses(model, batch, piece).sum(dtype=torch.float64).item() for batch in windows.split(rows))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.no_grad()
def losses(model: MirasForCausalLM, windows: Tensor, piece: int = PIECE) -> Tensor:
    """The loss of every token but the first in nats, float32 [N, context - 1] on the CPU; all windows at once.

    Args:
        model: in evaluation mode.
        windows: tokens int [N, context].
        piece: as for `mean_loss`.
    """
    windows, cache, parts = windows.to(model.device), None, []
    for inputs, targets in zip(windows[:, :-1].split(piece, 1), windows[:, 1:].split(piece, 1), strict=True):
        out = model(inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        parts.append(loss.view_as(targets).cpu())
    return torch.cat(parts, 1)


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
