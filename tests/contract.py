"""The contract of a rule, as checks of one case that raise where it is broken.

`test_contract.py` runs them over the covering set, `test_product.py` and `benchmarks/product.py` run `check` over the
whole product.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import (
    Case,
    Tokens,
    as_leaves,
    assert_same,
    assert_same_states,
    call,
    draw_memory,
    draw_tokens,
    gentleness,
    own,
    steps,
)
from torch import Tensor

import miras
from miras import algorithm, bias, memory, retention
from miras.bias import Bias
from miras.gates import hole
from miras.rule import Rule, State
from miras.state import tensors

EXACT = 1e-9  # engine against token loop, float64


class Errors(NamedTuple):
    """How far an engine is from the token loop, relative to the largest entry: outputs and states, gradients."""

    forward: float = 0.0
    gradients: float = 0.0

    def worst(self, other: Errors) -> Errors:
        return Errors(max(self.forward, other.forward), max(self.gradients, other.gradients))


class Result(NamedTuple):
    """What a run gives: outputs, the state after every part of it, and outer gradients by name."""

    y: Tensor
    states: list[State]
    grads: dict[str, Tensor]


# -- engines: equal to the token loop, at any cut ---------------------------------------------------------------------


def state_in_flight(rule: Rule, weights, slow, channels=False) -> State:
    """A state that two rows left in the middle of a chunk, at different places of it."""
    with torch.no_grad():
        mask = torch.arange(6) < torch.tensor([[6], [3]])
        state = rule.init(weights, slow, batch=2)
        return call(rule, draw_tokens(rule, time=6, channels=channels), state, mask=mask, engine="recurrence")[1]


def result(
    rule: Rule, tokens: Tokens, state: State, wrt, cotangents: list[Tensor], engine: str, cuts: Sequence[int] = ()
) -> Result:
    """The run cut at `cuts`, and the gradients of one weighted sum of everything that comes out."""
    outputs, states, marks = [], [], [0, *cuts, tokens.q.shape[1]]
    for start, stop in itertools.pairwise(marks):
        part = tokens.part(start, stop) if cuts else tokens
        y, state = call(rule, part, state, engine=engine)
        outputs.append(y)
        states.append(state)
    y = torch.cat(outputs, 1)
    floats = [x for x in (y, *own(state).values()) if x.is_floating_point()]
    if not cotangents:
        cotangents.extend(torch.randn_like(x) for x in floats)
    total = sum((x * c).sum() for x, c in zip(floats, cotangents, strict=True))
    grads = torch.autograd.grad(total, list(wrt.values()), materialize_grads=True, allow_unused=True)
    return Result(y, states, dict(zip(wrt, grads, strict=True)))


def assert_same_results(got: Result, expected: Result, what: str) -> Errors:
    """Equal to `EXACT`; says how far apart."""
    forward = assert_same(got.y, expected.y, EXACT, f"y, {what}")
    forward = max(forward, assert_same_states(got.states[-1], expected.states[-1], EXACT))
    far = (assert_same(got.grads[n], x, EXACT, f"gradient of {n}, {what}") for n, x in expected.grads.items())
    return Errors(forward, max(far))


def engines_agree(rule: Rule, tokens: Tokens, state: State, wrt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every engine that can run the rule against the token loop, whose gradients are returned."""
    cotangents: list[Tensor] = []
    loop = result(rule, tokens, state, wrt, cotangents, "recurrence")
    for engine, said in miras.explain(rule, tokens.gates, (tokens.k, tokens.v)).items():
        if engine == "recurrence" or said not in ("chosen", "possible"):
            continue
        assert_same_results(result(rule, tokens, state, wrt, cotangents, engine), loop, engine)
    return loop.grads


def from_the_start(case: Case) -> None:
    """From the initial memory: engines agree, and every input and initial matrix has a gradient."""
    tokens = draw_tokens(case.rule, channels=case.channels).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: w.requires_grad_() for n, w in part.items()} for part in draw_memory(case.rule))
    state = case.rule.init(weights, slow, batch=2)
    assert_gradients(engines_agree(case.rule, tokens, state, {**tokens.named(), **weights, **slow}))


def from_the_middle(case: Case) -> None:
    """From a state in the middle of a chunk: engines agree, and everything the next tokens see of it has a gradient."""
    tokens = draw_tokens(case.rule, time=7, channels=case.channels).map(torch.Tensor.requires_grad_)
    state = as_leaves(state_in_flight(case.rule, *draw_memory(case.rule), case.channels))
    named = {n: x for n, x in tensors(state).items() if x.is_floating_point()}
    grads = engines_agree(case.rule, tokens, state, {**tokens.named(), **named})
    assert_gradients({n: grads[n] for n in tokens.named()})


def assert_gradients(grads: dict[str, Tensor]) -> None:
    """Finite and not all zero.

    None is zero by construction once there are more tokens than a chunk has: decay needs a memory that is not zero and
    momentum a past step, which the second token has; a threshold delta needs an extreme token, which centres of 1 at
    values of variance 1 give; an l_1 error needs one near zero.
    """
    for name, grad in grads.items():
        assert grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert grad.any(), f"the gradient of {name} is zero"


def joined(a: Tensor, b: Tensor, t: int, n: int) -> Tensor:
    """a with its token t, of n entries, replaced by that of b."""
    return torch.cat([a[:, : t * n], b[:, t * n : (t + 1) * n], a[:, (t + 1) * n :]], 1)


def with_another_token(tokens: Tokens, other: Tokens, t: int) -> Tokens:
    """The tokens with token t replaced by that of `other`."""
    changed = Tokens(*(joined(a, b, t, tokens.per(a)) for a, b in zip(tokens[:3], other[:3], strict=True)), {})
    return changed._replace(gates={n: joined(g, other.gates[n], t, tokens.per(g)) for n, g in tokens.gates.items()})


# -- recall: a pair that was written is read better --------------------------------------------------------------------

# A step along the gradient descends while eta is below 2 over the curvature. That of L1, 1/sqrt(1e-6) = 1000, is the
# largest of all biases; momentum 1/2 repeats the step and so doubles it at most; the rest is for links steeper than 1.
WRITE = 5e-4


def recall_not_promised(rule: Rule) -> str | None:
    """Why a small step need not lower the error of its own pair, or None."""
    if isinstance(rule.retention, retention.Lq) and rule.retention.link == "paper" and rule.retention.q != 2:
        return "the printed link of Lq has degree 3 - q: a step that lengthens A may shorten W"
    orthogonal = isinstance(rule.algorithm, algorithm.Muon) and rule.step_at == "chunk"
    if orthogonal and isinstance(rule.memory, memory.Deep):
        return "the orthogonalised step of a chunk has norm 1 whatever eta is, beyond where a deep memory is linear"
    return None


def recall_error(loss: Bias, y: Tensor, v: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """What the bias lowers, per row and head."""
    if isinstance(loss, bias.Erase):
        # With the key itself as erase key the rule is the delta rule; its loss is that of the write alone.
        return bias.L2().loss(y, v, gates)
    if getattr(loss, "form", None) == "paper":
        # The paper's form is the gradient of the sum of the coordinates' own integrals, not of `loss`.
        way = torch.linspace(0, 1, 101, dtype=y.dtype)[:, None, None, None, None]
        return torch.trapezoid((loss.grad(v + way * (y - v), v, gates) * (y - v)).sum(-1), way.flatten(), dim=0)
    return loss.loss(y, v, gates)


def recall(case: Case, heads: int = 2) -> None:
    """A random memory that is shown a pair recalls it better than the same memory, shown it with eta 0; where that is
    not promised it recalls it differently.
    """
    rule, d = case.rule, 4
    weights = {
        n: torch.randn(heads, x.rows, x.cols).double() * (x.std or 1.0) / rule.retention.slope0(x)
        for n, x in rule.leaves(d, d).items()
    }
    if "h" in weights:  # a sum of outer products of keys
        weights["h"] = weights["h"] @ weights["h"].mT
    state = rule.init(weights, batch=2)
    # The pair is written by the first step; the others write nothing up to the chunk's end, where every rule has done
    # what it does, and one more token reads what it finds.
    time, n = rule.chunk + 1, steps(rule)
    k = F.normalize(torch.randn(2, 1, heads, d, dtype=torch.float64), dim=-1)
    # Above what is stored in half of the coordinates and below it in the others: a simplex does not see a step that is
    # the same in all of them.
    v = (4 + torch.randn(2, 1, heads, d, dtype=torch.float64).abs()) * torch.tensor([1.0, -1.0]).repeat(d // 2)
    gates = {}
    for gate in rule.gates:
        entries = time if gate in rule.retention.gates else time * n
        value = 0.5 if gate.name in ("theta", "shift") else hole(gate.name)
        gates[gate.name] = torch.full((2, entries, heads, 1), value, dtype=torch.float64)
        if gate.vector:
            gates[gate.name] = k.expand(-1, entries, -1, -1)
    errors = []
    for eta in (0.0, WRITE):
        gates["eta"] = torch.zeros(2, time * n, heads, 1, dtype=torch.float64)
        gates["eta"][:, 0] = eta
        tokens = Tokens(
            k.expand(-1, time, -1, -1), k.expand(-1, time * n, -1, -1), v.expand(-1, time * n, -1, -1), gates
        )
        y = call(rule, tokens, state)[0][:, -1:]
        errors.append(recall_error(rule.bias, y, v, {name: g[:, :1] for name, g in gates.items()}))
    before, after = errors
    assert after.isfinite().all() and (after != before).all(), "the pair leaves no trace"
    if recall_not_promised(rule):
        return
    assert (after < before).all(), f"the pair's error rises by {(after - before).max():.3g} where it should fall"


# -- training ---------------------------------------------------------------------------------------------------------


def training(case: Case, time: int = 9) -> None:
    """A step in float32, then one under autocast: finite loss and gradients, and every parameter moves."""
    channels = case.channels and not case.rule.channel_conflict(8, 8)
    layer = miras.MirasLayer(16, 2, case.rule, gates="channel" if channels else "head", gate_rank=2, context=32)
    # The largest stable eta of a bias or a retention bounds the gate of a rule with chunks only; without it a memory of
    # an exponential link and no norm overflows in these few tokens.
    limit = 1.0 if case.rule.chunk > 1 else case.rule.bias.eta_limit * case.rule.retention.eta_limit
    eta = gentleness(case.rule) * limit * layer.gates["eta"].gate.init
    # Values of a fresh layer are small. A threshold below them makes some tokens extreme: only those move it.
    for name, start in (("delta", 0.3), ("eta", eta)):
        if name in layer.gates:
            torch.nn.init.constant_(layer.gates[name].bias, layer.gates[name].gate.unsquash(start))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    x, target = torch.randn(2, 2, time, 16)
    x = 4 * x  # writes that a zero memory behind a threshold keeps
    for cast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        with cast:
            loss = (layer(x)[0] - target).square().mean()
        assert loss.isfinite(), f"the loss is {loss.item()}"
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert not torch.equal(parameter, before[name]), f"{name} does not move"


# -- all of it, at the smallest size that shows it ---------------------------------------------------------------------


def check(case: Case) -> Errors:
    """The contract on one problem: two rows, one head, 9 tokens; at chunk 4 two whole chunks and a begun one.

    The same problem for the same case, whatever ran before it.
    """
    torch.manual_seed(zlib.crc32(str(case).encode()))
    rule, cut = case.rule, 5
    tokens = draw_tokens(rule, time=9, heads=1, channels=case.channels).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: w.requires_grad_() for n, w in part.items()} for part in draw_memory(rule, heads=1))
    start, wrt = rule.init(weights, slow, batch=2), {**tokens.named(), **weights, **slow}
    cotangents: list[Tensor] = []
    loop = result(rule, tokens, start, wrt, cotangents, "recurrence")
    assert_gradients(loop.grads)
    whole = result(rule, tokens, start, wrt, cotangents, "auto")
    errors = assert_same_results(whole, loop, "whole")
    parts = result(rule, tokens, start, wrt, cotangents, "auto", (cut,))
    errors = errors.worst(assert_same_results(parts, loop, f"cut at {cut}"))
    with torch.no_grad():
        other = draw_tokens(rule, time=9, heads=1, channels=case.channels)
        y, _ = call(rule, with_another_token(tokens, other, cut), start)
        assert_same(y[:, :cut], whole.y[:, :cut], 1e-12, "tokens before one that changes")
        assert not torch.equal(y[:, cut], whole.y[:, cut]), "a token that changes changes nothing"
        first, second = tokens.part(0, cut, row=0), tokens.part(row=1)
        pack = Tokens(*(torch.cat(x, 1) for x in zip(first[:3], second[:3], strict=True)), {})
        pack = pack._replace(gates={n: torch.cat([g, second.gates[n]], 1) for n, g in first.gates.items()})
        y, state = call(rule, pack, start, cu_seqlens=torch.tensor([0, cut, cut + 9]))
        assert_same(y, torch.cat([loop.y[:1, :cut], loop.y[1:]], 1), EXACT, "packed")
        for row, alone in enumerate((parts.states[0], loop.states[-1])):
            one = torch.tensor([row])
            assert_same_states(state.index_select(one), alone.index_select(one), EXACT)
        recall(case, heads=1)
    training(case)
    return errors
