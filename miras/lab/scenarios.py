"""The scenarios of `miras lab`: what happens to a memory while it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import Algorithm, GradientDescent, Momentum
from miras.bias import L1, L2, Bias, Dot, Huber, Lp
from miras.lab.entry import Entry, entry
from miras.lab.stream import Asked, Scenario, Source, Stream, before, every
from miras.memory import MLP, Linear, Memory, Polynomial
from miras.retention import KL, ElasticNet, Lq, NoRetention, Retention
from miras.retention import L2 as Decay
from miras.rule import Rule
from miras.variants import DEFAULT_CHUNK, variant, yaad

# Fresh keys that a memory is asked for at a time, and pairs of those it has read.
FRESH = 64


def deep(bias: Bias, retention: Retention | None = None, algorithm: Algorithm | None = None) -> Rule:
    """A twin of Yaad: its memory, its chunk and, where nothing else is said, its retention and algorithm."""
    retention, algorithm = retention or Decay(to="initial"), algorithm or GradientDescent(rate="input")
    return Rule(MLP(), bias, retention, algorithm, DEFAULT_CHUNK)


def matrix(bias: Bias, retention: Retention | None = None, memory: Memory | None = None) -> Rule:
    """A twin of Gated DeltaNet: a matrix that starts at zero and learns at every token."""
    return Rule(memory or Linear(), bias, retention or Decay(), GradientDescent())


@dataclass(frozen=True)
class Outliers(Scenario):
    """A fixed map from keys to values, of which some are replaced by heavy-tailed noise (Student's t, 2 degrees).

    Args:
        rate: share of values that are replaced.
        scale: of the noise, over the standard deviation of the values.
        tokens: length.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "outliers"
    shows: ClassVar[str] = "which bias learns a map although some values are heavy-tailed noise"
    look: ClassVar[str] = (
        "The error on new keys under the true map. Huber and l_1 bound what one wrong value can do; l_2 writes it in "
        "proportion to its error, l_3 in proportion to its square (clipped)."
    )

    rate: float = 0.2
    scale: float = 3.0
    tokens: int = 1536
    step: int = 48

    def build(self, seed: int) -> Stream:
        self.require(0 <= self.rate <= 1 and self.tokens >= self.step > 0, "a rate in [0, 1] and step <= tokens")
        source = Source(seed, self.size)
        turn = source.rotation()
        k = source.keys(self.tokens)
        truth = source.apply(turn, k)
        bad = source.uniform(self.tokens) < self.rate
        v = torch.where(bad[:, None], self.scale * source.heavy(self.tokens, self.size), truth)
        return _mapped(source, turn, k, v, truth, bad, every(self.tokens, self.step))

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("yaad"),
            entry("yaad with l_2", deep(L2())),
            entry("yaad with l_2, clipped", deep(L2(clip=True))),
            entry("yaad with l_1", deep(L1())),
            entry("yaad with l_3", deep(Lp(p=3.0))),
            entry("matrix, Huber", matrix(Huber())),
            entry("matrix, l_2", matrix(L2())),
        )


@dataclass(frozen=True)
class Extreme(Scenario):
    """A fixed map and clean values, but every `gap` tokens one that is `scale` times as large: Yaad's claim.

    Args:
        scale: of the extreme values.
        gap: tokens between them.
        tokens: length.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "extreme"
    shows: ClassVar[str] = "what a rare extreme token does to a clean stream, and how long that lasts"
    look: ClassVar[str] = (
        "The saw teeth of the error on new keys: each is one extreme token. Huber limits how hard it is written; the "
        "share of limited coordinates says how often that happens, to ordinary tokens too."
    )

    scale: float = 30.0
    gap: int = 192
    tokens: int = 1152
    step: int = 16

    def build(self, seed: int) -> Stream:
        self.require(0 < self.gap < self.tokens and self.tokens >= self.step > 0, "gap < tokens and step <= tokens")
        source = Source(seed, self.size)
        turn = source.rotation()
        k = source.keys(self.tokens)
        truth = source.apply(turn, k)
        hit = torch.arange(self.tokens) % self.gap == self.gap - 1
        v = torch.where(hit[:, None], self.scale * truth, truth)
        return _mapped(source, turn, k, v, truth, hit, every(self.tokens, self.step))

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("yaad"),
            entry("yaad to the letter", yaad(letter=True)),
            entry("yaad with l_2", deep(L2())),
            entry("yaad with l_2, clipped", deep(L2(clip=True))),
            entry("titans"),
            entry("matrix, Huber", matrix(Huber())),
            entry("matrix, l_2", matrix(L2())),
        )


def _mapped(
    source: Source, turn: Tensor, k: Tensor, v: Tensor, truth: Tensor, marked: Tensor, at: tuple[int, ...]
) -> Stream:
    """A stream of a fixed map, asked for new keys."""
    fresh = source.keys(FRESH)
    n = len(at)
    asked = {"new keys": Asked(fresh.expand(n, -1, -1), source.apply(turn, fresh).expand(n, -1, -1))}
    return Stream(k, v, truth, torch.ones(len(k)), marked, at, asked)


@dataclass(frozen=True)
class Drift(Scenario):
    """A map that turns: every pair of coordinates by a full turn in `period` tokens.

    Args:
        period: tokens of a full turn.
        tokens: length.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "drift"
    shows: ClassVar[str] = "which gates follow a key-to-value map that turns slowly"
    look: ClassVar[str] = (
        "The error on new keys under the map as it is now, and under the map as it was an eighth of a turn ago: a "
        "memory that lags behind answers with the old map."
    )

    period: int = 1024
    tokens: int = 1536
    step: int = 48

    def build(self, seed: int) -> Stream:
        self.require(self.period > 0 and self.tokens >= self.step > 0, "a period above 0 and step <= tokens")
        source = Source(seed, self.size)
        turn, at = source.rotation(), every(self.tokens, self.step)
        k, fresh = source.keys(self.tokens), source.keys(FRESH)
        v = source.apply(turn @ self._planes(torch.arange(self.tokens)), k)
        now = before(at)
        then = (now - self.period // 8).clamp_min(0)
        keys = fresh.expand(len(at), -1, -1)
        maps = {"new keys, map of now": now, "new keys, old map": then}
        asked = {
            name: Asked(keys, source.apply((turn @ self._planes(t)).unsqueeze(1), keys), scored=t is now)
            for name, t in maps.items()
        }
        return Stream(k, v, v, torch.ones(self.tokens), torch.zeros(self.tokens, dtype=torch.bool), at, asked)

    def _planes(self, t: Tensor) -> Tensor:
        """The rotation of each of the times [n], [n, d - 1, d - 1]: coordinates in pairs, an odd one stays."""
        n = self.size - 1
        angle = 2 * torch.pi * t / self.period
        turned = torch.eye(n).repeat(len(t), 1, 1)
        i = torch.arange(0, n - 1, 2)
        turned[:, i, i] = turned[:, i + 1, i + 1] = angle.cos()[:, None]
        turned[:, i + 1, i] = angle.sin()[:, None]
        turned[:, i, i + 1] = -angle.sin()[:, None]
        return turned

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("retnet, tau 100", matrix(Dot()), tau=100),
            entry("deltanet"),
            entry("gated_deltanet, tau 100", variant("gated_deltanet"), tau=100),
            entry("mesa, tau 100", variant("mesa"), tau=100),
            entry("yaad"),
            entry("yaad with l_2", deep(L2())),
        )


@dataclass(frozen=True)
class Sensor(Scenario):
    """A sensor's channels: a mixture of oscillators whose frequencies wander, with noise and spikes.

    The key is a reading, the value the reading after it, so that the memory forecasts. Halfway the frequencies change.

    Args:
        oscillators: hidden sources, each in a plane of its own of the channels.
        noise: standard deviation of a reading's error over that of the signal.
        spikes: share of readings that heavy-tailed noise is added to.
        tokens: length.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "sensor"
    shows: ClassVar[str] = "forecasting a drifting signal with noise, spikes and a change of regime"
    look: ClassVar[str] = (
        "The error of the eight readings to come (free of spikes), before they are written, and the bump where the "
        "frequencies change: how fast the memory is right again."
    )

    oscillators: int = 5
    noise: float = 0.1
    spikes: float = 0.05
    tokens: int = 1536
    step: int = 32

    def build(self, seed: int) -> Stream:
        enough = 0 < 2 * self.oscillators <= self.size and self.tokens >= self.step > 0
        self.require(enough, "at most size / 2 oscillators and step <= tokens")
        source, ahead, m = Source(seed, self.size), 8, self.oscillators
        length = self.tokens + ahead + 1
        # Radians a token: a regime for each half, and a slow wander within.
        regimes = 0.05 + 0.45 * source.uniform(2, m)
        regime = (torch.arange(length) >= self.tokens // 2).long()
        wander = 0.1 * torch.sin(2 * torch.pi * torch.arange(length)[:, None] / self.tokens * 4 + source.normal(m))
        phase = (regimes[regime] * (1 + wander)).cumsum(0)
        planes = torch.linalg.qr(source.keys(2 * m).mT).Q.mT * (self.size / m) ** 0.5
        signal = torch.cat([phase.cos(), phase.sin()], -1) @ planes
        read = signal + self.noise * source.normal(length, self.size)
        spike = source.uniform(length) < self.spikes
        read = torch.where(spike[:, None], read + source.heavy(length, self.size), read)
        k, v = F.normalize(read[:-1], dim=-1), read[1:]
        clean = F.normalize(signal[:-1], dim=-1)
        at = every(self.tokens, self.step)
        next_ones = torch.tensor(at)[:, None] + torch.arange(ahead)
        asked = {"next readings": Asked(clean[next_ones], signal[1:][next_ones])}
        t = self.tokens
        return Stream(k[:t], v[:t], signal[1:][:t], torch.ones(t), spike[1 : t + 1], at, asked)

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("deltanet"),
            entry("gated_deltanet, tau 100", variant("gated_deltanet"), tau=100),
            entry("matrix, Huber", matrix(Huber(), NoRetention())),
            entry("mesa, tau 100", variant("mesa"), tau=100),
            entry("yaad"),
            entry("titans"),
        )


@dataclass(frozen=True)
class Conflicts(Scenario):
    """Pairs that are repeated; then half of the keys get new values, which are repeated, and the others are not seen.

    Args:
        pairs: number of keys, half of which change.
        rounds: times that each pair is repeated before, and each changed one after.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "conflicts"
    shows: ClassVar[str] = "repeated pairs, then the same keys with new values: is the old one forgotten"
    look: ClassVar[str] = (
        "The old value should be lost where the key has a new one (its error rises to that of two unrelated values, "
        "1.4), while the pairs that are not seen any more should stay. Adding without looking keeps both."
    )

    pairs: int = 16
    rounds: int = 32
    step: int = 16

    def build(self, seed: int) -> Stream:
        self.require(self.pairs >= 2 and self.rounds > 0 and self.step > 0, "two or more pairs, rounds and a step")
        source, half = Source(seed, self.size), self.pairs // 2
        keys, old, new = source.keys(self.pairs), source.values(self.pairs), source.values(half)
        first = torch.cat([source.order(self.pairs) for _ in range(self.rounds)])
        second = torch.cat([source.order(half) for _ in range(self.rounds)])
        k, v = keys[torch.cat([first, second])], torch.cat([old[first], new[second]])
        tokens, changed_at = len(k), len(first)
        at = every(tokens, self.step)
        late = (before(at) >= changed_at)[:, None, None]
        changed = keys[:half].expand(len(at), -1, -1)
        asked = {
            "changed keys, present value": Asked(changed, torch.where(late, new, old[:half])),
            "changed keys, first value": Asked(changed, old[:half].expand(len(at), -1, -1), scored=False),
            "other keys": Asked(keys[half:].expand(len(at), -1, -1), old[half:].expand(len(at), -1, -1)),
        }
        marked = torch.arange(tokens) >= changed_at
        return Stream(k, v, v, torch.ones(tokens), marked, at, asked, late=(changed_at + tokens) // 2)

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("retnet, tau 100", matrix(Dot()), tau=100),
            entry("deltanet"),
            entry("gated_deltanet, tau 100", variant("gated_deltanet"), tau=100),
            entry("matrix, l_1", matrix(L1(), NoRetention())),
            entry("yaad"),
            entry("memora"),
            entry("titans"),
        )


@dataclass(frozen=True)
class Overload(Scenario):
    """Random pairs in blocks of 16, each block repeated and then never seen again, far beyond a matrix' capacity.

    Args:
        load: pairs over channels at the end.
        rounds: times that each pair of a block is repeated.
    """

    name: ClassVar[str] = "overload"
    shows: ClassVar[str] = "more random pairs than fit: what KL, L_q, the elastic net and L2 give up"
    look: ClassVar[str] = (
        "The error of all pairs so far against that of the present block: gates differ in how well they learn what "
        "comes and in what of the old that costs. Behind its LayerNorm a deep memory never reads zeros: knowing "
        "nothing is an error of 1.4 for it, of 1 for an empty matrix, so look at the share found too."
    )

    load: float = 6.0
    rounds: int = 8

    def build(self, seed: int) -> Stream:
        block, blocks = 16, int(self.load * self.size) // 16
        self.require(blocks > 0 and self.rounds > 0, "load * size of 16 or more, and rounds")
        source = Source(seed, self.size)
        keys, values = source.keys(blocks * block), source.values(blocks * block)
        order = torch.cat([block * i + source.order(block) for i in range(blocks) for _ in range(self.rounds)])
        at = every(len(order), block * self.rounds)
        known = [block * (i + 1) for i in range(blocks)]
        sample = torch.stack([source.order(n)[torch.arange(FRESH) % n] for n in known])
        present = torch.stack([torch.arange(n - block, n) for n in known])
        asked = {
            "all so far": Asked(keys[sample], values[sample]),
            "the present block": Asked(keys[present], values[present]),
        }
        k, v, none = keys[order], values[order], torch.zeros(len(order), dtype=torch.bool)
        return Stream(k, v, v, torch.ones(len(k)), none, at, asked)

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("MLP, L2", deep(L2())),
            entry("MLP, KL", deep(L2(), KL(to="initial"))),
            entry("MLP, L_q", deep(L2(), Lq(to="initial"))),
            entry("MLP, elastic net", deep(L2(), ElasticNet(gamma=0.5, to="initial"))),
            entry("deltanet"),
            entry("mesa, tau inf", variant("mesa"), tau=float("inf")),
        )


@dataclass(frozen=True)
class Silence(Scenario):
    """Pairs are learned; then come tokens that say nothing (eta 0), through which gates only decay; then new pairs.

    Args:
        pairs: number of pairs before the silence, and again after it.
        rounds: times that each is repeated.
        silence: tokens that say nothing.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "silence"
    shows: ClassVar[str] = "a long silence between writing and asking: decay to zero or to the initial memory"
    look: ClassVar[str] = (
        "The error of the first pairs through the silence, and after it how well new pairs are learned. tau is 500 "
        "tokens for all that decay."
    )

    pairs: int = 12
    rounds: int = 32
    silence: int = 1536
    step: int = 48

    def build(self, seed: int) -> Stream:
        self.require(self.pairs > 0 and self.rounds > 0 and self.silence >= 0 and self.step > 0, "pairs, rounds, step")
        source, length = Source(seed, self.size), self.pairs * self.rounds
        keys, values = source.keys(2, self.pairs), source.values(2, self.pairs)
        orders = [torch.cat([source.order(self.pairs) for _ in range(self.rounds)]) for _ in range(2)]
        k = torch.cat([keys[0][orders[0]], source.keys(self.silence), keys[1][orders[1]]])
        v = torch.cat([values[0][orders[0]], torch.zeros(self.silence, self.size), values[1][orders[1]]])
        write = torch.ones(len(k))
        write[length : length + self.silence] = 0
        at = every(len(k), self.step)
        times = torch.tensor(at)[:, None, None]
        awake = times > length + self.silence
        asked = {
            name: Asked(keys[i].expand(len(at), -1, -1), values[i].where(now, torch.nan))
            for i, (name, now) in enumerate({"first pairs": ~awake, "pairs after the silence": awake}.items())
        }
        return Stream(k, v, v, write, write == 0, at, asked, late=length + self.silence // 2)

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("deltanet"),
            entry("gated_deltanet", tau=500),
            entry("MLP, L2 to initial", deep(L2()), tau=500),
            entry("MLP, L2 to zero", deep(L2(), Decay()), tau=500),
            entry("MLP, KL to initial", deep(L2(), KL(to="initial")), tau=500),
            entry("MLP, KL to zero", deep(L2(), KL()), tau=500),
            entry("MLP, L_q to initial", deep(L2(), Lq(to="initial")), tau=500),
        )


@dataclass(frozen=True)
class Neighbours(Scenario):
    """Keys come in twins of a cosine `alike`, each with a value of its own.

    Args:
        twins: number of twins.
        alike: cosine of the angle between them.
        rounds: times that each pair is repeated.
        step: tokens between times of asking.
    """

    name: ClassVar[str] = "neighbours"
    shows: ClassVar[str] = "keys that nearly coincide: are their values told apart"
    look: ClassVar[str] = (
        "The error of a key's own value against that of its twin's value. A memory that cannot tell them apart reads "
        "the mean of both: 0.7 for either."
    )

    twins: int = 8
    alike: float = 0.9
    rounds: int = 64
    step: int = 32

    def build(self, seed: int) -> Stream:
        self.require(0 <= self.alike <= 1 and self.twins > 0 and self.rounds > 0, "alike in [0, 1], twins and rounds")
        source = Source(seed, self.size)
        one, other = source.keys(2, self.twins)
        across = F.normalize(other - (one * other).sum(-1, keepdim=True) * one, dim=-1)
        two = self.alike * one + (1 - self.alike**2) ** 0.5 * across
        keys, values = torch.cat([one, two]), source.values(2 * self.twins)
        order = torch.cat([source.order(2 * self.twins) for _ in range(self.rounds)])
        k, v, at = keys[order], values[order], every(len(order), self.step)
        shape = (len(at), -1, -1)
        asked = {
            "own value": Asked(keys.expand(shape), values.expand(shape)),
            "the twin's value": Asked(keys.expand(shape), values.roll(self.twins, 0).expand(shape), scored=False),
        }
        return Stream(k, v, v, torch.ones(len(k)), torch.zeros(len(k), dtype=torch.bool), at, asked)

    def entries(self) -> tuple[Entry, ...]:
        return (
            entry("linear_attention"),
            entry("deltanet"),
            entry("deltanet, degree 2", matrix(L2(), NoRetention(), Polynomial())),
            entry("mesa, tau inf", variant("mesa"), tau=float("inf")),
            entry("yaad"),
            entry("memora"),
            entry("yaad with momentum", deep(Huber(), algorithm=Momentum(rate="input"))),
        )


SCENARIOS: dict[str, type[Scenario]] = {
    cls.name: cls
    for cls in (Outliers, Extreme, Drift, Sensor, Conflicts, Overload, Silence, Neighbours)  # simplest first
}
