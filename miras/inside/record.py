"""What happens inside a model while it reads: token by token, by the definition of each layer's rule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.bias import Huber
from miras.engines import Engine
from miras.gates import GAMMA
from miras.hf import MirasForCausalLM
from miras.layer import layers_of
from miras.layout import Layout
from miras.recurrence import recurrence
from miras.rule import Gates, Rule, State, token
from miras.weights import Leaf, Outer

PIECE = 256
"""Tokens that are taken at once; it changes the memory needed, not the result."""


@dataclass(frozen=True)
class Trace:
    """A model on a text of T tokens.

    Attributes:
        tokens: int64 [T].
        loss: of each token given those before it, in bits, [T - 1], so the first token has none.
        layers: of each layer {quantity: [T, H]}, float; empty where it is attention.

    Quantities, of each token and head:
        surprise: norm of the gradient that the memory learns from, of all its matrices, as the algorithm sees it.
        extreme: share of the error's coordinates that Huber limits; where the whole error is limited, 0 or 1. With
            another bias, whether its gradient was clipped; absent where nothing can be.
        change: |W_t - W_{t-1}| / |W_t| of the weights W = link(A).
        distance: |W_t - W_0| / |W_0|, or |W_t| where the memory starts at zero.
        eta, log_alpha, ...: the rule's gates that are numbers, their mean where they are per channel.
    """

    tokens: Tensor
    loss: Tensor
    layers: tuple[Mapping[str, Tensor], ...]


@torch.no_grad()
def trace(model: MirasForCausalLM, tokens: Tensor, piece: int = PIECE) -> Trace:
    """Read a text and write down what every memory does.

    Args:
        model: in evaluation mode.
        tokens: int64 [T], at least two.
        piece: tokens taken at once, the state carried between.
    """
    backbone, found = model.model.backbone, layers_of(model)
    rules = [i for i, layer in enumerate(found) if isinstance(layer.rule, Rule)]
    watch, cache, losses, before = _Watch(len(rules)), None, [], backbone.engine
    backbone.engine = Engine("watch", "the definition, with an eye on it", lambda rule, gates, device: None, watch)
    try:
        for begin in range(0, len(tokens), piece):
            part, target = tokens[begin : begin + piece], tokens[begin + 1 : begin + 1 + piece]
            out = model(part[None].to(model.device), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, : len(target)].float()
            losses.append(F.cross_entropy(logits, target.to(model.device), reduction="none") / math.log(2))
    finally:
        backbone.engine = before
    seen = dict(zip(rules, watch.seen, strict=True))
    recorded = tuple(_of_tokens(seen.get(i, {}), len(tokens)) for i in range(len(found)))
    return Trace(tokens.cpu(), torch.cat(losses).cpu(), recorded)


class _Watch:
    """`Engine.run` that evaluates a rule by its definition and keeps what it sees, of one sequence.

    Args:
        layers: number of layers with a rule; a model calls them in turn.
    """

    def __init__(self, layers: int) -> None:
        self.seen: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in range(layers)]
        self.start: list[dict[str, Tensor]] = []
        self.calls = 0

    def __call__(
        self, rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout
    ) -> tuple[Tensor, State]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gates = {n: g.transpose(1, 2) for n, g in gates.items()}
        leaves = rule.leaves(q.shape[-1], v.shape[-1] // rule.window)
        weights = rule.link(state.dual, state.home, leaves)
        if self.calls < len(self.seen):
            self.start.append(weights)
        start, keep = self.start[self.calls % len(self.seen)], self.seen[self.calls % len(self.seen)]
        self.calls += 1
        size, outputs = _norm(start), []
        for here in _same_origin(rule, int(state.offset[0]), where.length):
            now = token(gates, here)
            for name, value in self._of_gradient(rule, state, k[..., here, :], v[..., here, :], now, leaves).items():
                keep[name].append(value)
            for t in range(here.start, here.stop):
                one = slice(t, t + 1)
                y, state = recurrence(rule, state, q[..., one, :], k[..., one, :], v[..., one, :], token(gates, one))
                outputs.append(y)
                weights, last = rule.link(state.dual, state.home, leaves), weights
                keep["change"].append(_ratio(_norm(_minus(weights, last)), _norm(weights)))
                away = _norm(_minus(weights, start))
                keep["distance"].append(torch.where(size > 0, _ratio(away, size), away))
        return torch.cat(outputs, -2).transpose(1, 2), state

    @staticmethod
    def _of_gradient(
        rule: Rule, state: State, k: Tensor, v: Tensor, gates: Gates, leaves: Mapping[str, Leaf]
    ) -> dict[str, Tensor]:
        """What does not depend on the order of tokens with one origin, {quantity: [B, H, C]}."""
        origin = state.origin
        if rule.gradient_at == "decayed":
            origin = {n: rule.decay(a, rule.matrix_gates(leaves[n], gates)) for n, a in origin.items()}
        weights = rule.link(origin, state.home, leaves)
        found = {"surprise": gradient_norm(rule.surprise(weights, state.slow, k, v, gates, leaves))}
        beside = [GAMMA.name, *(g.name for g in rule.bias.gates)]
        own = {n: _own(g, rule.window) if n in beside else g for n, g in gates.items()}
        k, v = _own(k, rule.window), _own(v, rule.window)
        if isinstance(rule.bias, Huber):
            found["extreme"] = rule.bias.extreme(rule.memory.vjp(weights, k, state.slow)[0], v, own)
        elif rule.bias.clip:
            u = rule.bias.grad(rule.memory.vjp(weights, k, state.slow)[0], v, own)
            found["extreme"] = (u.square().sum(-1) > u.shape[-1]).to(u.dtype)
        return found | {g.name: own[g.name].mean(-1) for g in rule.gates if not g.vector}


def gradient_norm(grad: Mapping[str, Outer]) -> Tensor:
    """|grad| of each token over all matrices, [..., C]."""
    return sum((g.dense().square().sum((-1, -2)) for g in grad.values()), torch.tensor(0.0)).sqrt()


def _same_origin(rule: Rule, offset: int, length: int) -> Iterator[slice]:
    """The tokens of a call in stretches whose gradients are taken at the same weights."""
    step, begin = rule.chunk if rule.gradient_at == "previous" else 1, 0
    while begin < length:
        end = min(begin + step - (offset + begin) % step, length)
        yield slice(begin, end)
        begin = end


def _own(x: Tensor, window: int) -> Tensor:
    """Of the tokens of a window side by side, oldest first, the last."""
    return x.unflatten(-1, (window, -1))[..., -1, :]


def _minus(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: a[n] - b[n] for n in a}


def _norm(weights: Mapping[str, Tensor]) -> Tensor:
    """[B, H, 1]."""
    return sum((w.square().sum((-1, -2)) for w in weights.values()), torch.tensor(0.0)).sqrt().unsqueeze(-1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a / b.clamp_min(torch.finfo(b.dtype).tiny)


def _of_tokens(seen: Mapping[str, list[Tensor]], length: int) -> dict[str, Tensor]:
    """What was seen as [T, H]; of several steps a token the sum of what adds up, the last distance, else the mean."""
    found = {}
    for name, parts in seen.items():
        x = torch.cat(parts, -1)[0].cpu().float().unflatten(-1, (length, -1))
        if name == "change" or name.startswith("log_"):
            x = x.sum(-1)
        else:
            x = x[..., -1] if name == "distance" else x.mean(-1)
        found[name] = x.T
    return found
