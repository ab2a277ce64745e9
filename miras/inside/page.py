"""The page of `miras inspect`: the text in colours, heat maps of layers, and recall over distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from miras.inside.recall import Recall
from miras.inside.record import Trace
from miras.report.figures import Curves, Grid, HeatMap, Series
from miras.report.sections import Looks, Section
from miras.report.table import Column, Row, Table
from miras.report.text import Form, shown, written

LEVELS = 9
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
    Quantity("Distance", "distance", "|W_t - W_0| / |W_0|: how far the memory is from the learned initial one."),
)
KNOWN = {q.key: q for q in QUANTITIES}


def over_heads(quantity: Quantity, values: Tensor) -> Tensor:
    """[T, H] -> [T], as it is shown: the mean, of time constants the geometric one, since they span decades."""
    x = quantity.of(values)
    return x.log().mean(-1).exp() if quantity.key == "log_alpha" else x.mean(-1)


def pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, range]]:
    """The text in pieces that hold whole characters and whole tokens, with their tokens.

    Args:
        text: what was tokenised.
        offsets: characters of each token; tokens of a byte share those of their character.
    """
    found: list[tuple[str, range]] = []
    begin = first = reach = 0
    for i, (_, stop) in enumerate(offsets):
        reach = max(reach, stop)
        later = offsets[i + 1][0] if i + 1 < len(offsets) else reach
        if later >= reach:
            # What a tokenizer drops between two tokens belongs to the first.
            found.append((text[begin:later], range(first, i + 1)))
            begin, first = later, i + 1
    return found


@dataclass(frozen=True)
class Text(Section):
    """A text whose tokens are shaded by what a layer did, chosen by buttons; extreme events are underlined.

    Attributes:
        pieces: the text, see `pieces`.
        views: {(layer, quantity's name): a number for each piece}; layer -1: what belongs to no layer.
        events: {layer: the pieces that were extreme events}.
        layers: label of each layer.
        forms: how numbers are written.
    """

    kind: ClassVar[str] = "text"

    pieces: Sequence[str]
    views: Mapping[tuple[int, str], Sequence[float]]
    events: Mapping[int, frozenset[int]]
    layers: Sequence[str]
    forms: Mapping[str, Form]
    title: str = "Token by token"
    note: str = ""

    def joined(self, other: Any) -> Section:
        return self  # a page looks at one text

    @property
    def quantities(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.views))

    def css(self, name: str) -> str:
        """The rules that connect buttons and shades; ids begin with `name`."""
        rules = [_CSS]
        chips = [f"#{name}-l{i}" for i in range(len(self.layers))] + [
            f"#{name}-q{i}" for i in range(len(self.quantities))
        ]
        chosen = ",".join(f'{i}:checked~.chips [for="{i[1:]}"]' for i in chips)
        rules.append(f"{chosen}{{background:var(--ink);color:var(--paper);display:inline-block}}")
        for number, (layer, what) in enumerate(self.views):
            quantity = f"#{name}-q{self.quantities.index(what)}:checked"
            view = quantity if layer < 0 else f"#{name}-l{layer}:checked~{quantity}"
            rules.append(f"{view}~.text i{{--x:var(--v{number},0)}}{view}~.ends .v{number}{{display:inline}}")
        rules += [f"#{name}-l{i}:checked~.text .e{i}{{text-decoration:underline 2px}}" for i in self.events]
        return "\n".join(rules) + "\n"

    def html(self, name: str, looks: Looks) -> str:
        shades = [_levels(values) for values in self.views.values()]
        marked = []
        for i, piece in enumerate(self.pieces):
            style = "".join(f"--v{n}:{x[i]};" for n, x in enumerate(shades) if x[i])
            names = [f"e{layer}" for layer, tokens in self.events.items() if i in tokens]
            names += ["nl"] if piece.startswith("\n") else []
            held = f' class="{" ".join(names)}"' if names else ""
            marked.append(f'<i{held} style="{style}">{shown(piece)}</i>' if style or names else shown(piece))
        layer, what = f"{name}-l", f"{name}-q"
        ends = (
            f'<span class="v{n}">{shown(self._ends(key, values))}</span>'
            for n, (key, values) in enumerate(self.views.items())
        )
        return f"""<div class="reader">
{_radios(layer, "Layer", self.layers)}{_radios(what, "Shade by", self.quantities)}
{_chips(layer, "Layer", self.layers)}
{_chips(what, "Shade by", self.quantities)}
<p class="ends soft">{"".join(ends)}</p>
<div class="text">{"".join(marked)}</div>
<p class="soft">{shown(self.note)}</p>
</div>"""

    def _ends(self, key: tuple[int, str], values: Sequence[float]) -> str:
        low, high = (written(x, self.forms[key[1]]) for x in _range(values))
        meaning = next(
            (q.meaning for q in QUANTITIES if q.name == key[1]), "Bits that the token cost, given those before it."
        )
        return f"{meaning} Blank: {low} or less, full: {high} or more."


_CSS = """.reader input { position: absolute; opacity: 0; pointer-events: none; }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; margin: .4rem 0; max-width: none; }
.chips b { font-weight: 400; color: var(--soft); min-width: 4.6rem; }
.chips label { border: 1px solid var(--rule); border-radius: 1rem; padding: .1rem .7rem; cursor: pointer;
  font-size: .9rem; }
.reader input:focus-visible ~ .chips { outline: 1px dotted var(--soft); }
.ends span { display: none; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; border: 1px solid var(--rule);
  border-radius: .3rem; font: .9rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.text i { font-style: normal; background: color-mix(in srgb, #d55e00 calc(var(--x, 0) * 8%), transparent);
  text-decoration-color: #0072b2 !important; text-underline-offset: .25em; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.text .nl::before { content: "\\21b5"; opacity: .35; }
@media print { .chips label { display: none; }
  .text { font-size: 8pt; } }
"""


def _radios(name: str, group: str, labels: Sequence[str]) -> str:
    return "".join(
        f'<input type="radio" name="{name}" id="{name}{i}" aria-label="{group} {shown(label)}"{" checked" * (not i)}>'
        for i, label in enumerate(labels)
    )


def _chips(name: str, group: str, labels: Sequence[str]) -> str:
    chips = "".join(f'<label for="{name}{i}">{shown(label)}</label>' for i, label in enumerate(labels))
    return f'<p class="chips"><b>{group}</b>{chips}</p>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The numbers that are blank and full: few tokens at the ends do not decide."""
    x = torch.tensor([value for value in values if math.isfinite(value)] or [0.0])
    return x.quantile(0.02).item(), x.quantile(0.99).item()


def _levels(values: Sequence[float]) -> list[int]:
    low, high = _range(values)
    share = [(x - low) / (high - low) if high > low and math.isfinite(x) else 0.0 for x in values]
    return [round(LEVELS * min(max(x, 0.0), 1.0)) for x in share]


# -- sections ---------------------------------------------------------------------------------------------------------


def sections(found: Trace, kept: Sequence[tuple[str, range]], mixers: Sequence[str]) -> list[Section]:
    """What was seen as sections that JSON can hold: maps over the text and by head, and the strongest tokens.

    Args:
        found: what was recorded.
        kept: the text, see `pieces`.
        mixers: label of each layer.
    """
    note = (
        "Attention has no inner learning: of such a layer there is nothing but the loss."
        if not all(found.layers)
        else ""
    )
    sections: list[Section] = [_strongest(found, kept)] if any(found.layers) else []
    count = len(found.tokens)
    size = -(-count // BINS)
    columns = tuple(f"{i:,}" for i in range(0, count, size))
    for quantity in QUANTITIES:
        rows = [i for i, layer in enumerate(found.layers) if quantity.key in layer]
        if not rows:
            continue
        values = [over_heads(quantity, found.layers[i][quantity.key]).split(size) for i in rows]
        grid = Grid(quantity.name, tuple(tuple(part.mean().item() for part in row) for row in values))
        labels = tuple(mixers[i] for i in rows)
        sections.append(
            HeatMap("token", "layer", columns, labels, (grid,), "Over the text", quantity.meaning, form=quantity.form)
        )
    for quantity in QUANTITIES:
        rows = [i for i, layer in enumerate(found.layers) if quantity.key in layer]
        if not rows:
            continue
        heads = found.layers[rows[0]][quantity.key].shape[1]
        means = tuple(tuple(quantity.of(found.layers[i][quantity.key]).mean(0).tolist()) for i in rows)
        labels, across = tuple(mixers[i] for i in rows), tuple(str(h + 1) for h in range(heads))
        sections.append(
            HeatMap(
                "head",
                "layer",
                across,
                labels,
                (Grid(quantity.name, means),),
                "By head",
                f"{quantity.name}: mean over the text. {note}".strip(),
                form=quantity.form,
            )
        )
    return sections


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
    loss = torch.cat([found.loss[:1], found.loss])  # the first token, which none is before, gets its neighbour's shade
    views: dict[tuple[int, str], list[float]] = {}
    events = {}
    for i, layer in enumerate(found.layers):
        for quantity in QUANTITIES:
            if quantity.key in layer:
                views[i, quantity.name] = _mean_of(over_heads(quantity, layer[quantity.key]), groups)
        if "extreme" in layer:
            share = _mean_of(layer["extreme"].amax(1), groups)
            events[i] = frozenset(n for n, x in enumerate(share) if x > EXTREME)
    note = "A darker shade is more." + (
        f" Underlined: extreme events of the layer, where a head limits more than {EXTREME:.0%} of the error."
        if events
        else ""
    )
    views[-1, "Loss"] = _mean_of(loss, groups)
    forms: dict[str, Form] = {"Loss": "digits", **{q.name: q.form for q in QUANTITIES}}
    labels = [mixer if found.layers[i] else f"{mixer}: loss only" for i, mixer in enumerate(mixers)]
    return Text([text for text, _ in kept], views, events, labels, forms, note=note)


def _mean_of(values: Tensor, groups: Sequence[Sequence[int]]) -> list[float]:
    return [values[tokens].mean().item() for tokens in groups]
