"""The presets on the inputs of their oracles, and how far apart the two are."""

from __future__ import annotations

from dataclasses import replace

import torch
from oracles.table import ORACLES
from torch import Tensor

import miras
from miras import variants
from miras.algorithm import MiniBatch
from miras.retention import sphere
from miras.rule import Rule

# What a preset is made with and its oracle called with, where that differs from the table's constants.
MADE = {
    "atlas": {"chunk": 1, "window": 3},
    "sliding_window": {"window": 5},
    **{n: {"chunk": 3} for n in ("moneta", "yaad", "memora", "titans", "mneme")},
    **{n: {"chunk": 4} for n in ("ttt_linear", "ttt_mlp", "lact")},
}
CALLED = {
    "atlas": {"to": "initial"},
    "ttt_linear": {"eps": 1e-5},
    "ttt_mlp": {"eps": 1e-5},
    "lact": {"eps": 0.0},
}
# Newton-Schulz amplifies rounding: two right float64 implementations differ by up to 1e-10.
TOLERANCE = {"atlas": 1e-9, "lact": 1e-9}


def preset(name: str) -> miras.Mixer:
    """The preset. TTT's oracles have one eta for all matrices, so they are compared without eta over input power."""
    mixer = getattr(variants, name)(**MADE.get(name, {}))
    return replace(mixer, algorithm=MiniBatch()) if name.startswith("ttt") else mixer


def call(name: str, x: dict[str, Tensor], engine: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The preset on an oracle's inputs, (y, memory) as the oracle returns them."""
    mixer = preset(name)
    if not isinstance(mixer, Rule):
        return miras.run(mixer, x["q"], x["k"], x["v"])[0], {}
    x = dict(x)
    x.setdefault("eta", x["dt"] if "dt" in x else torch.ones_like(x["v"][..., :1]))
    if "log_gamma" in x:
        x["log_alpha"] = x["log_gamma"].expand(*x["q"].shape[:3], 1)
    if "dt" in x:
        x["log_alpha"] = -x["rate"] * x["dt"]
    if name == "lact":
        x["log_alpha"] = torch.zeros_like(x["eta"])
    if "k" not in x:
        x["k"] = 1 - x["log_alpha"].exp()
    slow = {n: x[n] for n in ("norm_scale", "norm_shift") if n in x}
    if "ridge" in x:
        slow["ridge"] = x["ridge"].expm1().log()  # the rule takes the softplus of it
    biases = {"w": "b", "w1": "b1", "w2": "b2"}
    weights = {n: torch.cat([x[n], x[b]], -1) if b in x else x[n] for n, b in biases.items() if n in x}
    weights |= {n: x[n] for n in ("w3", "h") if n in x}
    if name == "ttt_linear":
        weights = {"w1": weights.pop("w")}
    gates = {g.name: x[g.name] for g in mixer.gates}
    state = mixer.init(weights, slow, batch=x["q"].shape[0])
    y, state = miras.run(mixer, x["q"], x["k"], x["v"], gates, state, engine=engine)
    memory = dict(state.dual)
    if name.startswith("ttt"):
        for n in list(memory):
            memory[n], memory[biases["w" if name == "ttt_linear" else n]] = memory[n].split(
                [memory[n].shape[-1] - 1, 1], -1
            )
        memory = {("w" if name == "ttt_linear" and n == "w1" else n): a for n, a in memory.items()}
    return y, memory


def inputs(name: str, d: int, wider: int) -> dict[str, Tensor]:
    """Random inputs; without what the preset does not have."""
    drawn = ORACLES[name].draw(d=d, wider=wider, expansion=2 if name == "lact" else 4)
    return {n: x for n, x in drawn.items() if not (name == "lact" and n == "theta")}


def on_sphere(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """LaCT's initial rows with the norm that rows of `Sphere` always have; a row's own length is lost in ours."""
    rows = {n: x[n] / x[n].norm(dim=-1, keepdim=True) for n in ("w1", "w2", "w3")}
    return x | {n: rows[n] * leaf.std * leaf.cols**0.5 for n, leaf in preset("lact").leaves(4, 4).items()}


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry expected; NaN stays NaN."""
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def measure(name: str, engine: str = "auto") -> dict[str, float]:
    """How far a preset is from its oracle in float64, by what is compared: y, memory and every gradient."""
    torch.manual_seed(0)
    sizes = (16, 16) if engine == "native" else (4, 1)  # its heads come in strips
    drawn, eps = inputs(name, *sizes), sphere.EPS
    constants = {**ORACLES[name].constants, **CALLED.get(name, {})}
    theirs, ours = ({n: x.clone().requires_grad_() for n, x in drawn.items()} for _ in range(2))
    sphere.EPS = 0.0 if name == "lact" else eps
    prepared = on_sphere if name == "lact" else dict
    try:
        y, memory = call(name, prepared(ours), engine)
    finally:
        sphere.EPS = eps
    y_theirs, memory_theirs = ORACLES[name].call(prepared(theirs), **constants)
    found = {"y": (y, y_theirs), **{n: (memory[n], memory_theirs[n]) for n in memory_theirs}}
    cotangents = [torch.randn_like(a) for a, _ in found.values()]
    sides = []
    for which, leaves in ((0, ours), (1, theirs)):
        total = sum((pair[which] * c).sum() for pair, c in zip(found.values(), cotangents, strict=True))
        sides.append(torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True))
    errors = {n: apart(*(x.detach() for x in pair)) for n, pair in found.items()}
    return errors | {f"gradient of {n}": apart(a, b) for n, a, b in zip(drawn, *sides, strict=True)}
