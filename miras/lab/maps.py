"""Scenarios of a map from keys to values, of which new keys are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.bias import L1, L2, Dot, Huber, Lp
from miras.lab.entry import Entry, deep, entry, matrix
from miras.lab.stream import Asked, Scenario, Source, Stream, before, every
from miras.retention import NoRetention
from miras.variants import variant, yaad

# Fresh keys that a memory is asked for at a time, and pairs of those it has read.
FRESH = 64


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
