"""Sums over pairs of tokens under a decay that falls along the tokens, one for a head or one for each channel.

Shapes: `...` is (batch, head) or (block of tokens, ...); C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miras.products import matmul

# Tokens of a block within which a decay per channel is written out for every pair.
BLOCK = 4


def _block(tokens: int) -> int:
    """The largest size of equal blocks up to `BLOCK`."""
    return next(size for size in range(min(BLOCK, tokens), 0, -1) if tokens % size == 0)


def decay_between(rows: Tensor, log: Tensor, diagonal: int) -> Tensor:
    """exp(rows_t - log_s) for s up to t + diagonal, else 0, [..., C, C, channels]."""
    size = rows.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=rows.device).tril(diagonal).unsqueeze(-1)
    # Masked before exp, which overflows above the diagonal.
    return (rows.unsqueeze(-2) - log.unsqueeze(-3)).masked_fill(~lower, -torch.inf).exp()


def decayed_scores(a: Tensor, b: Tensor, rows: Tensor, log: Tensor, diagonal: int) -> Tensor:
    """sum_i a_ti b_si exp(rows_ti - log_si) for s up to t + diagonal, else 0, [..., C, C].

    Between blocks the decay is that from s to the begin of t's block, times that from there to t, each of them at most
    1 and on one factor of a product.

    Args:
        a: [..., C, channels].
        b: likewise.
        rows: `log` or, with diagonal -1, `log` one token before; [..., C, 1 | channels].
        log: cumulated logarithm of a decay, falling along the tokens.
        diagonal: 0 or -1.
    """
    if log.shape[-1] == 1:
        return decay_between(rows, log, diagonal).squeeze(-1) * matmul(a, b.mT)
    tokens, size = a.shape[-2], _block(a.shape[-2])
    a_b, b_b, rows_b, log_b = (x.unflatten(-2, (-1, size)) for x in (a, b, rows, log))
    own = matmul(decay_between(rows_b, log_b, diagonal) * b_b.unsqueeze(-3), a_b.unsqueeze(-1)).squeeze(-1)
    found = []
    for j, block in enumerate(own.unbind(-3)):
        begin = j * size
        parts = [block, block.new_zeros(*block.shape[:-1], tokens - begin - size)]
        if j:
            at = log[..., begin - 1 : begin, :]
            past = (at - log[..., :begin, :]).exp() * b[..., :begin, :]
            parts.insert(0, matmul((rows_b[..., j, :, :] - at).exp() * a_b[..., j, :, :], past.mT))
        found.append(torch.cat(parts, -1))
    return torch.cat(found, -2)


def decayed_sum(scores: Tensor, left: Tensor, rows: Tensor, log: Tensor, diagonal: int) -> Tensor:
    """sum_s scores_ts exp(rows_t - log_s) (.) left_s over s up to t + diagonal, [..., C, channels].

    Args:
        scores: [..., C, C].
        left: [..., C, channels].
        rows: see `decayed_scores`.
        log: likewise.
        diagonal: 0 or -1.
    """
    if log.shape[-1] == 1:
        return matmul(decay_between(rows, log, diagonal).squeeze(-1) * scores, left)
    size = _block(left.shape[-2])
    scores_b, left_b, rows_b, log_b = (x.unflatten(-2, (-1, size)) for x in (scores, left, rows, log))
    blocks = []
    for j in range(rows_b.shape[-3]):
        begin = j * size
        own = scores_b[..., j, :, begin : begin + size].unsqueeze(-1)
        ratio = decay_between(rows_b[..., j, :, :], log_b[..., j, :, :], diagonal)
        y = (own * ratio * left_b[..., j, :, :].unsqueeze(-3)).sum(-2)
        if j:
            at = log[..., begin - 1 : begin, :]
            past = (at - log[..., :begin, :]).exp() * left[..., :begin, :]
            y = y + (rows_b[..., j, :, :] - at).exp() * matmul(scores_b[..., j, :, :begin], past)
        blocks.append(y)
    return torch.cat(blocks, -2)
