"""Write the map of the design space from the classes themselves: docs/design-space.md, docs/axes/*.md, their drawings,
and the table of models in README.md.

    python docs/generate.py            # write everything
    python docs/generate.py --check    # write nothing; exit with 1 if a page is out of date or a drawing is missing

Formula, intuition and advice are those of the docstrings, the table is that of `miras list`, the curves are computed by
the classes. Pages are compared by their text; drawings, whose last digits may depend on the machine, by presence.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from miras.algorithm import Algorithm
from miras.bias import Bias
from miras.engines import plan
from miras.errors import UsageError
from miras.evaluate.describe import AXES, Part, parts, rows
from miras.memory import Memory
from miras.registry import Axis, choices
from miras.retention import Retention
from miras.rule import Rule
from miras.variants import VARIANTS, variant

DOCS = Path(__file__).parent
BASES: dict[str, type[Axis]] = {"memory": Memory, "bias": Bias, "retention": Retention, "algorithm": Algorithm}
QUESTIONS = {
    "memory": "what stores",
    "bias": "what it is trained to do",
    "retention": "what it keeps",
    "algorithm": "how it is trained",
}
TITLES = {
    "memory": "Memory architecture",
    "bias": "Attentional bias",
    "retention": "Retention gate",
    "algorithm": "Memory learning algorithm",
}
DRAWN = {
    "memory": (
        "Left: its matrices to scale, with the side that channel gates act on. Right: the numbers in the state of a "
        "head, grey for the other memories."
    ),
    "bias": (
        "Left: the loss of one coordinate against its error. Right: the gradient that is written. Gates have their "
        "initial values where nothing else is said; grey is `L2`."
    ),
    "retention": (
        "Left: the link, the weight of one entry against its dual, the seven others of its slice fixed; dotted is one "
        "of those. Right: that entry over tokens after one write, decaying to zero (solid) or to the initial memory "
        "(dashed)."
    ),
    "algorithm": (
        "Left: what is peculiar to it. Right: what is read at a key while the same pair comes again and again, from an "
        "empty matrix with the `L2` bias and keys of norm 1."
    ),
}
# How chunks act where combinations are counted.
FRAMES: tuple[dict[str, Any], ...] = ({"chunk": 1}, {"chunk": 16}, {"chunk": 16, "step_at": "chunk"})
# README's table of models stands between these.
TABLE = ("<!-- miras list -->", "<!-- end -->")
NOTE = "<!-- Written by `make docs` from the docstrings; edit those. -->"


def main() -> int:
    """Write or check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only say what is out of date")
    if parser.parse_args().check:
        stale = out_of_date()
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date")
        if stale:
            print("Run: python docs/generate.py (or: make docs)")
        return int(bool(stale))
    write()
    return 0


def pages() -> dict[Path, str]:
    """The text of every page."""
    return {
        DOCS.parent / "README.md": readme(),
        DOCS / "design-space.md": space_page(),
        **{DOCS / "axes" / f"{axis}.md": axis_page(axis) for axis in AXES},
    }


def drawings() -> dict[Path, type[Axis] | None]:
    """What each drawing shows: a class, or None for the whole space."""
    classes = (cls for base in BASES.values() for cls in choices(base).values())
    return {DOCS / "design-space.svg": None, **{DOCS / "axes" / drawing_of(cls): cls for cls in classes}}


def out_of_date() -> list[Path]:
    """Pages whose text is another, drawings that are missing, and drawings of what is no longer there."""
    stale = [p for p, text in pages().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    drawn = drawings()
    missing = [path for path in drawn if not path.is_file()]
    return stale + missing + [path for path in sorted((DOCS / "axes").glob("*.svg")) if path not in drawn]


def write() -> None:
    """Write all pages and drawings, and remove drawings of what is no longer there."""
    sys.path.insert(0, str(DOCS))
    import plots  # matplotlib takes seconds to import, and checking needs none of it

    (DOCS / "axes").mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    drawn = drawings()
    for path, cls in drawn.items():
        plots.write_svg(plots.space if cls is None else lambda cls=cls: plots.figure_of(cls), path)
    for path in (DOCS / "axes").glob("*.svg"):
        if path not in drawn:
            path.unlink()


def drawing_of(cls: type[Axis]) -> str:
    """The name of a class' drawing."""
    return f"{cls.axis}_{cls.__name__.lower()}.svg"


# -- one axis --------------------------------------------------------------------------------------------------------


def axis_page(axis: str) -> str:
    """One page: what the axis is, then a section for each class."""
    known = {part.name: part for part in parts(axis)}
    lines = [
        NOTE,
        "",
        f"# {TITLES[axis]}: {QUESTIONS[axis]}",
        "",
        "[The design space](../design-space.md) | "
        + " | ".join(f"**{a}**" if a == axis else f"[{a}]({a}.md)" for a in AXES),
        "",
        BASES[axis].__doc__.strip().split("\n\n")[0],  # type: ignore[union-attr]
        "",
        DRAWN[axis],
        "",
        "| | formula |",
        "|---|---|",
        *(f"| [{name}](#{name.lower()}) | `{_cell(known[name].formula)}` |" for name in used_first(axis)),
        "",
    ]
    for name in used_first(axis):
        lines += section(axis, known[name])
    return "\n".join(lines).rstrip("\n") + "\n"


def section(axis: str, part: Part) -> Iterator[str]:
    """The section of one class."""
    cls = choices(BASES[axis])[part.name]
    yield from (f"## {part.name}", "", "```python", _call(axis, part), "```", "", "```text", part.formula, "```", "")
    if part.intuition:
        yield from (part.intuition, "")
    yield from (f"**Choose it** {part.choose.removeprefix('Choose it ')}", "")
    yield from (f"![{TITLES[axis]} {part.name}]({drawing_of(cls)})", "")
    for name, meaning in part.meaning.items():
        yield f"- `{name}`: {meaning}"
    for gate in cls().gates if hasattr(cls(), "gates") else ():
        yield f"- gate `{gate.name}`: {gate.meaning}"
    models = ", ".join(f"`{name}`" for name in models_with(cls))
    yield from (f"- known models with it: {models or 'none yet'}", "")


def models_with(cls: type[Axis]) -> list[str]:
    """The variants that have a class."""
    rules = {name: mixer for name in VARIANTS if isinstance(mixer := variant(name), Rule)}
    return [name for name, rule in rules.items() if type(getattr(rule, cls.axis)) is cls]


def used_first(axis: str) -> list[str]:
    """The classes of an axis, those of the most known models first."""
    known = choices(BASES[axis])
    return sorted(known, key=lambda name: -len(models_with(known[name])))


def _call(axis: str, part: Part) -> str:
    """The class with its defaults, over several lines where it is long."""
    # Written as the formatter, which also formats code in documents, would write it.
    values = {n: f'"{x}"' if isinstance(x, str) else repr(x) for n, x in part.arguments.items()}
    words = [f"{name}={value}" for name, value in values.items()]
    line = f"miras.{axis}.{part.name}({', '.join(words)})"
    return line if len(line) <= 100 else f"miras.{axis}.{part.name}(\n    " + ",\n    ".join(words) + ",\n)"


# -- the space -------------------------------------------------------------------------------------------------------


def space_page() -> str:
    """The page of the whole space."""
    counts = [len(choices(base)) for base in BASES.values()]
    product, possible, parallel = counted()
    table = rows()
    lines = [
        NOTE,
        "",
        "# The design space",
        "",
        "A sequence layer is a memory that learns a map from keys to values while it reads. Four choices fix it"
        " ([arXiv 2504.13173](https://arxiv.org/abs/2504.13173)):",
        "",
        "    A_t = alpha_t A_{t-1} - step_t          step_t from the algorithm, of the gradient of L(M(W, k_t), v_t)",
        "    W_t = link(A_t)                         y_t = M(W_t, q_t)",
        "",
        "| axis | question | there is |",
        "|---|---|---|",
    ]
    for axis in AXES:
        names = ", ".join(f"[{n}](axes/{axis}.md#{n.lower()})" for n in used_first(axis))
        lines.append(f"| [{axis}](axes/{axis}.md) | {QUESTIONS[axis]} | {names} |")
    lines += [
        "",
        f"That makes {' x '.join(map(str, counts))} = {product:,} combinations of classes, before any argument is "
        f"chosen. {possible:,} of them go together; the rest is refused with the reason, such as a closed form for a "
        f"memory that it does not hold for. {parallel:,} have an engine that is parallel over tokens, or with one step "
        "a chunk over those of a chunk; the others run in the token loop, which defines them all. Besides the four "
        "choices a `miras.Rule` says how chunks act: their length, where gradients are taken, where a link acts, "
        "windows, one step a token or a chunk.",
        "",
        "## The known models in it",
        "",
        "Columns are biases and rows are retention gates, the most used first; the colour is the memory and the marker "
        "the algorithm. Empty cells are models without a name.",
        "",
        "![Known models by bias and retention](design-space.svg)",
        "",
        "| model | memory | bias | retention | algorithm | update | from |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells = [f"`{row['name']}`", *(_cell(row[axis]) for axis in AXES)]
        paper = VARIANTS[row["name"]].paper
        update = f"`{_cell(row['update'])}`" + (f"; {row['inputs']}" if row["inputs"] else "")
        lines.append(f"| {' | '.join(cells)} | {update} | {_linked(paper)} |")
    lines += [
        "",
        "`miras list` prints this table, `miras list --axes` the classes, `miras explain NAME` one model with its "
        "gates and sizes. Attention keeps every key and value instead of learning, so it stands in the table by the "
        "paper's words, not as a product of these classes.",
        "",
        "A gate, bias, memory or algorithm of one's own is one class in one file: "
        "[CONTRIBUTING.md](../CONTRIBUTING.md). Where the paper is silent or wrong: [choices.md](choices.md).",
    ]
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with its table of models as it is now."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    lines = ["| name | memory | bias | retention | algorithm | engine | checked against | error |", "|" + "---|" * 8]
    for row in rows():
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        cells = [row["name"], *(row[axis] for axis in AXES), row["engines"][0], row["oracle"] or "nothing yet", error]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([before + TABLE[0], *lines, TABLE[1] + after])


def counted() -> tuple[int, int, int]:
    """Combinations of classes: all, those that make a rule with some arguments, those of them with a fast engine."""
    groups = [[list(_instances(cls)) for cls in choices(base).values()] for base in BASES.values()]
    product = possible = parallel = 0
    for combination in itertools.product(*groups):
        product += 1
        made = list(_rules(combination))
        possible += bool(made)
        parallel += any(plan(rule).name != "recurrence" for rule in made)
    return product, possible, parallel


def _instances(cls: Callable[..., Any]) -> Iterator[Any]:
    """The default, and what starts from or decays to a learned memory."""
    part = cls()
    yield part
    names = [field.name for field in fields(part)]
    for name, value in (("start", "learned"), ("to", "initial")):
        if name in names:
            try:
                yield replace(part, **{name: value})
            except UsageError:
                continue


def _rules(combination: tuple[list[Any], ...]) -> Iterator[Rule]:
    for picked in itertools.product(*combination):
        for frame in FRAMES:
            try:
                yield Rule(*picked, **frame)
            except UsageError:
                continue


def _cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|")


def _linked(paper: str) -> str:
    kind, _, number = paper.partition(" ")
    return f"[{number}](https://arxiv.org/abs/{number})" if kind == "arXiv" else paper


if __name__ == "__main__":
    sys.exit(main())
