"""The drawings of the design space. Every curve is computed by the library's own classes, never by a formula here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import miras
from miras import algorithm, bias, memory, retention
from miras.attention import Attention
from miras.errors import UsageError
from miras.registry import Axis, choices
from miras.report.plots import FILE_STYLE, file_svg
from miras.rule import Rule
from miras.variants import VARIANTS, variant
from miras.weights import COLUMNS, ROWS, Leaf

# Okabe and Ito's palette without yellow; grey is for what others do.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
GREY = "#9A9A9A"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    **FILE_STYLE,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
    "path.simplify_threshold": 0.5,
}


def write_svg(draw: Callable[[], Figure], path: Path) -> None:
    """A drawing as SVG that is the same, byte for byte, whenever it is written with the same versions."""
    with matplotlib.rc_context(STYLE):
        path.write_text(file_svg(draw(), "docs/generate.py"), encoding="utf-8")


def figure_of(cls: type[Axis]) -> Figure:
    """The drawing of one class of an axis."""
    return _FIGURES[cls.axis](cls)


class Shown(NamedTuple):
    """A curve of a class: an instance, and gates that differ from their initial values."""

    part: Any
    gates: Mapping[str, float] = {}


# Where the default instance alone does not show what there is to choose.
SHOWN = {
    bias.Lp: (Shown(bias.Lp(p=1.5)), Shown(bias.Lp()), Shown(bias.Lp(clip=False))),
    bias.L1: (Shown(bias.L1()), Shown(bias.L1(form="paper"))),
    bias.Huber: tuple(Shown(bias.Huber(), {"delta": d}) for d in (0.5, 1.0, 2.0)),
    bias.Robust: tuple(Shown(bias.Robust(), {"shift": d}) for d in (0.5, 2.0)),
    retention.Bregman: tuple(Shown(retention.Bregman(potential=p)) for p in ("logistic", "hypentropy", "entropy")),
    retention.FDivergence: tuple(Shown(retention.FDivergence(f=f)) for f in ("kl", "chi2", "reverse_kl")),
    retention.LocalFDivergence: tuple(Shown(retention.LocalFDivergence(f=f)) for f in ("kl", "chi2")),
    retention.ElasticNet: tuple(Shown(retention.ElasticNet(gamma=g)) for g in (0.05, 0.5)),
    retention.LocalElasticNet: tuple(Shown(retention.LocalElasticNet(gamma=g)) for g in (0.001, 0.01)),
    retention.Lq: (Shown(retention.Lq()), Shown(retention.Lq(link="mirror"))),
}


def _shown(cls: type) -> list[tuple[Shown, str]]:
    """The curves of a class, each with what it differs from the others by."""
    curves = SHOWN.get(cls, (Shown(cls()),))
    names = [f.name for f in fields(cls) if len({getattr(c.part, f.name) for c in curves}) > 1]
    labelled = []
    for curve in curves:
        said = [f"{n}={getattr(curve.part, n)!r}" for n in names] + [f"{n} = {x:g}" for n, x in curve.gates.items()]
        labelled.append((curve, ", ".join(said) or str(curve.part)))
    return labelled


def _two_panels() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, left, right


# -- bias ------------------------------------------------------------------------------------------------------------


def _bias(cls: type[bias.Bias]) -> Figure:
    """Loss and gradient of one coordinate against its error."""
    if cls is bias.Erase:
        return _erase()
    figure, left, right = _two_panels()
    r = torch.linspace(-4, 4, 161, dtype=torch.float64)[:, None]
    v = torch.ones_like(r)
    curves = [(*shown, COLOURS[i], "solid") for i, shown in enumerate(_shown(cls))]
    if cls is not bias.L2:
        curves.insert(0, (Shown(bias.L2()), "L2()", GREY, "dashed"))
    lowest = 0.0
    for shown, label, colour, dash in curves:
        values = {g.name: g.init for g in shown.part.gates} | dict(shown.gates)
        gates = {n: torch.full_like(r, x) for n, x in values.items()}
        loss = shown.part.loss(v + r, v, gates)
        lowest = min(lowest, loss.min().item())
        left.plot(r[:, 0], loss, color=colour, linestyle=dash)
        right.plot(r[:, 0], shown.part.clipped(v + r, v, gates)[:, 0], color=colour, linestyle=dash, label=label)
    left.set(title="loss L", xlabel="error r = y - v of one coordinate, v = 1", ylim=(lowest - 0.4, 8.4))
    right.set(title="gradient that is written", xlabel="error r", ylim=(-4.4, 4.4))
    right.legend(loc="lower right")
    return figure


def _erase() -> Figure:
    """What is read at each angle, before and after one token."""
    figure, left, right = _two_panels()
    angle = torch.linspace(-math.pi / 2, math.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    old, new = circle[60], circle[120]  # 0 and 90 degrees
    for axes, key, title in (
        (left, old, "erase key: that of the old pair"),
        (right, circle[90], "erase key: in between"),
    ):
        rules = [(bias.L2(), GREY, "dashed", new), (bias.Erase(), COLOURS[0], "solid", key)]
        axes.plot(
            angle.rad2deg(), circle @ old, color="black", linestyle="dotted", label="before: 1 stored at 0 degrees"
        )
        for loss, colour, dash, erase in rules:
            rule = Rule(memory.Linear(), loss, retention.NoRetention(), algorithm.GradientDescent())
            one = {n: x.expand(1, 1, 1, -1) for n, x in {"k": new, "erase": erase, "along": erase}.items()}
            gates = {g.name: one.get(g.name, torch.ones(1, 1, 1, 1, dtype=torch.float64)) for g in rule.gates}
            v = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
            state = rule.init({"w": old.expand(1, 1, -1)})
            _, after = miras.run(rule, one["k"], one["k"], v, gates, state=state)
            read = rule.read(rule.read_weights(after, rule.leaves(2, 1)), circle.expand(1, 1, -1, -1), after.slow)
            axes.plot(angle.rad2deg(), read.flatten(), color=colour, linestyle=dash, label=f"after, {loss}")
        axes.set(title=title, xlabel="angle of the query; 0.5 is written at 90", ylabel="read", ylim=(-1.7, 1.4))
        axes.set_xticks(range(-90, 181, 45))
    left.legend(loc="lower left")
    return figure


# -- retention -------------------------------------------------------------------------------------------------------

# One slice of a matrix: a first entry, which is varied, and others that stand for an initial memory.
SLICE = (0.5, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0)
LEAF = Leaf(len(SLICE), 1, None, ROWS, power=1.0, std=1.0)
ALPHA, WRITTEN_AT, TOKENS = 0.98, 10, 200


def _retention(cls: type[retention.Retention]) -> Figure:
    """The link of one entry among others, and an entry over tokens after one write."""
    figure, left, right = _two_panels()
    a = torch.linspace(-4, 4, 161, dtype=torch.float64)
    dual = torch.tensor(SLICE, dtype=torch.float64)[:, None].repeat(len(a), 1, 1)
    dual[:, 0, 0] = a
    highest = 0.0
    for (shown, label), colour in zip(_shown(cls), COLOURS, strict=False):
        gate = shown.part
        weights = gate.primal(dual, LEAF)[..., 0]
        left.plot(a, weights[:, 0], color=colour, label=label)
        left.plot(a, weights[:, 1], color=colour, linestyle="dotted", linewidth=1)
        for to, dash in (("zero", "solid"), ("initial", "dashed")):
            try:
                course = _course(replace(gate, to=to))
            except UsageError:
                continue
            highest = max(highest, course[WRITTEN_AT : WRITTEN_AT + 5].max())
            right.plot(course, color=colour, linestyle=dash, label=f"to={to!r}" if colour == COLOURS[0] else None)
    left.set(
        title="link: weight of an entry (dotted: of another)", xlabel="dual a of the entry, others fixed", ylabel="w"
    )
    left.legend()
    decays = " = ".join(g.name.removeprefix("log_") for g in cls().gates)
    title = f"one write at token {WRITTEN_AT}, then none" + (f"; {decays} = {ALPHA}" if decays else "")
    right.set(title=title, xlabel="token", ylabel="w of the entry")
    if right.get_ylim()[1] > 2.5 * highest:
        right.set_ylim(top=2.5 * highest)  # a link that grows without bound leaves the picture
    right.legend()
    return figure


def _course(gate: retention.Retention) -> Tensor:
    """The weight of the first entry over tokens."""
    rule = Rule(memory.Linear(start="learned"), bias.L2(), gate, algorithm.GradientDescent())
    start = torch.tensor(SLICE, dtype=torch.float64)[:, None]
    home = {"w": start} if gate.to == "initial" else {}
    dual = torch.zeros_like(start) if home else start
    gates = {g.name.removeprefix("log_"): torch.tensor(ALPHA, dtype=torch.float64) for g in gate.gates}
    gates["eta"] = torch.tensor(1.0, dtype=torch.float64)
    weights = []
    for t in range(TOKENS):
        grad = torch.zeros_like(start)
        grad[0] = -2.0 if t == WRITTEN_AT else 0.0
        dual, _ = rule.update(dual, (), grad, gates)
        weights.append(rule.link({"w": dual}, home, {"w": LEAF})["w"][0, 0])
    return torch.stack(weights)


# -- memory ----------------------------------------------------------------------------------------------------------

SIDES = {ROWS: "rows", COLUMNS: "columns", None: "none"}


def _memory(cls: type[memory.Memory]) -> Figure:
    """The matrices to scale, and how many numbers they are."""
    figure, left, right = _two_panels()
    part, size, x = cls(), 16, 0.0
    for i, (name, leaf) in enumerate(reversed(part.leaves(size, size).items())):
        left.add_patch(Rectangle((x, -leaf.rows / 2), leaf.cols, leaf.rows, color=COLOURS[i], alpha=0.35, linewidth=0))
        said = f"{name}\n{leaf.rows} x {leaf.cols}\ngates: {SIDES[leaf.channel]}"
        left.text(x + leaf.cols / 2, -leaf.rows / 2 - 3, said, ha="center", va="top", fontsize=7)
        x += leaf.cols + 34
    left.set(title=f"matrices for heads of {size}, from key to value", aspect="equal", xlim=(-14, max(x - 20, 40)))
    low, high = min(p.get_y() for p in left.patches), max(p.get_y() + p.get_height() for p in left.patches)
    left.set_ylim(low - 32, high + 4)
    left.axis("off")
    sizes = [16, 32, 64, 128, 256]
    for other in choices(memory.Memory).values():
        numbers = [sum(leaf.rows * leaf.cols for leaf in other().leaves(d, d).values()) for d in sizes]
        mine = other is cls
        label = str(part) if mine else "other memories" if other is _first_other(cls) else None
        right.plot(sizes, numbers, color=COLOURS[0] if mine else GREY, zorder=3 if mine else 2, label=label)
    cached = [Attention().state_bytes(1, d, d, 1000) / 4 for d in sizes]
    right.plot(sizes, cached, color="black", linestyle="dotted", label="keys and values of 1,000 tokens")
    right.set(title="numbers in the state", xlabel="head size", xscale="log", yscale="log", ylim=(8, 2e9))
    right.set_xticks(sizes, [str(d) for d in sizes])
    right.minorticks_off()
    right.legend(loc="upper left")
    return figure


def _first_other(cls: type) -> type:
    return next(other for other in choices(memory.Memory).values() if other is not cls)


# -- algorithm -------------------------------------------------------------------------------------------------------


def _algorithm(cls: type[algorithm.Algorithm]) -> Figure:
    """What is peculiar to it, and what is read while one pair is presented again and again."""
    figure, left, right = _two_panels()
    _PECULIAR.get(cls, _one_gradient)(left, cls())
    tokens = range(1, 25)
    for eta, colour in ((0.1, COLOURS[0]), (0.25, COLOURS[1]), (1.0, COLOURS[2])):
        right.plot(
            tokens, _presented(cls(), bias.L2(), eta, len(tokens)), "o-", ms=2, color=colour, label=f"eta = {eta:g}"
        )
    right.axhline(1, color="black", linestyle="dotted", linewidth=1)
    right.set(
        title="the same pair again and again (matrix, L2)", xlabel="times it was seen", ylabel="share that is read"
    )
    right.legend(loc="lower right")
    return figure


def _rule(learner: algorithm.Algorithm, loss: bias.Bias, chunk: int | None = None) -> Rule:
    chunk = chunk or (4 if learner.resets else 1)
    return Rule(memory.Linear(), loss, retention.NoRetention(), learner, chunk)


def _gates(rule: Rule, tokens: int, eta: float, rho: Tensor | None = None) -> dict[str, Tensor]:
    """Eta as given; the read factor that of TTT, 1 / (j + 1) for the j-th token of a chunk."""
    t = torch.arange(tokens, dtype=torch.float64)
    own = {"eta": torch.full_like(t, eta), "rho": 1 / (1 + t % rule.chunk) if rho is None else rho}
    return {g.name: own.get(g.name, torch.full_like(t, g.init))[None, :, None, None] for g in rule.gates}


def _presented(learner, loss, eta: float, tokens: int, chunk: int | None = None, rho: Tensor | None = None) -> Tensor:
    """How much of its value is read at a key, while the pair is presented at every token."""
    rule = _rule(learner, loss, chunk)
    pair = F.normalize(torch.ones(1, tokens, 1, 4, dtype=torch.float64), dim=-1)
    y, _ = miras.run(rule, pair, pair, pair, _gates(rule, tokens, eta, rho))
    return (y * pair).sum(-1).flatten()


def _one_gradient(axes: Axes, learner: algorithm.Algorithm) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    gates = {g.name: one * (1.0 if g.name == "eta" else g.init) for g in learner.gates}
    slots, steps = tuple(torch.zeros_like(one) for _ in range(learner.slots)), []
    for t in range(24):
        step, slots = learner.step(one if t == 0 else torch.zeros_like(one), slots, gates)
        steps.append(step.item())
    said = ", ".join(f"{g.name} = {gates[g.name].item():g}" for g in learner.gates)
    axes.bar(range(24), steps, width=0.6, color=COLOURS[0])
    axes.set(title=f"steps after a gradient of 1 at token 0; {said}", xlabel="token", ylabel="step")


def _mini_batch(axes: Axes, learner: algorithm.Algorithm) -> None:
    tokens, chunk = 24, 8
    for rho, label in ((torch.ones(tokens, dtype=torch.float64), "rho = 1"), (None, "rho = 1 / (j + 1)")):
        colour = GREY if rho is not None else COLOURS[0]
        read = _presented(learner, bias.Dot(), 1.0, tokens, chunk, rho)
        axes.plot(range(1, tokens + 1), read, "o-", ms=2, color=colour, label=label)
    axes.set(title=f"gradients that a token sees, chunks of {chunk} (Dot)", xlabel="token", ylabel="sum of gradients")
    axes.legend()


def _implicit(axes: Axes, learner: algorithm.Algorithm) -> None:
    etas = torch.linspace(0, 6, 61).tolist()
    for other, colour in ((algorithm.GradientDescent(), GREY), (learner, COLOURS[0])):
        axes.plot(etas, [_presented(other, bias.L2(), eta, 1)[0] for eta in etas], color=colour, label=str(other))
    axes.axhline(1, color="black", linestyle="dotted", linewidth=1)
    axes.set(
        title="one write into an empty memory", xlabel="eta, key of norm 1", ylabel="share that is read", ylim=(0, 2)
    )
    axes.legend()


def _least_squares(axes: Axes, learner: algorithm.Algorithm) -> None:
    pairs, size = 8, 16
    dice = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(1, pairs, 1, size, generator=dice, dtype=torch.float64), dim=-1)
    v = torch.randn(1, pairs, 1, size, generator=dice, dtype=torch.float64)
    etas = torch.logspace(-1, 3, 41).tolist()
    for other, colour in (
        (algorithm.GradientDescent(), GREY),
        (algorithm.Implicit(), COLOURS[1]),
        (learner, COLOURS[0]),
    ):
        rule, errors = _rule(other, bias.L2()), []
        for eta in etas:
            _, state = miras.run(rule, k, k, v, _gates(rule, pairs, eta))
            weights = rule.read_weights(state, rule.leaves(size, size))
            read = rule.read(weights, k.transpose(1, 2), state.slow).transpose(1, 2)
            errors.append(((read - v).norm() / v.norm()).item())
        axes.plot(etas, errors, color=colour, label=str(other))
    axes.set(
        title=f"{pairs} random pairs, each seen once, heads of {size}", xlabel="eta", ylabel="error of reading them"
    )
    axes.set(xscale="log", ylim=(0, 1.2))
    axes.legend(loc="upper right")


def _muon(axes: Axes, learner: algorithm.Algorithm) -> None:
    size, one = 16, torch.ones(1, 1, dtype=torch.float64)
    dice = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=dice, dtype=torch.float64))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.logspace(0, -3, size, dtype=torch.float64)) @ right
    axes.plot(torch.linalg.svdvals(matrix), "o-", ms=2, color=GREY, label="of the gradient")
    for schedule, colour in (("muon", COLOURS[0]), ("lact", COLOURS[1])):
        step, _ = replace(learner, momentum=False, schedule=schedule).step(matrix, (), {"eta": one})
        axes.plot(torch.linalg.svdvals(step), "o-", ms=2, color=colour, label=f"of the step, schedule={schedule!r}")
    axes.set(title="singular values", xlabel="number", yscale="log")
    axes.legend(loc="lower left")


_PECULIAR = {
    algorithm.MiniBatch: _mini_batch,
    algorithm.Implicit: _implicit,
    algorithm.LeastSquares: _least_squares,
    algorithm.Muon: _muon,
}
_FIGURES: dict[str, Callable[[Any], Figure]] = {
    "memory": _memory,
    "bias": _bias,
    "retention": _retention,
    "algorithm": _algorithm,
}


# -- the space -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a model stands: names of classes, or what a mixer that is no rule says of itself."""

    name: str
    memory: str  # with its number of matrices
    bias: str
    retention: str
    algorithm: str


def places() -> list[Place]:
    """The known models in the space."""
    found = []
    for name in VARIANTS:
        mixer = variant(name)
        if isinstance(mixer, Rule):
            others = (type(part).__name__ for part in (mixer.bias, mixer.retention, mixer.algorithm))
            axes = (_depth(mixer.memory), *others)
        else:
            said = mixer.describe()
            loss, gate = (
                said[axis].partition("(")[0].partition(",")[0].partition(" ")[0] for axis in ("bias", "retention")
            )
            axes = ("keys and values of every token", loss, gate, "none: non-parametric")
        found.append(Place(name, *axes))
    return found


LINE, LETTER, PAD = 0.165, 0.068, 0.1  # inches: a line of text, a letter, the space around a cell


def space() -> Figure:
    """The plane of bias and retention, every known model in its cell; colour is memory, marker algorithm."""
    known = places()
    columns = _in_order(choices(bias.Bias), (p.bias for p in known))
    rows = _in_order(choices(retention.Retention), (p.retention for p in known))
    memories = _in_order((_depth(cls()) for cls in choices(memory.Memory).values()), (p.memory for p in known))
    algorithms = _in_order(choices(algorithm.Algorithm), (p.algorithm for p in known))
    cells = {
        (row, column): [p for p in known if (p.retention, p.bias) == (row, column)]
        for row in rows
        for column in columns
    }
    widths = [
        max(len(w) for w in [c, *(" " * 2 + p.name for r in rows for p in cells[r, c])]) * LETTER + 2 * PAD
        for c in columns
    ]
    heights = [max(1, *(len(cells[r, c]) for c in columns)) * LINE + PAD for r in rows]
    margin = max(len(r) for r in rows) * LETTER + 0.35
    legend = (2 + max(len(memories), len(algorithms))) * LINE + 0.15
    width, height = margin + sum(widths) + 0.1, 0.55 + sum(heights) + legend
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(memories)}
    marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(algorithms)}
    lefts = [margin + sum(widths[:i]) for i in range(len(columns))]
    tops = [0.55 + sum(heights[:i]) for i in range(len(rows))]
    axes.text(0.1, 0.42, "retention", fontsize=8, color=GREY, va="center")
    axes.text(margin, 0.14, "bias", fontsize=8, color=GREY, va="center")
    for left, wide, column in zip(lefts, widths, columns, strict=True):
        axes.text(left + wide / 2, 0.42, column, ha="center", va="center", weight="bold")
    for top, high, row in zip(tops, heights, rows, strict=True):
        axes.text(margin - 0.1, top + high / 2, row, ha="right", va="center", weight="bold")
        for left, wide, column in zip(lefts, widths, columns, strict=True):
            here = cells[row, column]
            face = "#F2F6FA" if here else "white"
            axes.add_patch(Rectangle((left, top), wide, high, facecolor=face, edgecolor="#CFCFCF", linewidth=0.6))
            for i, place in enumerate(here):
                y = top + PAD / 2 + (i + 0.5) * LINE
                axes.plot(left + PAD + 0.02, y, marker[place.algorithm], color=colour[place.memory], ms=4.5)
                axes.text(left + PAD + 0.12, y, place.name, va="center", color=colour[place.memory])
    y = height - legend + LINE
    axes.text(margin, y, "memory (colour)", color=GREY, va="center")
    axes.text(margin + 2.6, y, "algorithm (marker)", color=GREY, va="center")
    for i, name in enumerate(memories):
        axes.text(margin, y + (i + 1) * LINE, name, color=colour[name], va="center")
    for i, name in enumerate(algorithms):
        axes.plot(margin + 2.68, y + (i + 1) * LINE, marker[name], color="black", ms=4.5)
        axes.text(margin + 2.8, y + (i + 1) * LINE, name, va="center")
    return figure


def _in_order(names: Iterable[str], used: Iterable[str]) -> list[str]:
    """Names, and those that are used beside them, the most used first."""
    count = Counter(used)
    known = [*names]
    return sorted([*known, *(n for n in count if n not in known)], key=lambda n: -count[n])


def _depth(part: memory.Memory) -> str:
    count = len(part.leaves(16, 16))
    return f"{type(part).__name__}: {count} {'matrix' if count == 1 else 'matrices'}"
