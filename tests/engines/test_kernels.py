"""Engines made of kernels against the token loop: in float64, so that both agree to 1e-9. Triton's run interpreted."""

from __future__ import annotations

import pytest
import torch
from cases import assert_same, assert_same_states, call
from contract import EXACT
from kernel_cases import (
    AT_TOKENS,
    COVERING,
    MOMENTARY,
    SWIGLU,
    TRITON,
    YAAD,
    assert_engine_is_the_loop,
    in_flight,
    problem,
)

from miras.engines.native import build
from miras.memory import MLP
from miras.rule import Rule
from miras.state import tensors

COMPILED = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
ENGINES = pytest.mark.parametrize("engine", [pytest.param("native", marks=COMPILED), "triton"])
CASES = [
    pytest.param(engine, Rule(*axes, chunk=4), channels, id=f"{engine}-{i}", marks=[COMPILED] * (engine == "native"))
    for engine in ("native", "triton")
    for i, (*axes, channels) in enumerate(COVERING)
    if engine == "triton" or (isinstance(axes[0], MLP) and not (channels and axes[3].slots))
]
CASES += [pytest.param("triton", *case, id=f"triton-own-{i}") for i, case in enumerate(TRITON)]
NAMED = [
    *(
        pytest.param(engine, rule, id=f"{engine}-{name}", marks=[COMPILED] * (engine == "native"))
        for engine in ("native", "triton")
        for name, rule in {"yaad": YAAD, "momentary": MOMENTARY}.items()
    ),
    pytest.param("triton", AT_TOKENS, id="triton-token"),
]
CUTS = (), (3, 7)
ALL_BUT_MOMENTARY = [case for case in NAMED if case.values[1] is not MOMENTARY]


@pytest.mark.parametrize("engine, rule, channels", CASES)
def test_from_the_start(engine, rule, channels):
    tokens, weights, slow = problem(rule, 8, channels)
    state = rule.init(weights, slow, batch=2)
    assert_engine_is_the_loop(engine, rule, tokens, state, {**tokens.named(), **weights, **slow})


@pytest.mark.parametrize(
    "engine, rule, cuts",
    [
        *(
            pytest.param(*case.values, cuts, id=f"{case.id}-{cuts}", marks=case.marks)
            for case in NAMED
            for cuts in CUTS
        ),
        pytest.param("triton", SWIGLU, CUTS[1], id="triton-swiglu"),
    ],
)
def test_from_the_middle_of_a_chunk_cut_anywhere(engine, rule, cuts):
    tokens, weights, slow = problem(rule, 10)
    state = in_flight(rule, weights, slow)
    state = state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), shared=True)
    wrt = {n: x for n, x in tensors(state).items() if x.is_floating_point()}
    assert_engine_is_the_loop(engine, rule, tokens, state, {**tokens.named(), **wrt}, cuts)


PADDED = {
    "right": {"mask": torch.arange(9) < torch.tensor([[9], [6]])},
    "left": {"mask": torch.arange(9) >= torch.tensor([[3], [0]])},
    "pack": {"cu_seqlens": torch.tensor([0, 3, 12, 18])},
}


@pytest.mark.parametrize(
    "engine, rule, options",
    [
        *(
            pytest.param(*case.values, options, id=f"{case.id}-{name}", marks=case.marks)
            for case in ALL_BUT_MOMENTARY
            for name, options in PADDED.items()
        ),
        pytest.param("triton", SWIGLU, PADDED["pack"], id="triton-swiglu-pack"),
    ],
)
def test_padding_and_packs(engine, rule, options):
    packed = "cu_seqlens" in options
    tokens, weights, slow = problem(rule, 18 if packed else 9, batch=1 if packed else 2)
    found = []
    for name in ("recurrence", engine):
        y, state = call(rule, tokens, rule.init(weights, slow, batch=3 if packed else 2), engine=name, **options)
        total = (y * torch.arange(y.shape[1]).view(1, -1, 1, 1)).sum() + sum((x * x).sum() for x in state.dual.values())
        wrt = {**tokens.named(), **weights, **slow}
        found.append((y, state, torch.autograd.grad(total, list(wrt.values()))))
    (expected, loop, loop_grads), (y, state, grads) = found
    assert_same(y, expected, EXACT, "y")
    assert_same_states(state, loop, EXACT)
    for n, a, b in zip(wrt, grads, loop_grads, strict=True):
        assert_same(a, b, EXACT, n)


@ENGINES
def test_nothing_is_mutated(engine):
    tokens, weights, slow = problem(MOMENTARY, 10)
    state = in_flight(MOMENTARY, weights, slow)
    given = {**tokens.named(), **tensors(state)}
    before = {n: x.detach().clone() for n, x in given.items()}
    y, _ = call(MOMENTARY, tokens, state, engine=engine)
    y.sum().backward()  # an expanded gradient, of stride 0
    assert all(torch.equal(x, before[n]) for n, x in given.items())


@pytest.mark.parametrize("engine, rule", ALL_BUT_MOMENTARY)
def test_float32_is_as_near_as_the_token_loop_in_float32(engine, rule):
    tokens, weights, slow = problem(rule, 16)
    wrt = {**tokens.named(), **weights, **slow}

    def outcome(name, dtype):
        cast = tokens.map(lambda x: x.to(dtype))
        state = rule.init(*({n: x.to(dtype) for n, x in part.items()} for part in (weights, slow)), batch=2)
        y, _ = call(rule, cast, state, engine=name)
        return [y, *torch.autograd.grad(y.square().sum(), list(wrt.values()))]

    exact, loop, ours = (
        outcome(*how) for how in (("recurrence", torch.float64), ("recurrence", torch.float32), (engine, torch.float32))
    )
    for x, rounded, got, name in zip(exact, loop, ours, ["y", *wrt], strict=True):
        error = (got - x).square().mean().sqrt() / x.square().mean().sqrt()
        allowed = (rounded - x).square().mean().sqrt() / x.square().mean().sqrt()
        assert error <= 2 * allowed + 1e-6, name
