"""Recall over distance: how much better a model tells a span the second time, by what lies between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.hf import MirasCache, MirasForCausalLM

LEAD = 32
"""Tokens of the text before the first occurrence."""

FILLERS = 8
"""Stretches of the text that are put between, each from another place."""

DISTANCES = (16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Recall:
    """Loss of a span in bits per token, a row for each filler.

    Attributes:
        distances: tokens between the two occurrences.
        first: at the first occurrence, [FILLERS].
        again: at the second, [FILLERS, len(distances)].
    """

    distances: tuple[int, ...]
    first: Tensor
    again: Tensor


@torch.no_grad()
def recall(model: MirasForCausalLM, span: Tensor, text: Tensor, distances: Sequence[int] = ()) -> Recall:
    """Read text, the span, filler from the text, and the span again.

    Args:
        model: in evaluation mode.
        span: int64 [S].
        text: int64 [N], which does not hold the span.
        distances: tokens between; none: as many of `DISTANCES` as the text has room for.

    Raises:
        UsageError: an empty span, or a text too short for the distances.
    """
    room = len(text) - LEAD
    reach = sorted(set(distances)) or [d for d in DISTANCES if d <= room]
    if not reach or max(reach) > room or min(reach) < 1 or len(span) == 0:
        raise UsageError(
            f"--recall: got a span of {len(span)} tokens, distances {','.join(map(str, reach)) or 'none'} and a text "
            f"of {len(text)} tokens without the span, {LEAD} of which come before it. Expected a span with text in it "
            "and distances from 1 to what is left of the text. Give a longer --text or smaller --distances."
        )
    # The text in a circle: every filler begins elsewhere in it.
    starts = torch.arange(FILLERS)[:, None] * len(text) // FILLERS
    around = text[(starts + torch.arange(LEAD + max(reach))) % len(text)].to(model.device)
    spans = span.expand(FILLERS, -1).to(model.device)
    cache, last = _read(model, around[:, :LEAD], None)
    first, cache, last = _loss(model, spans, cache, last)
    again, here = [], LEAD
    for distance in reach:
        cache, last = _read(model, around[:, here : LEAD + distance], cache)
        here = LEAD + distance
        again.append(_loss(model, spans, cache, last)[0])
    return Recall(tuple(reach), first.cpu(), torch.stack(again, 1).cpu())


def _read(model: MirasForCausalLM, tokens: Tensor, cache: MirasCache | None) -> tuple[MirasCache, Tensor]:
    """The cache after more tokens, in pieces, and the logits after the last of them, [B, vocab]."""
    logits = torch.empty(0)
    for piece in tokens.split(1024, 1):
        out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]
    assert cache is not None
    return cache, logits


def _loss(model: MirasForCausalLM, span: Tensor, cache: MirasCache, last: Tensor) -> tuple[Tensor, MirasCache, Tensor]:
    """Bits per token of a span [B, S] after a cache, which stays as it is: [B], the cache and the logits after it."""
    fork = MirasCache(len(cache.held))
    fork.put(cache.states(), cache.get_seq_length())
    logits = model(span, past_key_values=fork, use_cache=True).logits
    seen = torch.cat([last[:, None], logits[:, :-1]], 1).float()
    loss = F.cross_entropy(seen.transpose(1, 2), span, reduction="none").mean(1) / math.log(2)
    return loss, fork, logits[:, -1]
