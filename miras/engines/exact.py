"""Exact parallel forms of linear memories at chunk 1, a tile of tokens at a time.

* Dot product and least squares: nothing learned depends on the memory, so the chunk engine with any chunk is exact.
* With a decay on both sides it is not one product but still one sum: y_t = sum_s (decay of values) v_s (k_s . q_t with
  decay of keys), see `_two_sided`.
* Whatever erases (L2, `Erase`): with the prediction p_t = W e_t at the erase key e_t,

      A_t = A_{t-1} diag(alpha_t) - p_t b_t^T + x_t k_t^T      (b and k with eta in them; L2: e = k, b = k, x = v)

  so that p_t = A_0 g'_t e_t + W_0 e_t + sum_{s<t} (x_s k_s^T - p_s b_s^T) (g'_t / g_s) e_t, g the cumulated decay,
  g' = g where gradients are taken at the decayed memory and g_{t-1} where they are taken at the previous one: a unit
  triangular system for p, solved for all tiles at once (the WY or UT form of arXiv 2406.06484, 2412.06464, 2510.26692).
* With momentum the same system has other coefficients: A_t is a sum of A_0, S_0 and all (x_s k_s^T - p_s b_s^T) with
  numbers that are the gates' alone, see `Surprise`, and a tile maps the two matrices [A S] to what it leaves of both.

A tile is an evaluation's block size; it does not change the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import GradientDescent, Implicit, LeastSquares, LinearAlgorithm, Momentum
from miras.bias import L2, Dot, Erase
from miras.decay import decayed_scores, decayed_sum
from miras.engines import chunk
from miras.engines.programs import update_rows
from miras.engines.ragged import in_order, reassemble, running, split
from miras.engines.unroll import coefficients
from miras.gates import silence
from miras.layout import Layout, grid
from miras.memory import Linear, Vector
from miras.products import matmul, matmul_add
from miras.retention import EuclideanRetention, TwoSided
from miras.rule import Gates, Rule, State
from miras.weights import mv

TILE = 32


def refuses(rule: Rule, gates: Gates | None = None, tokens: object = None) -> str | None:
    """Why this engine cannot run a rule (with these gates), or None."""
    del tokens
    if rule.chunk != 1:
        return f"it is for chunk 1, the rule has chunk {rule.chunk}"
    if not isinstance(rule.memory, Linear | Vector):
        return f"it is for linear memories, not {rule.memory}"
    if not isinstance(rule.algorithm, LinearAlgorithm) or rule.algorithm.resets or rule.step_at == "chunk":
        return f"it is for one plain step a token, not {rule.algorithm} with step_at={rule.step_at!r}"
    if isinstance(rule.retention, TwoSided):
        plain = isinstance(rule.algorithm, GradientDescent) and rule.window == 1
        return (
            None if plain and _unclipped(rule, Dot) and _on_keys(rule) else f"{rule.retention} needs Dot and no window"
        )
    if not isinstance(rule.retention, EuclideanRetention):
        return f"{rule.retention} has a link"
    if _blind(rule):
        return None
    if rule.first_order:
        return "its derivative is of second order"
    if not isinstance(rule.memory, Linear) or not _unclipped(rule, L2 | Erase):
        return f"it needs Dot, or Linear with L2 or Erase and no clip, not {rule.memory} with {rule.bias}"
    if not isinstance(rule.algorithm, GradientDescent | Implicit | Momentum) or rule.window > 1:
        return f"with {rule.bias} it needs GradientDescent or Momentum and no window, not {rule.algorithm}"
    if rule.algorithm.slots and channel_gates(rule, gates):
        return f"with {rule.algorithm} it needs gates per head"
    return off_keys(rule, gates)


def _unclipped(rule: Rule, kind: Any) -> bool:
    return isinstance(rule.bias, kind) and not rule.bias.clip


def _on_keys(rule: Rule) -> bool:
    return isinstance(rule.memory, Linear) and rule.memory.gated == "keys"


def off_keys(rule: Rule, gates: Gates | None) -> str | None:
    """Why a tile cannot decay by these gates, or None: those per channel have to act on the keys of a matrix."""
    return "it needs gates per head or per key channel" if channel_gates(rule, gates) and not _on_keys(rule) else None


def channel_gates(rule: Rule, gates: Gates | None) -> set[str]:
    """The names of the gates that are given per channel, but for those that are vectors."""
    return {g.name for g in rule.gates if gates is not None and not g.vector and gates[g.name].shape[-1] > 1}


def off_home(rule: Rule) -> str | None:
    """Why `from_home` does not turn a rule into one that decays to zero, or None."""
    if rule.retention.to == "zero" or not isinstance(rule.bias, Erase) or rule.bias.along == "key":
        return None
    return f"with {rule.retention} it needs Dot, L2 or Erase(along='key')"


def from_home(rule: Rule, home: Mapping[str, Tensor], erase: Tensor, v: Tensor) -> Tensor:
    """The values [..., H, C, d_v] that A, which decays to zero, has to read so that the memory W_0 + A reads v: v less
    W_0 e, e being what is erased; v where nothing is. What W_0 + A answers is W_0 q more.
    """
    return v - mv(home["w"], erase) if home and not isinstance(rule.bias, Dot) else v


def step_size(rule: Rule, eta: Tensor, k: Tensor) -> Tensor:
    """What multiplies the gradient of a matrix memory at a key."""
    return eta / (1 + eta * k.square().sum(-1, keepdim=True)) if isinstance(rule.algorithm, Implicit) else eta


def _blind(rule: Rule) -> bool:
    """Whether nothing that is learned depends on the memory."""
    return isinstance(rule.algorithm, LeastSquares) or _unclipped(rule, Dot)


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same contract as the chunk engine's `run`."""
    if _blind(rule) and isinstance(rule.retention, EuclideanRetention):
        rule = replace(rule, gradient_at="previous")
        # With chunk 1 every state stands at the start of a chunk.
        fresh = replace(state, origin=state.dual, aligned=True)
        y, after = chunk.run(rule, fresh, q, k, v, gates, where, tile=TILE)
        return y, replace(after, origin=after.dual, offset=state.offset, aligned=True)
    cells = grid(where, TILE, None)
    q, k, v = cells.slots(q), cells.slots(k), cells.slots(v)
    gates = {n: cells.slots(g, silence(n)) for n, g in gates.items()}
    if isinstance(rule.retention, TwoSided):
        tiles = _two_sided(rule, q, k, v, gates)
    else:
        surprise = Surprise(rule, k, gates, cells.keep) if rule.algorithm.slots else Decay(gates.get("log_alpha"), k)
        tiles = _erasing(rule, surprise, q, k, v, gates, state)

    # The matrix, and beside it the algorithm's.
    w, finished, before = in_order(cells, torch.cat([state.dual["w"], *state.slots["w"]], -1)), [], []
    for size, (move, add) in zip(cells.sizes, split((tiles.move, tiles.add), cells.sizes), strict=True):
        w = running(w, size, finished)
        before.append(w)
        with torch.autocast(w.device.type, enabled=False):
            w = move * w + add if isinstance(rule.retention, TwoSided) else matmul_add(add, w, move)
    y = tiles.read(torch.cat(before))
    dual, *slots = reassemble(cells, w, finished).split(k.shape[-1], -1)
    return cells.tokens(y), replace(state, dual={"w": dual}, slots={"w": tuple(slots)}, origin={"w": dual})


class Tiles(NamedTuple):
    """Tiles as affine maps of the memory A [M, H, d_v, d_k] that each finds, with momentum [A S] [M, H, d_v, 2 d_k].

    `move` and `add` give the memory it leaves, A move + add (move (.) A + add where decay has two sides), `read` the
    outputs [M, H, C, d_v].
    """

    move: Tensor
    add: Tensor
    read: Callable[[Tensor], Tensor]


When = Literal["previous", "decayed", "after"]
"""Which memory: A_{t-1}, that with token t's decay, or A_t."""


def _seen(rule: Rule) -> When:
    return "after" if rule.read_at == "after" else "previous"


class Decay:
    """Cumulated decay of a tile, log_decay [M, H, C, 1 | d], and products under it."""

    def __init__(self, log_gate: Tensor | None, like: Tensor) -> None:
        self.log = torch.zeros_like(like[..., :1]) if log_gate is None else log_gate.cumsum(-2)
        self.log_before = F.pad(self.log[..., :-1, :], (0, 0, 1, 0))
        self.size = like.shape[-1]

    def start(self, x: Tensor, when: When) -> Tensor:
        """What each token's x meets of the memory that the tile finds, as a factor on its right."""
        return self._rows(when).exp() * x

    def scores(self, a: Tensor, b: Tensor, when: When) -> Tensor:
        """<a_t, b_s> times what is left of token s at t, 0 where it is not written yet, [M, H, C, C]."""
        return decayed_scores(a, b, self._rows(when), self.log, -int(when != "after"))

    def sum(self, scores: Tensor, v: Tensor, when: When) -> Tensor:
        """sum_s scores_ts (what is left of s at t) (.) v_s."""
        return decayed_sum(scores, v, self._rows(when), self.log, -int(when != "after"))

    def to_end(self, x: Tensor) -> Tensor:
        """What is left of each token's x at the end of the tile."""
        return (self.log[..., -1:, :] - self.log).exp() * x

    def move(self) -> Tensor:
        """What is left of the memory that the tile finds, as a matrix on its right."""
        last = self.log[..., -1, :].exp()
        return torch.diag_embed(last.expand(*last.shape[:-1], self.size))

    def _rows(self, when: When) -> Tensor:
        return self.log_before if when == "previous" else self.log


class Surprise:
    """The same with momentum, for gates per head: S_t = theta_t S_{t-1} + eta_t grad_t, A_t = alpha_t A_{t-1} - S_t.

    What is left of token s in A_t is sum_{s <= i <= t} alpha_{i+1} .. alpha_t theta_{s+1} .. theta_i, and what is
    found and left is [A S].
    """

    def __init__(self, rule: Rule, like: Tensor, gates: Gates, keep: Tensor | None) -> None:
        (leaf,) = rule.leaves(like.shape[-1], 1).values()
        plain = rule.leaf_gates(leaf, {**gates, "eta": torch.ones_like(gates["eta"])})  # eta is with the keys
        found = coefficients(replace(rule, read_at="before", gradient_at="previous"), plain, keep)
        assert isinstance(found.read, Tensor)
        previous, self.ends = found.read.squeeze(-1), update_rows(found.write).squeeze(-1)
        after = torch.cat([previous[..., 1:, :], self.ends[..., :1, :]], -2)
        self.rows = {"previous": previous, "decayed": rule.decay(previous, plain), "after": after}
        self.copies, self.size = self.ends.shape[-2], like.shape[-1]

    def start(self, x: Tensor, when: When) -> Tensor:
        """See `Decay`."""
        bases = self.rows[when][..., : self.copies]
        return (bases.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)

    def scores(self, a: Tensor, b: Tensor, when: When) -> Tensor:
        """See `Decay`."""
        return -self.rows[when][..., self.copies :] * matmul(a, b.mT)

    def to_end(self, x: Tensor) -> Tensor:
        """See `Decay`."""
        each = self.ends[..., self.copies :].mT
        return -(each.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)

    def move(self) -> Tensor:
        """See `Decay`."""
        eye = torch.eye(self.size, dtype=self.ends.dtype, device=self.ends.device)
        return torch.kron(self.ends[..., : self.copies].mT.contiguous(), eye)


def _erasing(rule: Rule, decay: Decay | Surprise, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Tiles:
    eta = step_size(rule, gates["eta"], k)
    erase = gates["erase"] if isinstance(rule.bias, Erase) else k
    along = gates["along"] if isinstance(rule.bias, Erase) and rule.bias.along == "own" else k
    asked, seen = rule.gradient_at, _seen(rule)
    known = mv(state.home["w"], erase) if state.home else torch.zeros_like(v)

    # What is erased, -p = fixed + change A_0^T with (I + past (e b)) p = W_0 e + past (e k) v + g' e A_0^T.
    # Where that is along its key, the error v - p instead, with (I + past (e k)) (v - p) = v - W_0 e - g' e A_0^T.
    removed = decay.scores(erase, eta * along, asked)
    system = torch.eye(removed.shape[-1], dtype=q.dtype, device=q.device) + removed
    own = v if along is k else -matmul(decay.scores(erase, eta * k, asked), v)
    both = torch.cat([own - known, -decay.start(erase, asked)], -1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    fixed, change = solved.tensor_split([v.shape[-1]], -1)

    scores = decay.scores(q, eta * along, seen)
    reader = decay.start(q, seen) + matmul(scores, change)
    rest = matmul(scores, fixed)
    if along is not k:
        rest = rest + matmul(decay.scores(q, eta * k, seen), v)
    if state.home:
        rest = rest + mv(state.home["w"], q)
    with torch.autocast(q.device.type, enabled=False):
        end = decay.to_end(eta * along)
        move, add = decay.move() + change.mT @ end, fixed.mT @ end
        if along is not k:
            add = add + v.mT @ decay.to_end(eta * k)
    return Tiles(move, add, lambda before: rest + matmul(reader, before.mT))


def _two_sided(rule: Rule, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tiles:
    """y_t = g^v_t (.) A_0 (g^k_t (.) q_t) + sum_s (g^v_t / g^v_s) (.) v_s <q_t, (g^k_t / g^k_s) (.) k_s>."""
    keys, values, k = Decay(gates["log_alpha"], k), Decay(gates["log_beta"], v), gates["eta"] * k
    seen = _seen(rule)
    rest = values.sum(keys.scores(q, k, seen), v, seen)
    with torch.autocast(q.device.type, enabled=False):
        add = values.to_end(v).mT @ keys.to_end(k)
        move = values.log[..., -1, :, None].exp() * keys.log[..., -1, None, :].exp()
    reader = keys.start(q, seen)
    return Tiles(move, add, lambda w: rest + values.start(matmul(reader, w.mT), seen))
