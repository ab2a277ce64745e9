"""The chunk grid: every token has one slot, chunks start at each sequence's first token, whatever surrounds it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miras.errors import UsageError
from miras.layout import grid, layout

CHUNKS = st.integers(1, 6)
ROWS = st.integers(1, 4)
LENGTHS = st.integers(1, 17)


@st.composite
def calls(draw):
    """A layout, its chunk and offsets: dense, padded or packed, fresh or resumed."""
    chunk, kind = draw(CHUNKS), draw(st.sampled_from(["dense", "padded", "packed"]))
    if kind == "packed":
        lengths = draw(st.lists(LENGTHS, min_size=1, max_size=5))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        where = layout(1, sum(lengths), cu_seqlens=cu_seqlens)
    else:
        rows, time = draw(ROWS), draw(LENGTHS)
        mask = None
        if kind == "padded":
            spans = [sorted((draw(st.integers(0, time)), draw(st.integers(0, time)))) for _ in range(rows)]
            mask = torch.tensor([[lo <= t < hi for t in range(time)] for lo, hi in spans])
        where = layout(rows, time, mask)
    offset = None
    if draw(st.booleans()):
        offset = torch.tensor(draw(st.lists(st.integers(0, chunk - 1), min_size=where.rows, max_size=where.rows)))
    return where, chunk, offset


def numbered(where):
    """Tokens that carry their own number, from 1, [B, T, 1, 1]."""
    return torch.arange(1.0, where.batch * where.length + 1).reshape(where.batch, where.length, 1, 1)


@given(calls())
def test_tokens_go_to_slots_and_back(call):
    where, chunk, offset = call
    cells, x = grid(where, chunk, offset), numbered(where)
    expected = torch.where(where.valid[:, :, None, None], x, 0.0)
    assert torch.equal(cells.tokens(cells.slots(x)), expected)


@given(calls())
def test_holes_take_their_value_even_where_the_padding_is_nan(call):
    where, chunk, offset = call
    cells = grid(where, chunk, offset)
    x = torch.where(where.valid[:, :, None, None], numbered(where), torch.nan)
    slots = cells.slots(x, hole=-1.0)
    assert slots.isfinite().all()
    keep = torch.ones(slots.shape[0], chunk, dtype=torch.bool) if cells.keep is None else cells.keep
    assert torch.equal(slots[:, 0, :, 0] != -1.0, keep)
    assert keep.sum() == where.count.sum()


@given(calls())
def test_chunks_start_at_each_sequences_first_token_less_its_offset(call):
    where, chunk, offset = call
    cells = grid(where, chunk, offset)
    slots = cells.slots(numbered(where))[:, 0, :, 0]
    order = torch.arange(where.rows) if cells.order is None else cells.order
    start = torch.zeros(where.rows, dtype=torch.int64) if offset is None else offset
    begin = [0, *torch.tensor(cells.sizes).cumsum(0).tolist()]
    for place, sequence in enumerate(order.tolist()):
        chunks = [slots[begin[step] + place] for step, size in enumerate(cells.sizes) if place < size]
        row = torch.cat(chunks) if chunks else slots.new_zeros(0)
        lo, n = int(start[sequence]), int(where.count[sequence])
        expected = torch.zeros_like(row)
        expected[lo : lo + n] = torch.arange(n) + 1.0 + int(where.start[sequence])
        assert torch.equal(row, expected)


@given(calls())
def test_the_grid_has_a_static_bound(call):
    where, chunk, offset = call
    cells = grid(where, chunk, offset)
    longest = -(-(where.longest + (chunk - 1 if offset is not None else 0)) // chunk)
    assert len(cells.sizes) <= longest
    assert cells.sizes == sorted(cells.sizes, reverse=True) and max(cells.sizes) <= where.rows
    if not where.packed:
        assert cells.sizes == [where.rows] * longest


@given(calls())
def test_packs_become_padded_rows_and_packs_again(call):
    where, _, _ = call
    x = numbered(where)[..., 0]
    rows = where.to_rows(x)
    assert torch.equal(where.from_rows(rows), x)
    padded = where.padded()
    assert torch.equal(padded.count, where.count) and padded.rows == where.rows
    for n in range(where.rows):
        first = int(where.start[n]) + 1.0
        expected = first + torch.arange(int(where.count[n]))
        assert torch.equal(rows[n][padded.valid[n]][:, 0], expected)


def test_ranks_count_from_each_sequences_first_token():
    where = layout(3, 4, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert where.rank.tolist() == [[-1, 0, 1, -1], [0, 1, 2, 3], [-1, -1, -1, -1]]
    assert where.count.tolist() == [2, 4, 0] and where.start.tolist()[:2] == [1, 4]
    packed = layout(1, 5, cu_seqlens=torch.tensor([0, 2, 5]))
    assert packed.rank.tolist() == [[0, 1, 0, 1, 2]] and packed.row.tolist() == [[0, 0, 1, 1, 1]]
    assert packed.packed and not layout(1, 5, cu_seqlens=torch.tensor([0, 5])).packed


def test_a_fresh_whole_number_of_chunks_only_needs_reshaping():
    assert grid(layout(2, 12), 4, None).index is None
    assert grid(layout(2, 13), 4, None).index is not None
    assert grid(layout(2, 12), 4, torch.zeros(2, dtype=torch.int64)).index is not None


BAD = {
    "both at once": (dict(batch=1, mask=torch.ones(1, 6), cu_seqlens=torch.tensor([0, 6])), "both mask and cu_seqlens"),
    "mask of another shape": (dict(batch=2, mask=torch.ones(1, 6)), r"\[2, 6\], got \[1, 6\]"),
    "mask with holes": (dict(batch=1, mask=torch.tensor([[1, 0, 1, 1, 0, 0]])), "holes"),
    "mask with a late hole": (dict(batch=2, mask=torch.tensor([[1] * 6, [0, 1, 1, 1, 0, 1]])), "holes"),
    "pack of two rows": (dict(batch=2, cu_seqlens=torch.tensor([0, 6])), r"batch of 2; flatten it"),
    "lengths that do not add up": (
        dict(batch=1, cu_seqlens=torch.tensor([0, 2, 5])),
        r"the 6 tokens there are, got \[0, 2, 5\]",
    ),
    "not from zero": (dict(batch=1, cu_seqlens=torch.tensor([1, 6])), r"from 0 .* got \[1, 6\]"),
    "empty sequence": (dict(batch=1, cu_seqlens=torch.tensor([0, 3, 3, 6])), r"must rise"),
    "no sequence": (dict(batch=1, cu_seqlens=torch.tensor([0])), r"must rise"),
}


@pytest.mark.parametrize("bad", BAD)
def test_layouts_that_do_not_fit_are_refused(bad):
    options, words = BAD[bad]
    with pytest.raises(UsageError, match=words):
        layout(length=6, **options)
