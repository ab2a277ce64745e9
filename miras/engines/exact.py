"""Exact parallel forms of linear memories at chunk 1, a tile of tokens at a time.

* Dot product and least squares: nothing learned depends on the memory, so the chunk engine with any chunk is exact.
* With a decay on both sides it is not one product but still one sum: y_t = sum_s (decay of values) v_s (k_s . q_t with
  decay of keys), see `_two_sided`.
* Whatever erases (L2, `Erase`): with the prediction p_t = W e_t at the erase key e_t,

      A_t = A_{t-1} diag(alpha_t) - p_t b_t^T + x_t k_t^T      (b and k with eta in them; L2: e = k, b = k, x = v)

  so that p_t = A_0 g'_t e_t + W_0 e_t + sum_{s<t} (x_s k_s^T - p_s b_s^T) (g'_t / g_s) e_t, g the cumulated decay,
  g' = g where gradients are taken at the decayed memory and g_{t-1} where they are taken at the previous one: a unit
  triangular system for p, solved for all tiles at once (the WY or UT form of arXiv 2406.06484, 2412.06464, 2510.26692).

A tile is an evaluation's block size; it does not change the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import GradientDescent, Implicit, LeastSquares, LinearAlgorithm
from miras.bias import L2, Dot, Erase
from miras.decay import decayed_scores, decayed_sum
from miras.engines import chunk
from miras.engines.ragged import in_order, reassemble, running, split
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
    if not isinstance(rule.algorithm, GradientDescent | Implicit) or rule.window > 1:
        return f"with {rule.bias} it needs GradientDescent and no window, not {rule.algorithm}"
    return off_keys(rule, gates)


def _unclipped(rule: Rule, kind: Any) -> bool:
    return isinstance(rule.bias, kind) and not rule.bias.clip


def _on_keys(rule: Rule) -> bool:
    return isinstance(rule.memory, Linear) and rule.memory.gated == "keys"


def off_keys(rule: Rule, gates: Gates | None) -> str | None:
    """Why a tile cannot decay by these gates, or None: those per channel have to act on the keys of a matrix."""
    channels = gates is not None and any(gates[g.name].shape[-1] > 1 for g in rule.gates if not g.vector)
    return "it needs gates per head or per key channel" if channels and not _on_keys(rule) else None


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
    form = _two_sided if isinstance(rule.retention, TwoSided) else _erasing
    tiles = form(rule, q, k, v, gates, state)

    w, finished, before = in_order(cells, state.dual["w"]), [], []
    for size, (move, add) in zip(cells.sizes, split((tiles.move, tiles.add), cells.sizes), strict=True):
        w = running(w, size, finished)
        before.append(w)
        with torch.autocast(w.device.type, enabled=False):
            w = matmul_add(add, w, move) if form is _erasing else move * w + add
    y = tiles.read(torch.cat(before))
    dual = {"w": reassemble(cells, w, finished)}
    return cells.tokens(y), replace(state, dual=dual, origin=dual)


class Tiles(NamedTuple):
    """Tiles as affine maps of the memory A [M, H, d_v, d_k] that each finds.

    `move` and `add` give the memory it leaves, A move + add (move (.) A + add where decay has two sides), `read` the
    outputs [M, H, C, d_v].
    """

    move: Tensor
    add: Tensor
    read: Callable[[Tensor], Tensor]


class Decay:
    """Cumulated decay of a tile, log_decay [M, H, C, 1 | d], and products under it."""

    def __init__(self, log_gate: Tensor | None, like: Tensor) -> None:
        self.log = torch.zeros_like(like[..., :1]) if log_gate is None else log_gate.cumsum(-2)
        self.log_before = F.pad(self.log[..., :-1, :], (0, 0, 1, 0))

    def rows(self, before: bool) -> Tensor:
        """The decay up to each token, or up to the one before it."""
        return self.log_before if before else self.log

    def to_end(self, x: Tensor) -> Tensor:
        """What is left of each token's x at the end of the tile."""
        return (self.log[..., -1:, :] - self.log).exp() * x

    def scores(self, a: Tensor, b: Tensor, before: bool, strict: bool) -> Tensor:
        """sum_i a_ti b_si g_ti / g_si for s up to t, or strictly before it, else 0, [M, H, C, C]; `before`: g_{t-1}."""
        return decayed_scores(a, b, self.rows(before), self.log, -int(strict))

    def sum(self, scores: Tensor, v: Tensor, before: bool) -> Tensor:
        """sum_s scores_ts (g_t / g_s) (.) v_s for s up to t; `before`: g_{t-1} and s strictly before t."""
        return decayed_sum(scores, v, self.rows(before), self.log, -int(before))


def _erasing(rule: Rule, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Tiles:
    decay, eta = Decay(gates.get("log_alpha"), k), step_size(rule, gates["eta"], k)
    erase = gates["erase"] if isinstance(rule.bias, Erase) else k
    along = gates["along"] if isinstance(rule.bias, Erase) and rule.bias.along == "own" else k
    early, late = rule.gradient_at == "previous", rule.read_at == "after"
    known = mv(state.home["w"], erase) if state.home else torch.zeros_like(v)

    # What is erased, -p = fixed + change A_0^T with (I + past (e b)) p = W_0 e + past (e k) v + g' e A_0^T.
    # Where that is along its key, the error v - p instead, with (I + past (e k)) (v - p) = v - W_0 e - g' e A_0^T.
    removed = decay.scores(erase, eta * along, early, strict=True)
    system = torch.eye(removed.shape[-1], dtype=q.dtype, device=q.device) + removed
    own = v if along is k else -matmul(decay.scores(erase, eta * k, early, strict=True), v)
    both = torch.cat([own - known, -decay.rows(early).exp() * erase], -1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    fixed, change = solved.split([v.shape[-1], k.shape[-1]], -1)

    scores = decay.scores(q, eta * along, not late, strict=not late)
    reader = decay.rows(not late).exp() * q + matmul(scores, change)
    rest = matmul(scores, fixed)
    if along is not k:
        rest = rest + matmul(decay.scores(q, eta * k, not late, strict=not late), v)
    if state.home:
        rest = rest + mv(state.home["w"], q)
    with torch.autocast(q.device.type, enabled=False):
        end = decay.to_end(eta * along)
        move = torch.diag_embed(decay.log[..., -1, :].exp().expand(*k.shape[:-2], k.shape[-1])) + change.mT @ end
        add = fixed.mT @ end
        if along is not k:
            add = add + v.mT @ decay.to_end(eta * k)
    return Tiles(move, add, lambda before: rest + matmul(reader, before.mT))


def _two_sided(rule: Rule, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Tiles:
    """y_t = g^v_t (.) A_0 (g^k_t (.) q_t) + sum_s (g^v_t / g^v_s) (.) v_s <q_t, (g^k_t / g^k_s) (.) k_s>."""
    del state
    keys, values, k = Decay(gates["log_alpha"], k), Decay(gates["log_beta"], v), gates["eta"] * k
    before = rule.read_at == "before"
    scores = keys.scores(q, k, before, strict=before)
    rest = values.sum(scores, v, before)
    with torch.autocast(q.device.type, enabled=False):
        add = values.to_end(v).mT @ keys.to_end(k)
        move = values.log[..., -1, :, None].exp() * keys.log[..., -1, None, :].exp()
    out, reader = values.rows(before).exp(), keys.rows(before).exp() * q
    return Tiles(move, add, lambda w: rest + out * matmul(reader, w.mT))
