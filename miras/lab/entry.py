"""Who takes part in a scenario: a rule with constant gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from miras.algorithm import Algorithm, GradientDescent
from miras.bias import Bias
from miras.errors import UsageError, near
from miras.memory import MLP, Linear, Memory
from miras.mixer import Mixer
from miras.retention import L2, Retention
from miras.rule import Rule
from miras.train.config import load_config, names_file
from miras.variants import DEFAULT_CHUNK, VARIANTS, variant

ETA, LOG_ALPHA = "eta", "log_alpha"


@dataclass(frozen=True)
class Entry:
    """A rule under a name.

    Args:
        name: what to call it.
        rule: the rule.
        gates: constant values of its gates; what is left out has the gate's initial value, and eta is searched for.

    Raises:
        UsageError: no such gate, or a value out of its range.
    """

    name: str
    rule: Rule
    gates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {g.name: g for g in self.rule.gates if not g.vector}
        for name, value in self.gates.items():
            if name not in known:
                raise UsageError(f"{self.name} has no gate {name!r}." + near(name, known))
            if not known[name].low <= value <= known[name].high:
                said = f"[{known[name].low:g}, {known[name].high:g}]"
                raise UsageError(f"{self.name}: gate {name} = {value:g}, expected a value in {said}.")

    def with_gates(self, gates: Mapping[str, float]) -> Entry:
        """The entry with those of `gates` set that its rule has."""
        own = {g.name for g in self.rule.gates}
        return replace(self, gates={**self.gates, **{n: x for n, x in gates.items() if n in own}})

    def values(self) -> dict[str, float]:
        """All gates that are numbers."""
        return {g.name: self.gates.get(g.name, g.init) for g in self.rule.gates if not g.vector}


def deep(bias: Bias, retention: Retention | None = None, algorithm: Algorithm | None = None) -> Rule:
    """A twin of Yaad: its memory, its chunk and, where nothing else is said, its retention and algorithm."""
    retention, algorithm = retention or L2(to="initial"), algorithm or GradientDescent(rate="input")
    return Rule(MLP(), bias, retention, algorithm, DEFAULT_CHUNK)


def matrix(bias: Bias, retention: Retention | None = None, memory: Memory | None = None) -> Rule:
    """A twin of Gated DeltaNet: a matrix that starts at zero and learns at every token."""
    return Rule(memory or Linear(), bias, retention or L2(), GradientDescent())


def entry(name: str, mixer: Mixer | None = None, tau: float | None = None) -> Entry:
    """A variant, a rule under a name, or the rule in a file.

    Args:
        name: a variant, a .yaml or .json file as for `miras train`, or what to call `mixer`.
        mixer: a rule of one's own.
        tau: its time constant in tokens: retention alpha = exp(-1 / tau); None: the gate's initial value.

    Raises:
        UsageError: an unknown name, a bad file or one with several rules, or attention, which has no fixed-size memory
            to look into.
    """
    if mixer is None:
        if names_file(name):
            config = load_config(name, {})
            name, mixer = config.model, config.mixer_of_all
        else:
            mixer = variant(name)
    if not isinstance(mixer, Rule):
        rules = ", ".join(n for n in VARIANTS if isinstance(variant(n), Rule))
        raise UsageError(f"{name} keeps all pairs and has no memory to look into; expected a rule: {rules}.")
    made = Entry(name, mixer)
    return made if tau is None else made.with_gates({LOG_ALPHA: log_alpha(tau)})


def log_alpha(tau: float) -> float:
    """Retention of a time constant in tokens.

    Raises:
        UsageError: it is not above 0.
    """
    if not tau > 0:
        raise UsageError(f"tau is {tau:g}; expected a number of tokens above 0 (inf: nothing decays).")
    return 0.0 if math.isinf(tau) else -1 / tau
