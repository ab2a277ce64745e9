"""What the contract tests run on: instances of every axis, rules made of them, and random problems.

A new memory, bias, retention or algorithm needs one line in the tuple of its axis here (`test_contract.py` fails until
it has one); every battery then runs on it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
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
    memory.MLP(layers=1, bias=True),
    memory.MLP(expansion=2, activation="gelu_tanh", bias=True),
    memory.SwiGLU(),
    memory.Polynomial(start="learned"),
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
    bias.Robust(),
    bias.Custom(),
    bias.Erase(),
    bias.Erase(along="key"),
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
    retention.Bregman(),
    retention.Bregman(potential="hypentropy", to="initial"),
    retention.Bregman(potential="entropy"),
    retention.FDivergence(),
    retention.FDivergence(f="hellinger", to="initial"),
    retention.LocalFDivergence(),
    retention.ElasticNet(),
    retention.LocalElasticNet(gamma=0.01),
    retention.Sphere(),
    retention.TwoSided(),
)
ALGORITHMS = (
    algorithm.GradientDescent(),
    algorithm.GradientDescent(rate="input"),
    algorithm.Momentum(),
    algorithm.Momentum(rate="input"),
    algorithm.MiniBatch(rate="input"),
    algorithm.Implicit(),
    algorithm.LeastSquares(),
    algorithm.GradientDescent(steps=2),
    algorithm.Muon(),
    algorithm.Muon(momentum=False, schedule="lact"),
)
AXES = {memory.Memory: MEMORIES, bias.Bias: BIASES, retention.Retention: RETENTIONS, algorithm.Algorithm: ALGORITHMS}


class Case(NamedTuple):
    """A rule, and whether its gates are given per channel."""

    rule: Rule
    channels: bool

    def __str__(self) -> str:
        r = self.rule
        frame = f"{r.chunk}-{r.gradient_at}-{r.link_at}-{'channel' if self.channels else 'head'}"
        more = [f"{n}={getattr(r, n)}" for n in ("window", "step_at", "read_at") if getattr(r, n) != getattr(PLAIN, n)]
        return "-".join([f"{r.memory}-{r.bias}-{r.retention}-{r.algorithm}-{frame}", *more])


PLAIN = Rule(memory.Linear(), bias.L2(), retention.L2(), algorithm.GradientDescent())
FRAMES = {
    "chunk": (1, 4),
    "gradient_at": ("previous", "decayed"),
    "link_at": ("token", "chunk"),
    "window": (1, 3),
    "step_at": ("token", "chunk"),
    "read_at": ("after", "before"),
}
FACTORS = {"memory": MEMORIES, "bias": BIASES, "retention": RETENTIONS, "algorithm": ALGORITHMS, **FRAMES}
CHANNELS = (False, True)


def case(channels: bool = False, **choices) -> Case | None:
    """The case of these choices, or None where they do not go together."""
    try:
        return Case(Rule(**choices), channels)
    except UsageError:
        return None


def rules() -> list[Case]:
    """Rules with every instance of every axis, and such that every two classes or frames that go together meet."""
    dice = random.Random(0)
    factors = {**FACTORS, "channels": CHANNELS}

    def meetings(pick) -> set:
        kinds = [(n, type(x) if n in AXIS_NAMES else x) for n, x in pick.items()]
        return {*itertools.combinations(kinds, 2), *((n, str(pick[n])) for n in AXIS_NAMES)}

    def draw(fixed) -> tuple[Case, set] | None:
        pick = {n: dice.choice(f) for n, f in factors.items()}
        # The rarer frames exclude many choices.
        pick |= {n: getattr(PLAIN, n) for n in ("gradient_at", "window", "step_at", "read_at") if dice.random() < 0.6}
        made = case(**{**pick, **fixed})
        if made is None:
            return None
        # A field that the rule has normalised covers what it became.
        became = {n: getattr(made.rule, n) for n in ("link_at", "step_at")}
        return made, meetings({**pick, **fixed, **became})

    wanted = [{a: x, b: y} for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]]
    covered: set = set()
    found: list[Case] = []
    for fixed in wanted:
        goal = meetings({**{n: getattr(PLAIN, n, False) for n in factors}, **fixed})
        goal = {m for m in goal if all(part[0] in fixed for part in (m if isinstance(m[0], tuple) else [m]))}
        if goal <= covered:
            continue
        drawn = [made for made in (draw(fixed) for _ in range(60)) if made is not None and made[1] & goal - covered]
        if drawn:
            made, meets = max(drawn, key=lambda d: len(d[1] - covered))
            found.append(made)
            covered |= meets
    return found


AXIS_NAMES = ("memory", "bias", "retention", "algorithm")


class Refusal(NamedTuple):
    """Choices that go together in no frame, and why they do not in the plain one."""

    choices: dict[str, Any]
    reason: str

    @property
    def kind(self) -> str:
        """The reason, whatever the names in it."""
        said = self.reason
        for axis in AXIS_NAMES:
            said = said.replace(str(self.choices[axis]), axis.upper())
        return said.replace("BIAS, BIAS", "BIAS, RETENTION")  # two of them have one name


class Product(NamedTuple):
    """The rules of a part of the product, its choices that are refused, and the frames that others are refused in."""

    cases: list[Case]
    refusals: list[Refusal]
    frames: list[Refusal]


def product(mem, gate) -> Product:
    """Each bias and each class of algorithm with a memory and a retention. The instances of the class and the frames
    are taken in turn; choices are refused if every frame is.
    """
    dice = random.Random(f"{mem} {gate}")
    frames = [dict(zip(["channels", *FRAMES], f, strict=True)) for f in itertools.product(CHANNELS, *FRAMES.values())]
    dice.shuffle(frames)
    turns = itertools.cycle(frames)
    classes: dict[type, list] = {}
    for learner in ALGORITHMS:
        classes.setdefault(type(learner), []).append(learner)
    found = Product([], [], [])
    for loss, learners in itertools.product(BIASES, classes.values()):
        choices = {"memory": mem, "bias": loss, "retention": gate, "algorithm": dice.choice(learners)}
        passed_over = []
        for frame in itertools.islice(turns, len(frames)):
            if (made := case(**choices, **frame)) is not None:
                found.cases.append(made)
                found.frames.extend(passed_over)
                break
            passed_over.append({**choices, **{n: x for n, x in frame.items() if n != "channels"}})
        else:
            found.refusals.append(Refusal(choices, refusal(choices)))
    return Product(found.cases, found.refusals, [Refusal(c, refusal(c)) for c in found.frames])


def refusal(choices: dict[str, Any]) -> str:
    """Why choices do not go together."""
    with pytest.raises(UsageError) as refused:
        Rule(**choices)
    return str(refused.value)


def matrix(loss, gate, learner=None, channels=False, start="zero", **frame) -> Case:
    """A rule of a matrix memory."""
    return Case(Rule(memory.Linear(start=start), loss, gate, learner or algorithm.GradientDescent(), **frame), channels)


# What goes together with little, so that chance does not find it: the closed forms of a matrix memory at chunk 1.
CLOSED_FORMS = [
    matrix(bias.L2(), retention.L2(), algorithm.LeastSquares()),
    matrix(bias.L2(), retention.NoRetention(), algorithm.LeastSquares(), read_at="before"),
    matrix(bias.L2(), retention.NoRetention(), algorithm.Implicit(), start="learned"),
    matrix(bias.L2(), retention.L2(to="initial"), algorithm.Implicit(), start="learned", gradient_at="decayed"),
    matrix(bias.L2(), retention.L2(to="initial"), channels=True, start="learned"),
    matrix(bias.L2(), retention.L2(), channels=True, gradient_at="decayed", read_at="before"),
    matrix(bias.L2(), retention.L2(), algorithm.GradientDescent(steps=2), channels=True, gradient_at="decayed"),
    matrix(bias.Erase(), retention.L2(), channels=True),
    matrix(bias.Erase(), retention.L2(to="initial"), start="learned", gradient_at="decayed", read_at="before"),
    matrix(bias.Erase(along="key"), retention.L2()),
    matrix(bias.L2(), retention.L2(), algorithm.Momentum()),
    matrix(bias.Erase(), retention.L2(to="initial"), algorithm.Momentum(), start="learned", gradient_at="decayed"),
    matrix(bias.Erase(along="key"), retention.NoRetention(), algorithm.Momentum(), read_at="before"),
    matrix(bias.Dot(), retention.L2(), channels=True, read_at="before"),
    matrix(bias.Dot(), retention.TwoSided(), channels=True),
    matrix(bias.Dot(), retention.TwoSided(), start="learned", read_at="before"),
]
# Three of a kind that chance need not find either: the deep memories of LaCT and Atlas.
DEEP = [
    Case(
        Rule(
            memory.SwiGLU(),
            bias.Dot(),
            retention.Sphere(),
            algorithm.Muon(schedule="lact"),
            chunk=4,
            step_at="chunk",
            read_at="before",
        ),
        channels=False,
    ),
    Case(Rule(memory.MLP(), bias.L2(), retention.L2(), algorithm.Muon(), chunk=4, window=3), channels=True),
]
RULES = [*CLOSED_FORMS, *rules(), *DEEP]
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
        stop = self.q.shape[1] if stop is None else stop
        return self.map(lambda x: x[rows, start * self.per(x) : stop * self.per(x)])

    def per(self, x: Tensor) -> int:
        """Entries a token: several, where a rule takes several steps."""
        return x.shape[1] // self.q.shape[1]

    def named(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.gates}


# Centres of the gates: enough decay, momentum and extreme tokens to be seen. Larger steps make some rules (three layers
# with KL) so ill-conditioned that the token loop itself, on inputs that differ by 1e-15, moves by more than 1e-9.
CENTRES = {
    "log_alpha": -0.1,
    "eta": 0.1,
    "theta": 0.5,
    "delta": 1.0,
    "shift": 0.5,
    "log_beta": -0.1,
    "rho": 0.6,
    "gamma": 0.5,
}
ETA_MOST = 0.2


def gentleness(rule: Rule) -> float:
    """What a rule's eta is multiplied by. Where all matrices of a deep memory have one eta, that of the steepest, whose
    input has a power of about 16, is the limit: beyond it the inner loop is chaotic, and no two evaluations of it agree
    to 1e-9 or, without a norm, stay finite.
    """
    shared = isinstance(rule, Rule) and isinstance(rule.memory, memory.Deep) and rule.algorithm.rate == "none"
    return 1 / 16 if shared else 1.0


def draw_gates(
    rule: Rule, shape: tuple[int, ...], channels: int | None = None, centres=CENTRES, d_k=4
) -> dict[str, Tensor]:
    """Random gates in float64, spread around `centres`; of that many channels wherever the rule permits."""
    gates = {}
    for gate in rule.gates:
        time = shape[1] * (1 if gate in getattr(getattr(rule, "retention", None), "gates", ()) else steps(rule))
        if gate.vector:
            gates[gate.name] = F.normalize(torch.randn(shape[0], time, *shape[2:], d_k, dtype=torch.float64), dim=-1)
            continue
        gate = replace(gate, high=min(gate.high, ETA_MOST * gentleness(rule))) if gate.name == "eta" else gate
        alone = not gate.channel or (gate.name != "delta" and rule.channel_conflict(channels or 4, channels or 4))
        width = 1 if channels is None or alone else channels
        raw = torch.randn(shape[0], time, *shape[2:], width, dtype=torch.float64)
        # A bias or a retention may allow less than the centre; half of its range then.
        centre = min(centres[gate.name], gate.high / 2) if gate.high > 0 else centres[gate.name]
        gates[gate.name] = gate.squash(raw + gate.unsquash(centre))
    return gates


def steps(mixer) -> int:
    """Gradient steps a token."""
    return mixer.algorithm.steps if isinstance(mixer, Rule) else 1


def draw_tokens(rule: Rule, batch=2, time=13, heads=2, d_k=4, d_v=None, channels=False, centres=CENTRES) -> Tokens:
    """Queries and keys of norm 1, values of order 1, random gates, in float64."""
    d_v, n = d_v or d_k, steps(rule)
    q, k = (F.normalize(torch.randn(batch, time * m, heads, d_k, dtype=torch.float64), dim=-1) for m in (1, n))
    v = torch.randn(batch, time * n, heads, d_v, dtype=torch.float64)
    gates = draw_gates(rule, (batch, time, heads), d_k if channels else None, centres, d_k)
    return Tokens(q, k, v, gates)


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


def assert_same(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> float:
    """Equal to `tolerance` times the largest entry expected; NaN is never equal. Returns how far they are apart."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, f"{what}: {got.shape}, not {expected.shape}"
    if not expected.numel():
        return 0.0
    got, expected = got.detach(), expected.detach()
    scale = max(expected.abs().max().item(), 1e-3)
    apart = (got - expected).abs().max().item() / scale  # the maximum of a tensor keeps NaN
    if not apart <= tolerance:
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")
        raise AssertionError(f"{what}: {apart:.3g} apart, of the largest entry {scale:.3g}")
    return apart


def assert_same_states(got, expected, tolerance: float) -> float:
    """Equal tensor by tensor; counts exactly. Returns how far they are apart."""
    # A state that no token has touched knows nothing of a window, and its decay is one number.
    absent = own(got).keys() ^ own(expected).keys()
    assert all(name.startswith("recent.") for name in absent)
    assert not absent or not (own(got) | own(expected))["recent.gamma"].any()
    apart = 0.0
    for name, x in own(expected).items():
        if name in absent:
            continue
        if name == "pending.log_alpha":
            x = x.expand_as(own(got)[name])
        if x.is_floating_point():
            apart = max(apart, assert_same(own(got)[name], x, tolerance, name))
        else:
            assert torch.equal(own(got)[name], x), name
    return apart
