"""What the contract tests run on: instances of every axis, rules made of them, and random problems.

A new memory, bias, retention or algorithm needs one line in the tuple of its axis here (`test_contract.py` fails until
it has one); every battery then runs on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import miras
from miras import algorithm, bias, memory, retention
from miras.errors import UsageError
from miras.rule import Rule, State
from miras.state import tensors

MEMORIES = (
    memory.Linear(),
    memory.Linear(start="learned"),
    memory.Linear(gated="values", start="learned"),
    memory.Vector(),
    memory.Vector(start="learned"),
    memory.MLP(),
    memory.MLP(layers=3, expansion=2, activation="silu"),
    memory.MLP(expansion=2, residual=False, norm=False),
    memory.MLP(layers=1, norm=False),
)
BIASES = (
    bias.Dot(),
    bias.Dot(clip=True),
    bias.L2(),
    bias.L2(clip=True),
    bias.L1(),
    bias.L1(form="paper", sharpness=5.0),
    bias.Lp(),
    bias.Lp(p=1.5),
    bias.Lp(p=2.5, form="paper"),
    bias.Huber(),
    bias.Huber(form="norm"),
    bias.Huber(form="mixture", clip=True),
)
RETENTIONS = (
    retention.NoRetention(),
    retention.NoRetention(to="initial"),
    retention.L2(),
    retention.L2(to="initial"),
    retention.KL(),
    retention.KL(to="initial"),
    retention.Lq(),
    retention.Lq(to="initial"),
    retention.Lq(q=3.0, link="mirror"),
    retention.Lq(q=1.5, link="mirror", to="initial"),
)
ALGORITHMS = (
    algorithm.GradientDescent(),
    algorithm.GradientDescent(rate="input"),
    algorithm.Momentum(),
    algorithm.Momentum(rate="input"),
)
AXES = {memory.Memory: MEMORIES, bias.Bias: BIASES, retention.Retention: RETENTIONS, algorithm.Algorithm: ALGORITHMS}


class Case(NamedTuple):
    """A rule, and whether its gates are given per channel."""

    rule: Rule
    channels: bool

    def __str__(self) -> str:
        r = self.rule
        frame = f"{r.chunk}-{r.gradient_at}-{r.link_at}-{'channel' if self.channels else 'head'}"
        return f"{r.memory}-{r.bias}-{r.retention}-{r.algorithm}-{frame}"


FRAMES = ((1, 4), ("previous", "decayed"), ("token", "chunk"), (False, True))  # chunk, gradient_at, link_at, channels
FACTORS = (MEMORIES, BIASES, RETENTIONS, ALGORITHMS, *FRAMES)


def case(mem, loss, gate, learner, chunk, gradient_at, link_at, channels) -> Case | None:
    """The case of these choices, or None where they do not go together."""
    # One eta for both matrices of an MLP makes the inner loop chaotic: no two evaluations of it can agree to 1e-9.
    if isinstance(mem, memory.MLP) and learner.rate == "none":
        return None
    try:
        return Case(Rule(mem, loss, gate, learner, chunk, gradient_at, link_at), channels)
    except UsageError:
        return None


def rules() -> list[Case]:
    """Rules such that every two choices that go together meet in one of them."""
    dice = random.Random(0)
    indices = [range(len(f)) for f in FACTORS]
    pairs = [
        (a, i, b, j)
        for (a, first), (b, second) in itertools.combinations(enumerate(indices), 2)
        for i in first
        for j in second
    ]
    covered: set[tuple[int, int, int, int]] = set()
    found: list[Case] = []
    for a, i, b, j in pairs:
        if (a, i, b, j) in covered:
            continue
        best, gain = None, -1
        for _ in range(40):
            pick = [dice.choice(r) for r in indices]
            pick[a], pick[b] = i, j
            made = case(*(f[n] for f, n in zip(FACTORS, pick, strict=True)))
            if made is None:
                continue
            # A field that the rule has normalised covers what it became.
            pick[6] = FACTORS[6].index(made.rule.link_at)
            meets = {(x, pick[x], y, pick[y]) for x, y in itertools.combinations(range(len(pick)), 2)}
            if (a, i, b, j) in meets and len(meets - covered) > gain:
                best, gain, kept = made, len(meets - covered), meets
        if best is not None:
            found.append(best)
            covered |= kept
    return found


def product(mem, gate) -> list[Case]:
    """All choices of bias and algorithm with a memory and a retention, the frames taken in turn."""
    frames = itertools.cycle(itertools.product(*FRAMES))
    found = []
    for loss, learner in itertools.product(BIASES, ALGORITHMS):
        tried = (case(mem, loss, gate, learner, *next(frames)) for _ in range(16))
        found += [made for made in tried if made is not None][:1]
    return found


RULES = rules()
FEW = RULES[::6]


class Tokens(NamedTuple):
    """A stretch of sequence: q, k [B, T, H, d_k], v [B, T, H, d_v], gates {name: [B, T, H, 1 | d]}."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(fn(self.q), fn(self.k), fn(self.v), {n: fn(g) for n, g in self.gates.items()})

    def part(self, start: int = 0, stop: int | None = None, row: int | None = None) -> Tokens:
        rows = slice(None) if row is None else slice(row, row + 1)
        return self.map(lambda x: x[rows, start:stop])

    def named(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.gates}


# Centres of the gates: enough decay, momentum and extreme tokens to be seen. Larger steps make some rules (three layers
# with KL) so ill-conditioned that the token loop itself, on inputs that differ by 1e-15, moves by more than 1e-9.
CENTRES = {"log_alpha": -0.1, "eta": 0.1, "theta": 0.5, "delta": 1.0}
ETA_MOST = 0.2


def draw_gates(rule: Rule, shape: tuple[int, ...], channels: int | None = None, centres=CENTRES) -> dict[str, Tensor]:
    """Random gates in float64, spread around `centres`; of that many channels wherever the rule permits."""
    gates = {}
    for gate in rule.gates:
        gate = replace(gate, high=min(gate.high, ETA_MOST)) if gate.name == "eta" else gate
        alone = not gate.channel or (gate.name != "delta" and rule.channel_conflict(channels or 4, channels or 4))
        width = 1 if channels is None or alone else channels
        raw = torch.randn(*shape, width, dtype=torch.float64)
        # A bias or a retention may allow less than the centre; half of its range then.
        centre = min(centres[gate.name], gate.high / 2) if gate.high > 0 else centres[gate.name]
        gates[gate.name] = gate.squash(raw + gate.unsquash(centre))
    return gates


def draw_tokens(rule: Rule, batch=2, time=13, heads=2, d_k=4, d_v=None, channels=False, centres=CENTRES) -> Tokens:
    """Queries and keys of norm 1, values of order 1, random gates, in float64."""
    d_v = d_v or d_k
    q, k = (F.normalize(torch.randn(batch, time, heads, d_k, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(batch, time, heads, d_v, dtype=torch.float64)
    return Tokens(q, k, v, draw_gates(rule, (batch, time, heads), d_k if channels else None, centres))


def draw_memory(rule: Rule, heads=2, d_k=4, d_v=None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random initial memory and random slow parameters, in float64."""
    weights = {n: w.double() for n, w in rule.initial(heads, d_k, d_v or d_k).items()}
    slow = {
        n: w.double() + 0.2 * torch.randn(w.shape).double()
        for n, w in rule.initial_slow(heads, d_k, d_v or d_k).items()
    }
    return weights, slow


def call(mixer, tokens: Tokens, state=None, **options):
    """`miras.run` on tokens."""
    return miras.run(mixer, tokens.q, tokens.k, tokens.v, tokens.gates, state=state, **options)


def own(state) -> dict[str, Tensor]:
    """The tensors of a state that belong to its rows, by name."""
    return {n: x for n, x in tensors(state).items() if n.split(".")[0] not in state.shared}


def as_leaves(state: State) -> State:
    """The state with every floating-point tensor a leaf of its own; what is one tensor in two places stays one."""
    made: dict[int, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return made.setdefault(id(x), x.detach().clone().requires_grad_())

    return state.map(leaf, shared=True)


def assert_same(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal to `tolerance` times the largest entry expected; NaN is never equal."""
    scale = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        got,
        expected,
        rtol=0,
        atol=tolerance * max(scale, 1e-3),
        msg=lambda text: f"{what}: {text}\n(scale {scale:.3g})",
    )


def assert_same_states(got, expected, tolerance: float) -> None:
    """Equal tensor by tensor; counts exactly."""
    assert own(got).keys() == own(expected).keys()
    for name, x in own(expected).items():
        if x.is_floating_point():
            assert_same(own(got)[name], x, tolerance, name)
        else:
            assert torch.equal(own(got)[name], x), name
