"""Memories side by side in one scenario, each at the learning rate that suits it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from miras.lab.entry import ETA, Entry
from miras.lab.stream import Scenario, Stream, together
from miras.lab.watch import LAGS, Course, watch

# The search tries these shares of the largest eta that a rule has.
SHARES = tuple(2.0**-i for i in range(11))
# It looks at streams that are not shown: this many, whose seeds stand so far from those that are.
SEARCHED, HELD_OUT = 2, 1_000_000
LAST_PAIR = "the last pair"


def compare(
    scenario: Scenario, entries: Sequence[Entry] = (), seeds: int = 4, seed: int = 0, search: bool = True
) -> dict[str, Any]:
    """Let memories read the same streams.

    Args:
        scenario: what happens.
        entries: the memories; none: the scenario's own.
        seeds: how many streams, each with an initial memory of its own.
        seed: the first of them.
        search: where an entry names no eta, take the one of `SHARES` with the lowest late error of the scored
            questions, on streams held out.

    Returns:
        Plain values: the scenario, the times `at`, and for each rule its gates and curves. A curve of n numbers is a
        mean over seeds, "low" and "high" are the lowest and highest of them; "late" is the mean, lowest and highest of
        a seed's mean over `Stream.late_ones`. None stands for what was not asked, or is not finite.
    """
    shown, held = list(range(seed, seed + seeds)), [seed + HELD_OUT + i for i in range(SEARCHED)]
    streams, others = ([scenario.build(s) for s in some] for some in (shown, held))
    rules = []
    for entry in entries or scenario.entries():
        tried = _search(entry, others) if search and ETA not in entry.gates else {}
        best = entry.with_gates({ETA: min(tried, key=tried.__getitem__)}) if tried else entry
        rules.append(_summary(best, watch(best, streams), together(streams), tried))
    return {
        "scenario": scenario.name,
        "settings": asdict(scenario),
        "shows": scenario.shows,
        "look": scenario.look,
        "seeds": shown,
        "held_out": held if search else [],
        "tokens": len(streams[0].k),
        "at": list(streams[0].at),
        "lags": list(LAGS),
        "scored": [name for name, asked in streams[0].asked.items() if asked.scored],
        "rules": rules,
    }


def _search(entry: Entry, streams: Sequence[Stream]) -> dict[float, float]:
    """The score of each learning rate, all of them side by side; one that is not finite is the worst."""
    high = next(g.high for g in entry.rule.gates if g.name == ETA)
    etas = [high * share for share in SHARES]
    scores = _score(watch(entry, streams, etas, closely=False), streams[0])
    return dict(zip(etas, scores.tolist(), strict=True))


def _score(course: Course, stream: Stream) -> Tensor:
    """Mean late error of the scored questions over seeds, [R]."""
    errors = [course.seen.errors[name] for name, one in stream.asked.items() if one.scored]
    return torch.stack([e[..., stream.late_ones].nanmean((-2, -1)) for e in errors]).mean(0)


def _summary(entry: Entry, course: Course, stream: Stream, tried: Mapping[float, float]) -> dict[str, Any]:
    """What is shown of a memory's way: means over the seeds."""
    seen = course.seen
    curves = {name: x[0] for name, x in {**seen.errors, LAST_PAIR: seen.lags[:, :, 0]}.items()}
    late = {name: x[:, stream.late_ones].nanmean(-1) for name, x in curves.items()}
    return {
        "name": entry.name,
        "rule": entry.rule.to_config(),
        "gates": entry.values(),
        "tried": [[eta, _plain(score)] for eta, score in tried.items()],
        "late": {name: _plain([x.mean(), x.min(), x.max()]) for name, x in late.items()},
        "found": {name: _plain(x[0][:, stream.late_ones].nanmean()) for name, x in seen.found.items()},
        "error": {
            name: {"mean": _plain(x.mean(0)), "low": _plain(x.amin(0)), "high": _plain(x.amax(0))}
            for name, x in curves.items()
        },
        "lag": _plain(seen.lags[0, ..., stream.late_ones].nanmean((0, -1))),
        **{name: _plain(getattr(seen, name)[0].mean(0)) for name in ("norm", "moved", "near_zero")},
        "late_moved": _plain(seen.moved[0][:, stream.late_ones].mean()),
        "late_near_zero": _plain(seen.near_zero[0][:, stream.late_ones].mean()),
        **{name: _by_kind(getattr(course, name), stream) for name in ("surprise", "limited")},
    }


def _by_kind(of_tokens: Tensor | None, stream: Stream) -> dict[str, Any] | None:
    """Means of a quantity [1, S, T] over the tokens since the last time of asking, of marked and of other tokens."""
    if of_tokens is None:
        return None
    told = stream.write > 0
    kinds = {"ordinary": told & ~stream.marked, "marked": told & stream.marked}
    pieces = list(zip((0, *stream.at), stream.at, strict=False))
    means = {}
    for name, kind in kinds.items():
        x = of_tokens[0].where(kind, torch.nan)
        means[name] = _plain(torch.stack([x[:, begin:end].nanmean() for begin, end in pieces]))
        means[name + ", late"] = _plain(x[:, pieces[stream.late_ones][0][0] :].nanmean())
    return means


def _plain(value: Any) -> Any:
    """Numbers with four digits, None for what is not finite."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Iterable):
        return [_plain(x) for x in value]
    return float(f"{float(value):.4g}") if math.isfinite(value) else None
