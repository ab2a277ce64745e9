"""The axes and the variants in words and formulas: what `miras list` and `miras explain` show."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from miras.attention import Attention
from miras.engines import explain
from miras.errors import UsageError
from miras.gates import Gate
from miras.mixer import Mixer
from miras.registry import Axis, choices, to_config
from miras.rule import Rule
from miras.variants import VARIANTS, variant

# Written by tests/oracles/measure.py: {variant: {oracle, error}}.
ORACLES = Path(__file__).with_name("oracles.json")
AXES = ("memory", "bias", "retention", "algorithm")


def rows() -> list[dict[str, Any]]:
    """The table of variants as plain values: name, the four choices, update, engines, oracle, error.

    `error` is the largest deviation measured against the oracle, of outputs, memory and gradients, in float64.
    """
    table, oracles = [], json.loads(ORACLES.read_text(encoding="utf-8"))
    for name, entry in VARIANTS.items():
        mixer, known = variant(name), oracles.get(name, {"oracle": None, "error": None})
        table.append({"name": name, **mixer.describe(), "engines": engines(mixer), **known, "paper": entry.paper})
    return table


def engines(mixer: Mixer) -> list[str]:
    """The engines that can run a mixer, the one that is chosen first."""
    if isinstance(mixer, Rule):
        return [name for name, said in explain(mixer).items() if said in ("chosen", "possible")]
    return ["sdpa"]


class Part(NamedTuple):
    """A class of an axis as its docstring tells it.

    Attributes:
        name: of the class.
        formula: the docstring's first line, with the equation or the paper.
        arguments: {name: default}, as in a configuration.
        intuition: the paragraphs after the formula, lines as they are; empty: none.
        choose: the paragraph that begins "Choose it", on one line.
        meaning: {argument: what it is}, each on one line.
    """

    name: str
    formula: str
    arguments: dict[str, Any]
    intuition: str
    choose: str
    meaning: dict[str, str]


def parts(axis: str) -> list[Part]:
    """What exists on one of `AXES`, in order of definition."""
    base = next(cls for cls in Axis.__subclasses__() if getattr(cls, "axis", None) == axis)
    return [_part(cls) for cls in choices(base).values()]


def axes() -> dict[str, list[dict[str, Any]]]:
    """What exists on each axis as plain values: name, formula, arguments."""
    return {a: [{"name": p.name, "formula": p.formula, "arguments": p.arguments} for p in parts(a)] for a in AXES}


def _part(cls: type[Axis]) -> Part:
    formula, _, rest = (inspect.getdoc(cls) or cls.__name__).partition("\n")
    body, _, args = rest.partition("\nArgs:\n")
    paragraphs = body.strip("\n").split("\n\n")
    choose = [p for p in paragraphs if p.startswith("Choose it ")]
    intuition = "\n\n".join(p for p in paragraphs if p not in choose)
    config, arguments = to_config(cls()), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        arguments[field.name] = config[field.name] if callable(field.default) else field.default
    return Part(cls.__name__, formula, arguments, intuition, " ".join(" ".join(choose).split()), _meaning(args))


def about(cls: type) -> tuple[str, dict[str, str]]:
    """A class' docstring up to its arguments, and what these are."""
    text, _, args = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    return text.strip(), _meaning(args.partition("\nRaises:")[0])


def _meaning(args: str) -> dict[str, str]:
    """The entries of an "Args:" section; an entry goes on where lines are indented further."""
    entries: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(args).splitlines():
        if not line[:1].isspace() and ": " in line:
            name, _, line = line.partition(": ")
        if name:
            entries[name] = f"{entries.get(name, '')} {line.strip()}".strip()
    return entries


def explanation(title: str, mixer: Mixer, heads: int, head_dim: int) -> str:
    """A mixer as formulas, gates, sizes and engines.

    Args:
        title: what to call it.
        mixer: a `Rule` or `Attention`.
        heads: heads of a layer, for its size.
        head_dim: size of each.

    Raises:
        UsageError: sizes below 1.
    """
    if heads < 1 or head_dim < 1:
        raise UsageError(f"--heads {heads} --head-dim {head_dim}: expected at least 1.")
    said = mixer.describe()
    lines = [title, "", f"  {said['update']}", ""]
    lines += _axes(mixer, said)
    lines += _gates(mixer)
    lines += _sizes(mixer, heads, head_dim)
    lines += _engines(mixer)
    return "\n".join(lines)


def _axes(mixer: Mixer, said: dict[str, str]) -> list[str]:
    lines = []
    for axis in AXES:
        lines.append(f"  {axis:<10} {said[axis]}")
        if isinstance(mixer, Rule):
            lines.append(f"             {getattr(mixer, axis).formula}")
    if isinstance(mixer, Rule):
        at = "the decayed memory" if mixer.gradient_at == "decayed" else "the memory before the token"
        if mixer.chunk > 1:
            at = f"the memory that a chunk of {mixer.chunk} tokens begins with"
        lines.append(f"  gradient   at {at}")
        if said["inputs"]:
            lines.append(f"  inputs     {said['inputs']}")
    return [*lines, ""]


def _gates(mixer: Mixer) -> list[str]:
    gates = mixer.gates
    if not gates:
        return ["  no gates", ""]
    wide = max(len(gate.name) for gate in gates)
    lines = [f"  {'gate':<{wide}}  {'range':<11}  {'at first':<9}  meaning"]
    for gate in gates:
        first = _at_first(mixer, gate)
        lines.append(f"  {gate.name:<{wide}}  {_range(gate):<11}  {first:<9}  {gate.meaning}")
    return [*lines, ""]


def _at_first(mixer: Mixer, gate: Gate) -> str:
    """What a fresh layer gives a gate, in a word or a number."""
    retention = gate.name.startswith("log_")
    word = ""
    if isinstance(mixer, Rule) and (retention or gate.name == "eta"):
        word = mixer.inputs.alpha if retention else mixer.inputs.eta
    if gate.vector:
        return "of k"
    if word in ("", "layer", "head", "channel"):
        return "spread" if retention else f"{gate.init:g}"
    return {"none": "0", "one": "1"}.get(word, word)


def _range(gate: Gate) -> str:
    low = "(-inf" if math.isinf(gate.low) else f"[{gate.low:g}"
    high = "inf)" if math.isinf(gate.high) else f"{gate.high:g}]"
    return f"{low}, {high}"


def _sizes(mixer: Mixer, heads: int, head_dim: int) -> list[str]:
    listed = Attention().state_bytes(heads, head_dim, head_dim, 1)
    lines = [f"  sizes with {heads} heads of {head_dim}, in float32"]
    if isinstance(mixer, Rule):
        leaves = mixer.leaves(head_dim, head_dim)
        slow = sum(size for size, _ in mixer.slow(head_dim, head_dim).values())
        learned = sum(leaf.rows * leaf.cols for leaf in leaves.values() if leaf.std) + slow
        state = mixer.state_bytes(heads, head_dim, head_dim, 1)
        shapes = ", ".join(f"{name} {leaf.rows} x {leaf.cols}" for name, leaf in leaves.items())
        lines += [
            f"    matrices    {shapes}",
            f"    parameters  {learned:,} a head, the initial memory"
            if learned
            else "    parameters  none: it starts at zero",
            f"    state       {state // heads:,} bytes a head, {state:,} a layer, at any length",
            f"    break-even  {-(-state // listed):,} tokens; a cache of keys and values takes {listed:,} bytes each",
        ]
        return [*lines, ""]
    state = [f"{mixer.state_bytes(heads, head_dim, head_dim, n):,} after {n:,}" for n in (256, 4096, 65536)]
    return [*lines, "    parameters  none", f"    state       bytes a layer: {', '.join(state)} tokens", ""]


def _engines(mixer: Mixer) -> list[str]:
    if not isinstance(mixer, Rule):
        return ["  engine     PyTorch's scaled_dot_product_attention"]
    return [f"  engine     {name:<10}  {said}" for name, said in explain(mixer).items()]
