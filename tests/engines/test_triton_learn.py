"""The Triton engine against the token loop, in Triton's interpreter: in float64, so that both agree to 1e-9."""

from __future__ import annotations

import pytest
import torch
from cases import assert_same, assert_same_states, call, draw_memory, draw_tokens
from contract import EXACT, assert_same_results, result
from torch.utils.flop_counter import FlopCounterMode

import miras
from miras import variants
from miras.algorithm import GradientDescent, MiniBatch, Momentum
from miras.bias import L1, L2, Custom, Dot, Huber, Lp, Robust
from miras.engines.triton import engine
from miras.engines.triton import learn as learning
from miras.engines.triton.learn import learn
from miras.errors import UsageError
from miras.memory import MLP, SwiGLU
from miras.retention import KL, Lq, NoRetention
from miras.retention import L2 as Decay
from miras.rule import Rule
from miras.state import tensors

SIZE = {"heads": 1, "d_k": 16}
GD, MOMENTUM = GradientDescent(rate="input"), Momentum(rate="input")
SMALL = MLP(expansion=1)

# memory, bias, retention, algorithm, and whether gates are per channel: every choice that kernels know, once or more.
COVERING = (
    (SMALL, Dot(), NoRetention(), GradientDescent(), False),
    (MLP(expansion=1, activation="silu"), L2(clip=True), Decay(), Momentum(), False),
    (SMALL, Lp(), Lq(to="initial"), GD, False),
    (SMALL, Lp(p=2.5, form="paper"), Lq(q=3.0, link="mirror"), MOMENTUM, False),
    (MLP(expansion=2), Lp(p=1.5), Lq(to="initial"), GD, True),
    (SMALL, L1(), KL(to="initial"), MOMENTUM, False),
    (MLP(expansion=1, activation="gelu_tanh"), L1(form="paper"), Decay(to="initial"), GD, False),
    (MLP(expansion=2), Huber(), Decay(to="initial"), GD, True),
    (MLP(expansion=1, norm=False), Huber(form="norm"), KL(), GD, True),
    (MLP(expansion=1, residual=False, norm=False), Huber(form="mixture", clip=True), Decay(), GD, False),
    (SMALL, Robust(), Decay(to="initial"), MOMENTUM, True),
)
CASES = [pytest.param(Rule(*axes, chunk=4), channels, id=f"{i}") for i, (*axes, channels) in enumerate(COVERING)]
YAAD = Rule(SMALL, Huber(), Decay(to="initial"), GD, chunk=4)
MOMENTARY = Rule(SMALL, L2(), KL(to="initial"), MOMENTUM, chunk=4)


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


def assert_engine_is_the_loop(rule, tokens, state, wrt, cuts=()):
    cotangents: list[torch.Tensor] = []
    loop = result(rule, tokens, state, wrt, cotangents, "recurrence", cuts)
    assert_same_results(result(rule, tokens, state, wrt, cotangents, "triton", cuts), loop, "triton")


@pytest.mark.parametrize("rule, channels", CASES)
def test_from_the_start(rule, channels):
    tokens, weights, slow = problem(rule, 8, channels)
    state = rule.init(weights, slow, batch=2)
    assert_engine_is_the_loop(rule, tokens, state, {**tokens.named(), **weights, **slow})


@pytest.mark.parametrize("rule", [YAAD, MOMENTARY], ids=["yaad", "momentary"])
@pytest.mark.parametrize("cuts", [(), (3, 7)], ids=str)
def test_from_the_middle_of_a_chunk_cut_anywhere(rule, cuts):
    tokens, weights, slow = problem(rule, 10)
    state = in_flight(rule, weights, slow)
    state = state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), shared=True)
    wrt = {n: x for n, x in tensors(state).items() if x.is_floating_point()}
    assert_engine_is_the_loop(rule, tokens, state, {**tokens.named(), **wrt}, cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.arange(9) < torch.tensor([[9], [6]])},
        {"mask": torch.arange(9) >= torch.tensor([[3], [0]])},
        {"cu_seqlens": torch.tensor([0, 3, 12, 18])},
    ],
    ids=["right", "left", "pack"],
)
def test_padding_and_packs(options):
    rule, packed = YAAD, "cu_seqlens" in options
    tokens, weights, slow = problem(rule, 18 if packed else 9, batch=1 if packed else 2)
    found = []
    for name in ("recurrence", "triton"):
        y, state = call(rule, tokens, rule.init(weights, slow, batch=3 if packed else 2), engine=name, **options)
        total = (y * torch.arange(y.shape[1]).view(1, -1, 1, 1)).sum() + sum((x * x).sum() for x in state.dual.values())
        wrt = {**tokens.named(), **weights, **slow}
        found.append((y, state, torch.autograd.grad(total, list(wrt.values()))))
    (expected, loop, loop_grads), (y, state, grads) = found
    assert_same(y, expected, EXACT, "y")
    assert_same_states(state, loop, EXACT)
    for n, a, b in zip(wrt, grads, loop_grads, strict=True):
        assert_same(a, b, EXACT, n)


@pytest.mark.parametrize("axes", [(SMALL, L2(), KL(to="initial"), MOMENTUM), (MLP(expansion=2), Huber(), Decay(), GD)])
def test_chunks_of_several_tiles_the_last_not_full(axes, monkeypatch):
    whole = learning.compiled_for
    monkeypatch.setattr(learning, "compiled_for", lambda *given: whole(*given) | {"TILE": 16, "LIMIT": 20})
    rule = Rule(*axes, chunk=20)
    tokens, weights, slow = problem(rule, 40, batch=1)
    assert_engine_is_the_loop(rule, tokens, rule.init(weights, slow), {**tokens.named(), **weights, **slow})


def test_nothing_is_mutated():
    tokens, weights, slow = problem(MOMENTARY, 10)
    state = in_flight(MOMENTARY, weights, slow)
    given = {**tokens.named(), **tensors(state)}
    before = {n: x.detach().clone() for n, x in given.items()}
    y, _ = call(MOMENTARY, tokens, state, engine="triton")
    y.sum().backward()  # an expanded gradient, of stride 0
    assert all(torch.equal(x, before[n]) for n, x in given.items())


def test_float32_is_as_near_as_the_token_loop_in_float32():
    tokens, weights, slow = problem(YAAD, 16)
    wrt = {**tokens.named(), **weights, **slow}

    def outcome(name, dtype):
        cast = tokens.map(lambda x: x.to(dtype))
        state = YAAD.init(*({n: x.to(dtype) for n, x in part.items()} for part in (weights, slow)), batch=2)
        y, _ = call(YAAD, cast, state, engine=name)
        return [y, *torch.autograd.grad(y.square().sum(), list(wrt.values()))]

    exact, loop, ours = (
        outcome(*how)
        for how in (("recurrence", torch.float64), ("recurrence", torch.float32), ("triton", torch.float32))
    )
    for x, rounded, got, name in zip(exact, loop, ours, ["y", *wrt], strict=True):
        error = (got - x).square().mean().sqrt() / x.square().mean().sqrt()
        allowed = (rounded - x).square().mean().sqrt() / x.square().mean().sqrt()
        assert error <= 2 * allowed + 1e-6, name


def test_under_autocast_operands_are_rounded_and_states_are_not():
    tokens, weights, slow = problem(YAAD, 8)
    tokens = tokens.map(lambda x: x.float())
    state = YAAD.init(*({n: x.float() for n, x in part.items()} for part in (weights, slow)), batch=2)
    exact, expected = call(YAAD, tokens, state, engine="triton")
    with torch.autocast("cpu", torch.bfloat16):
        y, after = call(YAAD, tokens, state, engine="triton")
    assert after.dual["w1"].dtype == torch.float32
    for got, full in ((y, exact), (after.dual["w1"], expected.dual["w1"])):
        assert 1e-5 < (got - full).norm() / full.norm() < 0.03


@pytest.mark.slow
def test_operators_keep_their_contract():
    """Schemas, fake tensors, autograd registration, under torch.compile: `torch.library.opcheck`."""
    torch.library.opcheck(learn, arguments())


def test_flops_are_those_of_the_formula():
    """Of P = 2 e d^2 entries a head 5 P a token forward (`miras/bench/flops.py`), the rest of 9 P being reads."""
    given = arguments()
    with FlopCounterMode(display=False) as counter:
        learn(*given)
    assert counter.get_total_flops() == 5 * 2 * 16 * 16 * 8


def arguments():
    """Of `learn`: two chunks of 4 tokens, one head of 16."""
    rule, found = YAAD, []
    tokens, weights, slow = problem(rule, 8, batch=1)
    original = engine.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "learn", lambda *given: found.append(given) or original(*given))
        call(rule, tokens, rule.init(weights, slow), engine="triton")
    return found[0]


# -- which rules it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes, reason",
    [
        ({"memory": SwiGLU()}, "MLP of 2 layers"),
        ({"memory": MLP(layers=3)}, "MLP of 2 layers"),
        ({"bias": Custom()}, "do not know the gradient"),
        ({"retention": Lq(q=1.5)}, "do not know the link"),
        ({"retention": KL(), "link_at": "token"}, "link_at='chunk'"),
        ({"algorithm": MiniBatch()}, "do not know MiniBatch"),
        ({"gradient_at": "decayed"}, "gradient_at='previous'"),
        ({"window": 2}, "window"),
        ({"chunk": 256}, "chunks above 128"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_says_why_not(axes, reason):
    rule = Rule(**{"memory": MLP(), "bias": L2(), "retention": Decay(), "algorithm": GD, "chunk": 4, **axes})
    assert reason in miras.explain(rule)["triton"]
    with pytest.raises(UsageError, match="cannot run this rule"):
        miras.plan(rule, "triton")


def test_on_a_cpu_it_runs_only_where_it_is_asked_for():
    rule = variants.yaad(chunk=4)
    tokens = (torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16))
    assert (
        miras.plan(rule, tokens=tokens).name == "chunk" and miras.plan(rule, "triton", tokens=tokens).name == "triton"
    )
    assert "CUDA" in miras.explain(rule, tokens=tokens)["triton"]
    with pytest.raises(UsageError, match="heads of 16, 32, 64, 128, not of 24"):
        miras.plan(rule, "triton", tokens=(torch.zeros(1, 4, 1, 24),) * 2)
