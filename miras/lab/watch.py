"""Watching a memory read: what it recalls, how it changes, what surprises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import LeastSquares
from miras.bias import Huber
from miras.engines import run
from miras.lab.entry import ETA, Entry
from miras.lab.stream import Stream, together
from miras.rule import Rule, State
from miras.weights import Weights, densified

LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Weights below this share of the largest of their matrix count as zero.
NEAR_ZERO = 0.01


class Seen(NamedTuple):
    """What is seen of R ways to set the gates over S seeds at one time of asking; stacked, the last axis is time.

    Attributes:
        errors: relative error of what was asked, {name: [R, S]}; 1 is that of reading zeros.
        found: share of the questions whose answer is nearer in direction to its own value than to that of any other
            question asked together with it, {name: [R, S]}.
        lags: relative error of the pair read `LAGS` tokens before, [R, S, lags]; NaN where none was written.
        norm: of the weights, [R, S].
        moved: distance of the weights from those it began with, [R, S].
        near_zero: share of weights near zero, [R, S].

    The last three are NaN for `LeastSquares`, whose matrices are statistics to solve with, no weights.
    """

    errors: dict[str, Tensor]
    found: dict[str, Tensor]
    lags: Tensor
    norm: Tensor
    moved: Tensor
    near_zero: Tensor


@dataclass(frozen=True)
class Course:
    """A memory's way through a stream.

    Attributes:
        at: tokens read at the n times of asking.
        seen: `Seen` with an axis [.., n] behind the others.
        surprise: norm of each token's inner gradient, [R, S, T]; None: not looked at, or the algorithm has none.
        limited: share of a token's coordinates on the linear branch of a Huber bias, [R, S, T], else None.
    """

    at: tuple[int, ...]
    seen: Seen
    surprise: Tensor | None
    limited: Tensor | None


def weights_of(rule: Rule, state: State, size: int) -> Weights:
    """What a memory reads with now, {matrix: [B, H, o, i]}."""
    return rule.read_weights(state, rule.leaves(size, size))


def probe(rule: Rule, state: State, k: Tensor) -> Tensor:
    """What a memory answers now: M(W_t, k) at keys [B, H, m, d]. Nothing is written, the state stays as it is."""
    return rule.read(weights_of(rule, state, k.shape[-1]), k, state.slow)


@torch.no_grad()
def watch(entry: Entry, streams: Sequence[Stream], etas: Sequence[float] | None = None, closely: bool = True) -> Course:
    """Let a memory read streams of one scenario, each with an initial memory of its own, and ask it at their times.

    Args:
        entry: rule and gates.
        streams: S streams with the same times of asking; each is a head of one run.
        etas: R learning rates, tried side by side; None: the entry's own, R = 1.
        closely: look at every token's surprise, which takes a call for each chunk.
    """
    rule, rows, both = entry.rule, 1 if etas is None else len(etas), together(streams)
    k, v, truth, write = (x.expand(rows, *x.shape) for x in (both.k, both.v, both.truth, both.write))
    gates = _gates(entry, k, write, etas)
    size, generator = k.shape[-1], torch.Generator().manual_seed(0)
    state, begin = rule.init(rule.initial(len(streams), size, size, generator), batch=rows), 0
    first, seen, near = weights_of(rule, state, size), [], []
    for end in _cuts(rule, both.at, closely):
        part = _part(rule, gates, slice(begin, end))
        now = k[..., begin:end, :], v[..., begin:end, :]
        if closely and not isinstance(rule.algorithm, LeastSquares):
            near.append(_surprise(rule, state, *now, part))
        state, begin = _read_on(rule, state, *now, part), end
        if end in both.at:
            i, past = both.at.index(end), end - 1 - torch.tensor(LAGS)
            asked = {n: (a.k[:, i], a.v[:, i]) for n, a in both.asked.items()}
            lagged = k[..., past.clamp_min(0), :], truth[..., past.clamp_min(0), :]
            there = (past >= 0) & (write[..., past.clamp_min(0)] > 0)
            seen.append(_ask(rule, state, first, asked, lagged, there))
    surprise = torch.cat([s for s, _ in near], -1) if near else None
    limited = torch.cat([x for _, x in near], -1) if near and isinstance(rule.bias, Huber) else None
    return Course(both.at, _over_time(seen), surprise, limited)


def _gates(entry: Entry, k: Tensor, write: Tensor, etas: Sequence[float] | None) -> dict[str, Tensor]:
    """Constant gates [R, S, T, 1]; eta is 0 where a token says nothing, and the keys of `Erase` are the token's own."""
    values = entry.values()
    gates = {g.name: k if g.vector else torch.full_like(k[..., :1], values[g.name]) for g in entry.rule.gates}
    if etas is not None:
        gates[ETA] = torch.tensor(etas)[:, None, None, None].expand_as(k[..., :1])
    return {**gates, ETA: gates[ETA] * write.unsqueeze(-1)}


def _cuts(rule: Rule, at: tuple[int, ...], closely: bool) -> list[int]:
    """Where the stream is cut: at the times of asking, and where gradients begin to be taken at other weights."""
    alone = rule.gradient_at == "decayed" or rule.algorithm.steps > 1
    grid = range(0, at[-1], 1 if alone else rule.chunk) if closely else ()
    return sorted({*at, *grid} - {0})


def _part(rule: Rule, gates: Mapping[str, Tensor], here: slice) -> dict[str, Tensor]:
    """The gates of some tokens; those of bias and algorithm once for each step of a token."""
    kept, steps = {g.name for g in rule.retention.gates}, rule.algorithm.steps
    return {n: g[..., here, :].repeat_interleave(1 if n in kept else steps, 2) for n, g in gates.items()}


def _read_on(rule: Rule, state: State, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> State:
    """The state after some more tokens [R, S, C, d]; a token's steps all have its key and value."""
    k, v, *values = (x.transpose(1, 2) for x in (k, v, *gates.values()))
    steps = rule.algorithm.steps
    gates = dict(zip(gates, values, strict=True))
    return run(rule, k, k.repeat_interleave(steps, 1), v.repeat_interleave(steps, 1), gates, state)[1]


def _surprise(rule: Rule, state: State, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The norm of each token's own gradient (of its first step), and the share of its coordinates that Huber limits."""
    leaves, gates = rule.leaves(k.shape[-1], v.shape[-1]), {n: g[..., : k.shape[2], :] for n, g in gates.items()}
    origin = state.origin
    if rule.gradient_at == "decayed":
        origin = {n: rule.decay(a, rule.matrix_gates(leaves[n], gates)) for n, a in origin.items()}
    weights = rule.link(origin, state.home, leaves)
    grad = replace(rule, window=1).gradient(weights, state.slow, k, v, gates)
    norm = torch.stack([g.dense().square().sum((-2, -1)) for g in grad.values()]).sum(0).sqrt()
    if not isinstance(rule.bias, Huber):
        return norm, torch.zeros_like(norm)
    error = rule.memory.read(weights, k, state.slow) - v
    # On its quadratic branch every form of the loss has the error itself for a gradient.
    limited = rule.bias.grad(error, torch.zeros_like(v), gates) != error
    return norm, limited.float().mean(-1)


def _ask(
    rule: Rule,
    state: State,
    first: Weights,
    asked: Mapping[str, tuple[Tensor, Tensor]],
    lagged: tuple[Tensor, Tensor],
    there: Tensor,
) -> Seen:
    """What is seen now: of questions ([S, m, d], [S, m, d]) by name, and of one pair for each lag that is `there`."""
    size = lagged[0].shape[-1]
    weights = weights_of(rule, state, size)
    rows = next(iter(state.dual.values())).shape[0]
    errors, found = {}, {}
    for name, (k, v) in asked.items():
        y = rule.read(weights, k.expand(rows, *k.shape), state.slow)
        error = torch.linalg.matrix_norm(y - v) / torch.linalg.matrix_norm(v)
        unasked = v.isnan().flatten(-2).any(-1)
        # What diverged is wrong without bound; NaN is left for what was not asked.
        errors[name] = error.nan_to_num(torch.inf).masked_fill(unasked, torch.nan)
        near = F.normalize(y, dim=-1) @ F.normalize(v, dim=-1).mT
        own = near.diagonal(dim1=-2, dim2=-1)
        # A pair may be asked for twice, and rounding must not make one of them a miss.
        hits = (own.unsqueeze(-1) >= near - 1e-6).all(-1)
        found[name] = hits.float().mean(-1).masked_fill(unasked, torch.nan)
    k, v = lagged
    error = (rule.read(weights, k, state.slow) - v).norm(dim=-1) / v.norm(dim=-1)
    return Seen(errors, found, error.nan_to_num(torch.inf).where(there, torch.nan), *_shape(rule, weights, first, size))


def _shape(rule: Rule, weights: Weights, first: Weights, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of the weights, their distance from the first ones, and the share of them near zero, [R, S] each."""
    now, then = ([densified(w[n]).squeeze(-3) for n in rule.memory.leaves(size, size)] for w in (weights, first))
    norm = torch.stack([x.square().sum((-2, -1)) for x in now]).sum(0).sqrt()
    if isinstance(rule.algorithm, LeastSquares):
        nothing = torch.full_like(norm, torch.nan)
        return nothing, nothing, nothing
    moved = torch.stack([(x - y).square().sum((-2, -1)) for x, y in zip(now, then, strict=True)]).sum(0).sqrt()
    small = [(x.abs() <= NEAR_ZERO * x.abs().amax((-2, -1), keepdim=True)).sum((-2, -1)) for x in now]
    return norm, moved, torch.stack(small).sum(0) / sum(x[0, 0].numel() for x in now)


def _over_time(seen: Sequence[Seen]) -> Seen:
    """One `Seen` for all times."""

    def along(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {name: along([part[name] for part in parts]) for name in parts[0]}
        return torch.stack(list(parts), -1)

    return Seen(*(along(parts) for parts in zip(*seen, strict=True)))
