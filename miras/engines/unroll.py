"""A chunk as linear algebra: its coefficients, learning from it, and reading in many at once.

Within a chunk the gradients do not depend on each other, so the rule's update is a linear recurrence in (dual, slots,
grad_1 .. grad_C). Its coefficients come from running `Rule.update` itself on basis vectors, for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import GradientDescent, Implicit, Momentum
from miras.products import matmul_add
from miras.retention import EuclideanRetention, SlopedRetention
from miras.rule import Gates, Rule, State, token
from miras.weights import (
    Decayed,
    Leaf,
    Linearised,
    Outer,
    PerToken,
    Scaled,
    Unrolled,
    Weight,
    Weights,
    along,
)


class Ends(NamedTuple):
    """Rows of the linear map from (dual, slots, grad_1 .. grad_C) to the dual and the slots at a chunk's end.

    dual [M, H, 1 + S + C, w], slots [M, H, S, 1 + S + C, w]; origin [M, H, C, w] is the decay of the origin up to and
    including each token where gradients are taken there, else None. w is 1 or the number of channels.
    """

    dual: Tensor
    slots: Tensor
    origin: Tensor | None


class Decay(NamedTuple):
    """The same map where a gate is per channel and the algorithm has no slots, by its logarithm: nothing of it is
    written out for pairs of tokens.

    log [M, H, C, channels], cumulated; eta [M, H, C, 1 | channels].
    """

    log: Tensor
    eta: Tensor

    @property
    def origin(self) -> Tensor:
        """See `Ends`."""
        return self.log.exp()


class Coefficients(NamedTuple):
    """`Ends`, and the same map's rows for the dual that each token reads with, [M, H, C, 1 + S + C, w]."""

    read: Tensor | Decay
    write: Ends | Decay

    def without(self, slots: int) -> Coefficients:
        """The same map of the dual alone, where its so many slots are zero at the beginning and unseen at the end."""
        assert isinstance(self.read, Tensor) and isinstance(self.write, Ends)
        read, dual = (torch.cat([x[..., :1, :], x[..., 1 + slots :, :]], -2) for x in (self.read, self.write.dual))
        return Coefficients(read, self.write._replace(dual=dual, slots=dual.unsqueeze(-3)[..., :0, :, :]))


class Write(NamedTuple):
    """What learning from a chunk of every running sequence needs: tokens [N, H, C, ...] and what was computed ahead."""

    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    coefficients: dict[str, Ends | Decay]
    keep: Tensor | None


class Read(NamedTuple):
    """What reading in some chunks needs: queries [M, H, C, d_k] and the duals' rows of coefficients."""

    q: Tensor
    coefficients: Mapping[str, Tensor | Decay]


class Learned(NamedTuple):
    """What reading in a chunk needs of learning from it: the state before it, the gradients as the algorithm sees them,
    and where reads are linearised {leaf: (link(O), its slope)} at the chunk's origin.
    """

    before: State
    grad: dict[str, Outer]
    links: dict[str, tuple[Tensor, Tensor]]


def all_coefficients(rule: Rule, leaves: dict[str, Leaf], gates: Gates, keep: Tensor | None) -> dict[str, Coefficients]:
    """The coefficients of every chunk for every leaf; leaves without a channel axis see other gates than the rest."""
    found: dict[bool, Coefficients] = {}
    result = {}
    for name, leaf in leaves.items():
        if (channels := leaf.channel is not None) not in found:
            found[channels] = coefficients(rule, rule.leaf_gates(leaf, gates), keep)
        result[name] = found[channels]
    return result


def coefficients(rule: Rule, gates: dict[str, Tensor], keep: Tensor | None) -> Coefficients:
    """The coefficients of every chunk for a leaf that sees these gates."""
    like = next(iter(gates.values()))
    per_channel = any(g.shape[-1] > 1 for g in gates.values())
    if per_channel and isinstance(rule.algorithm, GradientDescent | Implicit):
        return _per_channel(gates, keep)
    # A CPU is faster with small tensors for each token than with some large ones.
    closed = like.device.type != "cpu" and not per_channel
    if closed and isinstance(rule.algorithm, GradientDescent | Implicit | Momentum):
        return _per_head(rule, gates, keep)
    return _by_tokens(rule, gates, keep)


def _by_tokens(rule: Rule, gates: dict[str, Tensor], keep: Tensor | None) -> Coefficients:
    """By running the update itself on basis vectors: for every algorithm."""
    like = next(iter(gates.values()))
    chunk, slots_n = like.shape[-2], rule.algorithm.slots
    width, size = max(g.shape[-1] for g in gates.values()), 1 + slots_n + chunk
    basis = (
        torch.eye(size, dtype=like.dtype, device=like.device).unsqueeze(-1).expand(*like.shape[:-2], size, size, width)
    )
    dual, slots = basis[..., 0, :, :], tuple(basis[..., 1 + j, :, :] for j in range(slots_n))
    origin, rows, decays = torch.ones_like(dual[..., :1, :]), [], []
    for t in range(chunk):
        now = token(gates, t)
        held = None if keep is None else keep[:, t, None, None, None]
        if t == 0 and rule.algorithm.resets:
            # A chunk whose first slot is a hole began in an earlier call.
            slots = tuple(_where(held, torch.zeros_like(x), x) for x in slots)
        if rule.read_at == "before":
            rows.append(dual)
        new, new_slots = rule.update(dual, slots, basis[..., 1 + slots_n + t, :, :], now)
        dual = _where(held, new, dual)
        slots = tuple(_where(held, x, old) for x, old in zip(new_slots, slots, strict=True))
        if rule.read_at == "after":
            rows.append(dual)
        if rule.gradient_at == "decayed":
            origin = _where(held, rule.decay(origin, now), origin)
            decays.append(origin)
    slot_rows = torch.stack(slots, -3) if slots else like.new_zeros(*like.shape[:-2], 0, size, width)
    return Coefficients(torch.stack(rows, -3), Ends(dual, slot_rows, torch.cat(decays, -2) if decays else None))


def steps(rule: Rule, leaf: Leaf, gates: Gates, keep: Tensor | None) -> Tensor:
    """What each token makes of the dual and the slots: the rows of (dual, slots) behind it over (dual, slots, grad),
    [M, H, C, 1 + S, 2 + S, w], for every leaf with a channel axis if this one has one.
    """
    seen = {n: g.unsqueeze(-2) for n, g in rule.leaf_gates(leaf, gates).items()}
    like, size = next(iter(seen.values())), 2 + rule.algorithm.slots
    dual, *slots, grad = torch.eye(size, dtype=like.dtype, device=like.device).unsqueeze(-1).unbind(0)
    new, new_slots = rule.update(dual, tuple(slots), grad, seen)
    rows = torch.stack(torch.broadcast_tensors(new, *new_slots), -3)
    kept = torch.stack([dual, *slots])
    return rows if keep is None else torch.where(keep[:, None, :, None, None, None], rows, kept)


def _eta(gates: dict[str, Tensor], keep: Tensor | None) -> Tensor:
    """Of gradient descent, A_t = alpha_t A_{t-1} - eta_t grad_t; a hole decays nothing already, and writes nothing."""
    return gates["eta"] if keep is None else torch.where(keep[:, None, :, None], gates["eta"], 0.0)


def _per_channel(gates: dict[str, Tensor], keep: Tensor | None) -> Coefficients:
    eta = _eta(gates, keep)
    width = max(g.shape[-1] for g in gates.values())
    log = gates["log_alpha"].cumsum(-2) if "log_alpha" in gates else torch.zeros_like(eta)
    decay = Decay(log.expand(*log.shape[:-1], width), eta)
    return Coefficients(decay, decay)


def _per_head(rule: Rule, gates: dict[str, Tensor], keep: Tensor | None) -> Coefficients:
    """A_t = a_{0t} A_0 - sum_{s <= t} a_{st} eta_s grad_s with a_{st} = alpha_{s+1} .. alpha_t.

    With momentum a token steps by S_t = b_{0t} S_0 + sum_{s <= t} b_{st} eta_s grad_s, b_{st} = theta_{s+1} .. theta_t,
    so that pairs of tokens have sum_{s <= i <= t} a_{it} b_{si} in place of a_{st}.
    """
    eta = _eta(gates, keep).squeeze(-1)
    log = gates["log_alpha"].squeeze(-1) if "log_alpha" in gates else torch.zeros_like(eta)
    later = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu()
    # Sums of logarithms from s on: a difference of sums from 0 on would lose digits, and be NaN after alpha = 0.
    sums = log.unsqueeze(-1).masked_fill(later, 0.0).cumsum(-2)
    pairs = sums.masked_fill(later.triu(1), -torch.inf).exp()
    decays = log.cumsum(-1).exp().unsqueeze(-1)
    grads, slots, momentum = -eta.unsqueeze(-2), decays[..., :0], None
    if isinstance(rule.algorithm, Momentum):
        momentum = _momentum(gates["theta"].squeeze(-1))
        steps = pairs if keep is None else pairs * keep[:, None, None, :]  # a hole takes no step
        with torch.autocast(log.device.type, enabled=False):
            slots, pairs = (steps @ momentum).tensor_split([1], -1)
    rows = torch.cat([decays, -slots, pairs * grads], -1).unsqueeze(-1)
    read = rows
    if rule.read_at == "before":
        found = torch.zeros_like(rows[..., :1, :, :])
        found[..., 0, :] = 1.0
        read = torch.cat([found, rows[..., :-1, :, :]], -3)
    ends = rows[..., -1, :, :]
    slot_ends = ends.new_zeros(*ends.shape[:-2], 0, *ends.shape[-2:])
    if momentum is not None:
        last, own = momentum[..., -1:, :], torch.cat([torch.ones_like(eta[..., :1]), eta], -1).unsqueeze(-2)
        slot_ends = F.pad(last * own, (1, 0)).unsqueeze(-1)
    return Coefficients(read, Ends(ends, slot_ends, decays if rule.gradient_at == "decayed" else None))


def _momentum(theta: Tensor) -> Tensor:
    """b_{0t} and b_{st} of `_per_head`, [..., C, 1 + C], from theta [..., C]."""
    eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    # S_t - theta_t S_{t-1} = grad_t, solved for all S: no logarithms, which have no derivative at theta = 0.
    system = eye - torch.diag_embed(theta[..., 1:], -1)
    start = F.pad(theta[..., :1], (0, theta.shape[-1] - 1)).unsqueeze(-1)
    right = torch.cat([start, eye.expand(*start.shape[:-1], -1)], -1)
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _where(held: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if held is None else torch.where(held, new, old)


def write_chunk(rule: Rule, leaves: dict[str, Leaf], state: State, chunk: Write) -> tuple[Learned, State]:
    """Learn from one chunk of every running sequence: what its reads need, and the next state."""
    links: dict[str, tuple[Tensor, Tensor]] = {}
    origin = state.origin
    if rule.gradient_at == "decayed":
        anchor, origin = _decayed(leaves, state, chunk)
    elif rule.link_at == "chunk":
        links = linearised(rule, leaves, state.origin, state.home)
        anchor = {n: weights for n, (weights, _) in links.items()}
    else:
        anchor = rule.link(state.origin, state.home, leaves)
    grad = rule.surprise(anchor, state.slow, chunk.k, chunk.v, chunk.gates, leaves)
    dual, slots = {}, {}
    for n, leaf in leaves.items():
        dual[n], slots[n] = _advance(state.dual[n], state.slots[n], grad[n], chunk.coefficients[n], leaf)
    return Learned(state, grad, links), _next_state(rule, state, dual, slots, origin, chunk.keep)


def linearised(
    rule: Rule, leaves: dict[str, Leaf], origin: dict[str, Tensor], home: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """{leaf: (link(O), its slope)} at chunks' origins, for reads within them."""
    assert isinstance(rule.retention, SlopedRetention)
    full = rule.full(origin, home)
    return {n: rule.retention.linearise(full[n], leaf) for n, leaf in leaves.items()}


def read_chunks(rule: Rule, leaves: dict[str, Leaf], learned: Learned, read: Read) -> Tensor:
    """Outputs [M, H, C, d_v] of any number of chunks at once."""
    weights = {n: read_weight(rule, leaf, learned, n, read.coefficients[n]) for n, leaf in leaves.items()}
    return rule.read(weights, read.q, learned.before.slow)


def _decayed(leaves: dict[str, Leaf], state: State, chunk: Write) -> tuple[Weights, dict[str, Tensor]]:
    """The origin retained up to each token, as weights to take gradients at, and up to the chunk's end."""
    weights: dict[str, Weight] = {}
    origin = {}
    for n, leaf in leaves.items():
        decay = chunk.coefficients[n].origin
        assert decay is not None
        bases = (state.origin[n], state.home[n]) if state.home else (state.origin[n],)
        weights[n] = Scaled(bases, decay.unsqueeze(-2), leaf.channel)
        origin[n] = along(decay[..., -1, :], leaf.channel) * state.origin[n]
    return weights, origin


def read_weight(rule: Rule, leaf: Leaf, learned: Learned, name: str, rows: Tensor | Decay) -> Weight:
    """What each token of a chunk reads with, W_t."""
    before, grad = learned.before, learned.grad[name]
    bases = (before.dual[name], *before.slots[name])
    late = rule.read_at == "after"
    if isinstance(rows, Decay):
        log = rows.log if late else F.pad(rows.log[..., :-1, :], (0, 0, 1, 0))
        coef = log.exp().unsqueeze(-2)

        def unrolled(all_bases: Scaled) -> Unrolled | Decayed:
            decayed = Decayed(all_bases, grad, log, rows.log, rows.eta, late - 1)
            many = grad.terms > 1  # a window's terms have one decay, so their pairs are those of tokens
            return Unrolled(all_bases, grad, grad.spread(decayed.coefficients())) if many else decayed
    else:
        coef, within = rows[..., : len(bases), :], grad.spread(rows[..., len(bases) :, :])

        def unrolled(all_bases: Scaled) -> Unrolled | Decayed:
            return Unrolled(all_bases, grad, within)

    if rule.link_at == "token":
        home = (before.home[name],) if before.home else ()
        full = unrolled(Scaled((*bases, *home), coef, leaf.channel))
        if isinstance(rule.retention, EuclideanRetention):
            return full
        return PerToken(rule.retention.primal(full.dense(), leaf))
    if bases[0] is before.origin[name]:
        # A_0 = O: alpha A_0 - O is one base with the coefficient alpha - 1.
        coef = torch.cat([coef[..., :1, :] - 1, coef[..., 1:, :]], -2)
    else:
        bases = (*bases, before.origin[name])
        coef = torch.cat([coef, -torch.ones_like(coef[..., :1, :])], -2)
    change = unrolled(Scaled(bases, coef, leaf.channel))
    return Linearised(*learned.links[name], change, leaf.simplex if rule.retention.on_simplex else None)


def _advance(
    dual: Tensor, slots: tuple[Tensor, ...], grad: Outer, coefficients: Ends | Decay, leaf: Leaf
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The dual and the slots at the chunk's end."""
    bases = (dual, *slots)
    if isinstance(coefficients, Decay):
        log, last = coefficients.log, coefficients.log[..., -1:, :]
        row = torch.cat([last.exp(), -(last - log).exp() * coefficients.eta], -2)
        return combine(row, bases, grad, leaf), ()
    rows = coefficients.slots.unbind(-3)
    return combine(coefficients.dual, bases, grad, leaf), tuple(combine(row, bases, grad, leaf) for row in rows)


def combine(row: Tensor, bases: Sequence[Tensor], grad: Outer, leaf: Leaf) -> Tensor:
    """sum_j row_j (.) base_j + sum_s row_s (.) grad_s, row [..., J + C, 1 | channels]. In the state's own precision,
    whatever autocast does to reads.
    """
    *decays, coef = row.split([1] * len(bases) + [row.shape[-2] - len(bases)], -2)
    total = None
    for decay, base in zip(decays, bases, strict=True):
        term = along(decay.squeeze(-2), leaf.channel) * base
        total = term if total is None else total + term
    left, right, _ = grad.times(coef, leaf.channel)
    with torch.autocast(left.device.type, enabled=False):
        return matmul_add(total, left.mT, right)


def _next_state(
    rule: Rule,
    state: State,
    dual: dict[str, Tensor],
    slots: dict[str, tuple[Tensor, ...]],
    origin: dict[str, Tensor],
    keep: Tensor | None,
) -> State:
    if keep is None:
        return replace(state, dual=dual, slots=slots, origin=dual, aligned=True)
    # The tokens of a sequence are side by side, so a token in the last slot means that the chunk is complete.
    full = keep[:, -1]
    origin = {n: torch.where(full[:, None, None, None], a, origin[n]) for n, a in dual.items()}
    return replace(
        state, dual=dual, slots=slots, origin=origin, offset=(state.offset + keep.sum(1)) % rule.chunk, aligned=False
    )
