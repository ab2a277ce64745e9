"""Where each sequence's tokens lie in a call, and the chunk grid.

Generation and evaluation left-pad, packed training has all lengths, and a state may stop in the middle of a chunk.
Chunks start at each sequence's own first token, whatever surrounds it. Engines see none of that: `Grid` maps tokens to
aligned chunks of C slots, some of which are holes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miras.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """The sequences of a [B, T] call. Tokens are numbered b * T + t.

    Attributes:
        batch: B.
        length: T.
        longest: an upper bound of the sequences' lengths, known without asking the device.
        start: number of each sequence's first token, int64 [N].
        count: length of each sequence, int64 [N].
        row: sequence of each token, int64 [B, T].
        rank: place of each token in its sequence, int64 [B, T]; -1 for padding.
        dense: every row is one sequence of T tokens.
        packed: one row holds several sequences.
    """

    batch: int
    length: int
    longest: int
    start: Tensor
    count: Tensor
    row: Tensor
    rank: Tensor
    dense: bool
    packed: bool

    @property
    def rows(self) -> int:
        """Number of sequences N, the batch size of states."""
        return self.start.shape[0]

    @property
    def valid(self) -> Tensor:
        """Which tokens exist, bool [B, T]."""
        return self.rank >= 0

    def padded(self) -> Layout:
        """The same sequences as N right-padded rows, the layout of what `to_rows` returns."""
        if not self.packed:
            return self
        device = self.start.device
        rank = torch.arange(self.longest, device=device).expand(self.rows, -1)
        rank = torch.where(rank < self.count[:, None], rank, -1)
        start = torch.arange(self.rows, device=device) * self.longest
        row = torch.arange(self.rows, device=device)[:, None].expand(-1, self.longest)
        return Layout(self.rows, self.longest, self.longest, start, self.count, row, rank, False, False)

    def steps(self, n: int) -> Layout:
        """The layout of the same sequences with each token n times."""
        if n == 1:
            return self
        within = torch.arange(n, device=self.rank.device).repeat(self.length)
        rank = self.rank.repeat_interleave(n, 1)
        rank = torch.where(rank >= 0, rank * n + within, -1)
        row = self.row.repeat_interleave(n, 1)
        start, count = self.start * n, self.count * n
        return Layout(self.batch, self.length * n, self.longest * n, start, count, row, rank, self.dense, self.packed)

    def place(self, row: Tensor, rank: Tensor, kept: int) -> Tensor:
        """Where a sequence's token stands, by its rank, in all tokens of the call followed by the last `kept` of each
        sequence before the call, which have ranks below 0.
        """
        before = self.batch * self.length + row * kept + kept + rank
        return torch.where(rank >= 0, self.start[row] + rank, before)

    def history(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Each token with those before it, oldest first.

        Args:
            x: tokens [B, T, ...].
            past: the last w tokens of each sequence before the call, [N, w, ...].

        Returns:
            [B, T, w + 1, ...], zero where there is no token, and the last w tokens of each sequence now.
        """
        kept = past.shape[1]
        source = torch.cat([x.flatten(0, 1), past.flatten(0, 1)])
        lags = torch.arange(-kept, 1, device=x.device)
        seen = self.place(self.row[..., None], self.rank[..., None] + lags, kept)
        rows = torch.arange(self.rows, device=x.device)[:, None]
        last = self.place(rows, self.count[:, None] + lags[:-1], kept)
        return take(source, torch.where(self.valid[..., None], seen, -1)), take(source, last)

    def to_rows(self, x: Tensor) -> Tensor:
        """Tokens [B, T, ...] of a pack as padded rows [N, longest, ...]; other layouts as they are."""
        if not self.packed:
            return x
        rank = torch.arange(self.longest, device=x.device)
        index = torch.where(rank < self.count[:, None], self.start[:, None] + rank, -1)
        return take(x.flatten(0, 1), index)

    def from_rows(self, y: Tensor) -> Tensor:
        """The inverse of `to_rows`."""
        if not self.packed:
            return y
        return take(y.flatten(0, 1), torch.where(self.valid, self.row * self.longest + self.rank, -1))


def take(x: Tensor, index: Tensor, hole: float = 0.0) -> Tensor:
    """x[index] along the first axis, `hole` where the index is -1: selected, not multiplied, so NaN stays put."""
    out = x.index_select(0, index.clamp_min(0).flatten()).unflatten(0, index.shape)
    return torch.where((index >= 0).reshape(*index.shape, *[1] * (x.dim() - 1)), out, hole)


def layout(
    batch: int,
    length: int,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Layout:
    """The layout of a call.

    Args:
        batch: B.
        length: T.
        mask: bool or 0/1 [B, T], true where a token exists; the existing tokens of a row lie side by side.
        cu_seqlens: int [N + 1], cumulative lengths of the sequences packed into one row: 0, ..., T.
        device: where the tensors are.

    Raises:
        UsageError: shapes that do not fit, both at once, lengths that do not add up, a mask with holes (looked at on a
            CPU).
    """
    if mask is not None and cu_seqlens is not None:
        raise UsageError("layout: got both mask and cu_seqlens; a pack has no padding, so write only cu_seqlens.")
    time = torch.arange(length, device=device).expand(batch, length)
    if cu_seqlens is not None:
        return _packed(batch, length, cu_seqlens.to(device=device, dtype=torch.int64), time)
    row = torch.arange(batch, device=device)[:, None].expand(batch, length)
    if mask is None:
        start, count = row[:, 0] * length if length else row.new_zeros(batch), row.new_full((batch,), length)
        return Layout(batch, length, length, start, count, row, time, True, False)
    if tuple(mask.shape) != (batch, length):
        raise UsageError(f"layout: mask must be [batch, time] = [{batch}, {length}], got {list(mask.shape)}.")
    mask = mask.to(device=device, dtype=torch.bool)
    count, first = mask.sum(1), mask.int().argmax(1)
    rank = torch.where(mask, time - first[:, None], -1)
    if mask.device.type == "cpu" and bool((rank >= count[:, None]).any()):
        raise UsageError("layout: the tokens of a row must lie side by side, got a mask with holes between them.")
    return Layout(
        batch, length, length, torch.arange(batch, device=device) * length + first, count, row, rank, False, False
    )


def _packed(batch: int, length: int, cu_seqlens: Tensor, time: Tensor) -> Layout:
    if batch != 1:
        raise UsageError(
            f"layout: cu_seqlens packs sequences into one row, got a batch of {batch}; flatten it to [1, B * T]."
        )
    lengths = cu_seqlens.diff()
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or bool((lengths <= 0).any()):
        raise UsageError(f"layout: cu_seqlens must rise from 0 to the {length} tokens there are, got {ends}.")
    row = torch.searchsorted(cu_seqlens, time.contiguous(), right=True) - 1
    start = cu_seqlens[:-1]
    return Layout(1, length, int(lengths.max()), start, lengths, row, time - start[row], len(ends) == 2, len(ends) > 2)


@dataclass(frozen=True)
class Grid:
    """All chunks of a call as one list of M, in the order an engine visits them: the first chunk of every sequence, the
    second of every sequence that has one, and so on.

    Attributes:
        chunk: C.
        sizes: how many chunks each step has; falls in a pack, as sequences end.
        order: the sequences sorted so that those still running come first, int64 [N]; None where that is as they are.
        index: token of each slot, int64 [M, C], -1 for a hole; None where tokens only need reshaping.
        back: slot of each token, int64 [B, T], -1 for padding; None likewise.
        shape: (B, T).
    """

    chunk: int
    sizes: list[int]
    order: Tensor | None
    index: Tensor | None
    back: Tensor | None
    shape: tuple[int, int]

    @property
    def keep(self) -> Tensor | None:
        """Which slots hold a token, bool [M, C]; None: all."""
        return None if self.index is None else self.index >= 0

    def slots(self, x: Tensor, hole: float = 0.0) -> Tensor:
        """Tokens [B, T, H, n] as chunks [M, H, C, n]."""
        if self.index is None:
            return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4).contiguous().flatten(0, 1)
        return take(x.flatten(0, 1), self.index, hole).transpose(1, 2).contiguous()

    def tokens(self, y: Tensor) -> Tensor:
        """Chunks [M, H, C, n] as tokens [B, T, H, n], zero where there is padding."""
        if self.back is None:
            return y.unflatten(0, (-1, self.shape[0])).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return take(y.transpose(1, 2).flatten(0, 1), self.back)


def grid(where: Layout, chunk: int, offset: Tensor | None) -> Grid:
    """The chunk grid of a call.

    Args:
        where: the layout.
        chunk: C.
        offset: tokens of its running chunk that each sequence has already seen, int64 [N]; None: fresh.
    """
    shape = (where.batch, where.length)
    if where.dense and offset is None and where.length % chunk == 0:
        return Grid(chunk, [where.rows] * (where.length // chunk), None, None, None, shape)
    zero = torch.zeros_like(where.count) if offset is None else offset
    if where.packed:
        chunks = -(-(zero + where.count) // chunk)
        order = torch.argsort(chunks, descending=True, stable=True)
        running = [0] * int(chunks.max())
        for n in chunks.tolist():
            for c in range(n):
                running[c] += 1
        place = torch.argsort(order)
    else:
        # A bound that needs no look at the device: at most C - 1 slots lie before the first token.
        longest = where.longest + (0 if offset is None else chunk - 1)
        running, order, place = [where.rows] * -(-longest // chunk), None, torch.arange(where.rows, device=zero.device)
    begin = torch.tensor([0, *running], device=zero.device).cumsum(0)
    slot = zero[where.row] + where.rank
    back = (begin[slot.clamp_min(0) // chunk] + place[where.row]) * chunk + slot % chunk
    back = torch.where(where.valid, back, -1)
    total = sum(running) * chunk
    # Padding is written to one slot too many, which is then dropped.
    index = torch.full((total + 1,), -1, device=zero.device)
    token = torch.arange(back.numel(), device=zero.device)
    index[torch.where(back >= 0, back, total).flatten()] = token
    return Grid(chunk, running, order, index[:-1].unflatten(0, (-1, chunk)), back, shape)
