"""Scenarios of random pairs, of which those that were read are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from miras.algorithm import Momentum
from miras.bias import L1, L2, Dot, Huber
from miras.lab.entry import Entry, deep, entry, matrix
from miras.lab.stream import Asked, Scenario, Source, Stream, before, every
from miras.memory import Polynomial
from miras.retention import KL, ElasticNet, Lq, NoRetention
from miras.retention import L2 as Decay
from miras.variants import variant

# Fresh keys that a memory is asked for at a time, and pairs of those it has read.
FRESH = 64


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
