"""The text of a page in colours: what a layer did with each token, chosen by buttons, without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from miras.report.sections import Looks, Section
from miras.report.text import Form, shown, written

LEVELS = 9


class View(NamedTuple):
    """A way to shade the text.

    Attributes:
        layer: whose it is; None: of no layer.
        name: on its button.
        meaning: a sentence.
        form: how its numbers are written.
        values: a number for each piece of the text.
    """

    layer: int | None
    name: str
    meaning: str
    form: Form
    values: Sequence[float]


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
    """A text whose pieces are shaded by one of several views; extreme events are underlined.

    Attributes:
        pieces: the text, see `pieces`.
        views: the first is shown first.
        events: {layer: the pieces that were extreme events}.
        layers: label of each layer.
    """

    kind: ClassVar[str] = "text"

    pieces: Sequence[str]
    views: Sequence[View]
    events: Mapping[int, frozenset[int]]
    layers: Sequence[str]
    title: str = "Token by token"
    note: str = ""

    def joined(self, other: Any) -> Section:
        return self  # a page looks at one text

    @property
    def quantities(self) -> list[str]:
        """What a view is chosen by, besides the layer."""
        return list(dict.fromkeys(view.name for view in self.views))

    def css(self, name: str) -> str:
        """The rules that connect buttons and shades; ids begin with `name`."""
        ids = [f"{name}-l{i}" for i in range(len(self.layers))] + [f"{name}-q{i}" for i in range(len(self.quantities))]
        chosen = ",".join(f'#{i}:checked~.chips [for="{i}"]' for i in ids)
        rules = [_CSS, f"{chosen}{{background:var(--ink);color:var(--paper);display:inline-block}}"]
        for number, view in enumerate(self.views):
            on = f"#{name}-q{self.quantities.index(view.name)}:checked"
            on = on if view.layer is None else f"#{name}-l{view.layer}:checked~{on}"
            rules.append(f"{on}~.text i{{--x:var(--v{number},0)}}{on}~.ends .v{number}{{display:inline}}")
        rules += [f"#{name}-l{i}:checked~.text .e{i}{{text-decoration:underline 2px}}" for i in self.events]
        return "\n".join(rules) + "\n"

    def html(self, name: str, looks: Looks) -> str:
        shades = [_levels(view.values) for view in self.views]
        marked = []
        for i, piece in enumerate(self.pieces):
            style = "".join(f"--v{n}:{x[i]};" for n, x in enumerate(shades) if x[i])
            names = [f"e{layer}" for layer, events in self.events.items() if i in events]
            names += ["nl"] if piece.startswith("\n") else []
            held = f' class="{" ".join(names)}"' if names else ""
            marked.append(f'<i{held} style="{style}">{shown(piece)}</i>')
        ends = "".join(f'<span class="v{n}">{shown(_ends(view))}</span>' for n, view in enumerate(self.views))
        layer, what = (f"{name}-l", "Layer", self.layers), (f"{name}-q", "Shade by", self.quantities)
        return f"""<div class="reader">
{_radios(*layer)}{_radios(*what)}
{_chips(*layer)}
{_chips(*what)}
<p class="ends soft">{ends}</p>
<div class="text">{"".join(marked)}</div>
<p class="soft">{shown(self.note)}</p>
</div>"""


def _ends(view: View) -> str:
    low, high = (written(x, view.form) for x in _range(view.values))
    return f"{view.meaning} Blank: {low} or less, full: {high} or more."


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
