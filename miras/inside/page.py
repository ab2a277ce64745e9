"""The page of `miras inspect`: the text in colours, heat maps of layers, and recall over distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miras.inside.recall import Recall
from miras.inside.record import Trace
from miras.inside.text import Text, View
from miras.report.figures import Curves, Grid, HeatMap, Series
from miras.report.sections import Section
from miras.report.table import Column, Row, Table
from miras.report.text import Form

BINS = 96
"""Columns of a heat map over the text."""

EVENTS = 8
"""Tokens in the table of the strongest."""

EXTREME = 0.5
"""A token is an extreme event of a layer where more than this share of the error of at least one head is limited."""


class Quantity(NamedTuple):
    """Something that is shown of every token and layer.

    Attributes:
        name: on the page.
        key: in a `Trace`.
        meaning: a sentence.
        of: from the recorded number to the shown one.
        form: how it is written.
    """

    name: str
    key: str
    meaning: str
    of: Callable[[Tensor], Tensor] = lambda x: x
    form: Form = "digits"


QUANTITIES = (
    Quantity(
        "Surprise", "surprise", "Norm of the gradient that the memory learns from: how wrong it was on this token."
    ),
    Quantity("Learning rate", "eta", "Gate eta: how much of the surprise is written."),
    Quantity(
        "Retention",
        "log_alpha",
        "Gate alpha as a time constant, -1 / log alpha: in how many tokens a memory falls to 37 %.",
        lambda x: -1 / x.clamp_max(-1e-6),
        "integer",
    ),
    Quantity(
        "Extreme share",
        "extreme",
        "Share of the error's coordinates that the bias limits: Huber's linear branch, or a clipped gradient.",
        form="percent",
    ),
    Quantity("Memory change", "change", "|W_t - W_t-1| / |W_t|: how much of the memory this token has rewritten."),
    Quantity(
        "Distance",
        "distance",
        "|W_t - W_0| / |W_0|: how far the memory is from the learned initial one; |W_t| where it starts at zero.",
    ),
)
KNOWN = {q.key: q for q in QUANTITIES}


def over_heads(quantity: Quantity, values: Tensor) -> Tensor:
    """[T, H] -> [T], as it is shown: the mean, of time constants the geometric one, since they span decades."""
    x = quantity.of(values)
    return x.log().mean(-1).exp() if quantity.key == "log_alpha" else x.mean(-1)


# -- sections ---------------------------------------------------------------------------------------------------------


def sections(found: Trace, kept: Sequence[tuple[str, range]], mixers: Sequence[str]) -> list[Section]:
    """What was seen as sections that JSON can hold: the strongest tokens, and maps over the text and by head.

    Args:
        found: what was recorded.
        kept: the text, see `pieces`.
        mixers: label of each layer.
    """
    over_text, by_head, size = [], [], -(-len(found.tokens) // BINS)
    begins = tuple(f"{i:,}" for i in range(0, len(found.tokens), size))
    for quantity in QUANTITIES:
        known = {mixers[i]: layer[quantity.key] for i, layer in enumerate(found.layers) if quantity.key in layer}
        if not known:
            continue
        bins = [[part.mean().item() for part in over_heads(quantity, x).split(size)] for x in known.values()]
        means = [quantity.of(x).mean(0).tolist() for x in known.values()]
        heads = tuple(str(head) for head in range(1, 1 + len(means[0])))
        over_text.append(_map(quantity, "token", begins, tuple(known), bins, "Over the text", quantity.meaning))
        note = f"{quantity.name}, mean over the text."
        by_head.append(_map(quantity, "head", heads, tuple(known), means, "By head", note))
    return [*([_strongest(found, kept)] if any(found.layers) else []), *over_text, *by_head]


def _map(
    quantity: Quantity,
    x: str,
    columns: tuple[str, ...],
    layers: tuple[str, ...],
    values: Sequence[Sequence[float]],
    title: str,
    note: str,
) -> HeatMap:
    grid = Grid(quantity.name, tuple(map(tuple, values)))
    return HeatMap(x, "layer", columns, layers, (grid,), title, note, form=quantity.form)


def _strongest(found: Trace, kept: Sequence[tuple[str, range]]) -> Table:
    """The tokens that surprised the memories most, by how many standard deviations, over layers and heads."""
    memories = [layer for layer in found.layers if layer]
    score = torch.stack([_standard(layer["surprise"]) for layer in memories]).mean((0, 2))
    means = {
        key: torch.stack(values).mean(0)
        for key in ("surprise", "extreme", "change")
        if (values := [layer[key].mean(1) for layer in memories if key in layer])
    }
    columns = (
        Column("Loss", "bits"),
        Column("Surprise", "mean over layers"),
        Column("Extreme share", "mean over layers", form="percent"),
        Column("Memory change", "mean over layers"),
    )
    of_token = {token: i for i, (_, tokens) in enumerate(kept) for token in tokens}
    rows = []
    for token in score.argsort(descending=True)[:EVENTS].tolist():
        i = of_token[token]
        before, this, after = (
            "".join(text for text, _ in part).replace("\n", "\u21b5")
            for part in (kept[max(0, i - 16) : i], kept[i : i + 1], kept[i + 1 : i + 9])
        )
        values = {KNOWN[key].name: x[token].item() for key, x in means.items()}
        if token:
            values["Loss"] = found.loss[token - 1].item()
        rows.append(Row(f"token {token:,}", values, f"{before}[{this}]{after}"))
    note = "The tokens, in brackets, whose surprise stands out most from each layer's own level."
    return Table(columns, tuple(rows), "What surprised the memory", note)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-12)


def recall_section(found: Recall, span: str) -> Curves:
    """The fall of the loss over distance, a curve over its fillers."""
    falls = found.first[:, None] - found.again
    x = tuple(found.distances)
    series = tuple(Series("fall of the loss", x, tuple(row)) for row in falls.tolist())
    first = found.first.mean().item()
    note = (
        f"How much less \u201c{span}\u201d costs the second time than the first, where it costs {first:.2f} bits per "
        f"token: mean and range over {len(series)} stretches of the text as what lies between. 0 is no recall."
    )
    return Curves("tokens between", "fall of the loss, bits per token", series, "Recall over distance", note, "x")


def coloured(found: Trace, kept: Sequence[tuple[str, range]], mixers: Sequence[str]) -> Text:
    """The text with what every layer did on every piece of it; a piece of several tokens has their mean."""
    groups = [list(tokens) for _, tokens in kept]
    views, events = [], {}
    for i, layer in enumerate(found.layers):
        for quantity in QUANTITIES:
            if quantity.key in layer:
                values = _mean_of(over_heads(quantity, layer[quantity.key]), groups)
                views.append(View(i, quantity.name, quantity.meaning, quantity.form, values))
        if "extreme" in layer:
            share = _mean_of(layer["extreme"].amax(1), groups)
            events[i] = frozenset(n for n, x in enumerate(share) if x > EXTREME)
    loss = torch.cat([found.loss[:1], found.loss])  # the first token, which none is before, gets its neighbour's shade
    meaning = "Bits that the token cost, given those before it."
    views.append(View(None, "Loss", meaning, "digits", _mean_of(loss, groups)))
    said = f" Underlined: extreme events of the layer, where a head limits more than {EXTREME:.0%} of the error."
    labels = [mixer if layer else f"{mixer}: loss only" for mixer, layer in zip(mixers, found.layers, strict=True)]
    return Text([text for text, _ in kept], views, events, labels, note="A darker shade is more." + said * bool(events))


def _mean_of(values: Tensor, groups: Sequence[Sequence[int]]) -> list[float]:
    return [values[tokens].mean().item() for tokens in groups]
