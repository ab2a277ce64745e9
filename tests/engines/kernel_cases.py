"""What kernels have to compute: rules of every choice that they know, and the checks of an engine made of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import assert_same, assert_same_states, call, draw_memory, draw_tokens, own
from contract import EXACT, assert_same_results, result

from miras.algorithm import GradientDescent, Momentum
from miras.bias import L1, L2, Dot, Huber, Lp, Robust
from miras.memory import MLP, SwiGLU
from miras.retention import KL, Bregman, Lq, NoRetention
from miras.retention import L2 as Decay
from miras.rule import Rule
from miras.state import tensors

SIZE = {"heads": 1, "d_k": 16}
GD, MOMENTUM = GradientDescent(rate="input"), Momentum(rate="input")
SMALL, GATED = MLP(expansion=1), SwiGLU(expansion=1)

# memory, bias, retention, algorithm, and whether gates are per channel: every choice that kernels know, once or more.
COVERING = (
    (SMALL, Dot(), NoRetention(), GradientDescent(), False),
    (MLP(expansion=1, activation="silu"), L2(clip=True), Decay(), Momentum(), False),
    (SMALL, Lp(), Lq(to="initial"), GD, False),
    (SMALL, Lp(p=2.5, form="paper"), Lq(q=3.0, link="mirror"), MOMENTUM, False),
    (MLP(expansion=2), Lp(p=1.5), Lq(to="initial"), GD, True),
    (MLP(expansion=1, eps=0.1), L1(), KL(to="initial"), MOMENTUM, False),
    (MLP(expansion=1, activation="gelu_tanh"), L1(form="paper"), Decay(to="initial"), GD, False),
    (MLP(expansion=2, eps=0.1), Huber(), Decay(to="initial"), GD, True),
    (MLP(expansion=1, norm=False), Huber(form="norm"), KL(), GD, True),
    (MLP(expansion=1, residual=False, norm=False), Huber(form="mixture", clip=True), Decay(), GD, False),
    (SMALL, Robust(), Decay(to="initial"), MOMENTUM, True),
    (GATED, Huber(), Decay(to="initial"), GD, False),
    (GATED, L2(), Lq(to="initial"), MOMENTUM, True),
    (SwiGLU(expansion=2, norm=False), L1(), KL(), GD, False),
    (SwiGLU(expansion=1, residual=False, norm=False), Dot(), NoRetention(), MOMENTUM, False),
)
# The same for links that the Triton engine alone has: of what kind, and where it acts.
TRITON = (
    (Rule(SMALL, L2(), Bregman(to="initial"), MOMENTUM, chunk=4), False),
    (Rule(SMALL, L2(), Bregman(to="initial"), GD, chunk=4, link_at="token"), True),
    (Rule(SMALL, L2(), Lq(), MOMENTUM, chunk=4, link_at="token"), False),
    (Rule(SMALL, L2(), KL(to="initial"), GD, chunk=4, link_at="token", read_at="before"), True),
)
YAAD = Rule(SMALL, Huber(), Decay(to="initial"), GD, chunk=4)
MOMENTARY = Rule(SMALL, L2(), KL(to="initial"), MOMENTUM, chunk=4)
AT_TOKENS = replace(MOMENTARY, link_at="token")
SWIGLU = Rule(GATED, Huber(), KL(to="initial"), MOMENTUM, chunk=4)


def problem(rule, time, channels=False, batch=2):
    """Tokens, and initial memories that gradients are wanted of."""
    tokens = draw_tokens(rule, batch=batch, time=time, channels=channels, **SIZE).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: x.requires_grad_() for n, x in part.items()} for part in draw_memory(rule, **SIZE))
    return tokens, weights, slow


def in_flight(rule, weights, slow):
    """A state that two rows left in the middle of a chunk, at different places of it."""
    with torch.no_grad():
        mask = torch.arange(6) < torch.tensor([[6], [3]])
        state = rule.init(weights, slow, batch=2)
        return call(rule, draw_tokens(rule, time=6, **SIZE), state, mask=mask, engine="recurrence")[1]


def assert_engine_is_the_loop(engine, rule, tokens, state, wrt, cuts=()):
    cotangents: list[torch.Tensor] = []
    loop = result(rule, tokens, state, wrt, cotangents, "recurrence", cuts)
    assert_same_results(result(rule, tokens, state, wrt, cotangents, engine, cuts), loop, engine)


def assert_engine_is_the_loop_from_the_middle(engine, rule, tokens, weights, slow, cuts):
    """The same from a state `in_flight`, with gradients of all that it holds."""
    state = in_flight(rule, weights, slow)
    state = state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), shared=True)
    wrt = {n: x for n, x in tensors(state).items() if x.is_floating_point()}
    assert_engine_is_the_loop(engine, rule, tokens, state, {**tokens.named(), **wrt}, cuts)


def assert_engine_is_the_loop_on(layout, engine, rule, tokens, *memory):
    """The same with padding or of a pack: `layout` has the options of `miras.run`, `memory` is that of `rule.init`."""
    rows = len(layout["cu_seqlens"]) - 1 if "cu_seqlens" in layout else tokens.q.shape[0]
    wrt, found = {**tokens.named(), **{n: x for part in memory for n, x in part.items()}}, []
    for name in ("recurrence", engine):
        y, state = call(rule, tokens, rule.init(*memory, batch=rows), engine=name, **layout)
        total = (y * torch.arange(y.shape[1]).view(1, -1, 1, 1)).sum() + sum((x * x).sum() for x in state.dual.values())
        found.append((y, state, torch.autograd.grad(total, list(wrt.values()))))
    (expected, loop, loop_grads), (y, state, grads) = found
    assert_same(y, expected, EXACT, "y")
    assert_same_states(state, loop, EXACT)
    for n, a, b in zip(wrt, grads, loop_grads, strict=True):
        assert_same(a, b, EXACT, n)


def assert_threads_make_no_difference(rule, tokens, state, wrt):
    """Of the native engine: three of them share out sequences and heads."""
    cotangents: list[torch.Tensor] = []
    one = result(rule, tokens, state, wrt, cotangents, "native")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same_results(result(rule, tokens, state, wrt, cotangents, "native"), one, "threads")
    finally:
        torch.set_num_threads(threads)


def assert_rounds_like(plain, engine, device, rule, tokens, memory, slack=1e-3):
    """In bfloat16 an engine's errors are at most twice those of a plain one under the same autocast: outputs, state and
    gradients, `memory` being the arguments of `rule.init`.
    """
    exact = under_autocast(False, "recurrence", device, rule, tokens, memory)
    others = [under_autocast(True, name, device, rule, tokens, memory) for name in (plain, engine)]
    for n, x in exact.items():
        size = x.square().mean().sqrt()
        limit, error = ((y[n].double() - x).square().mean().sqrt() / size for y in others)
        assert error <= 2 * limit + slack, f"{n}: {error:.2g}, the plain engine {limit:.2g}"


def under_autocast(enabled, engine, device, rule, tokens, memory):
    """Outputs, state and gradients, in float32 under autocast to bfloat16 or in float64."""
    dtype = torch.float32 if enabled else torch.float64
    tokens = tokens.map(lambda x: x.detach().to(device, dtype).requires_grad_())
    weights, slow = ({n: x.detach().to(device, dtype).requires_grad_() for n, x in part.items()} for part in memory)
    with torch.autocast(device, torch.bfloat16, enabled=enabled):
        y, state = call(rule, tokens, rule.init(weights, slow, batch=2), engine=engine)
    torch.manual_seed(0)
    loss = sum((x * torch.randn(x.shape).to(x)).sum() for x in (y, *state.dual.values()))
    wrt = {**tokens.named(), **weights, **slow}
    grads = torch.autograd.grad(loss, list(wrt.values()), allow_unused=True, materialize_grads=True)
    numbers = {n: x for n, x in own(state).items() if x.is_floating_point()}
    return {"y": y, **numbers, **{f"to {n}": x for n, x in zip(wrt, grads, strict=True)}}
