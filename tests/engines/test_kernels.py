"""Engines made of kernels against the token loop: in float64, so that both agree to 1e-9. Triton's run interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import call
from kernel_cases import (
    AT_TOKENS,
    COVERING,
    MOMENTARY,
    SWIGLU,
    TRITON,
    YAAD,
    assert_engine_is_the_loop,
    assert_engine_is_the_loop_from_the_middle,
    assert_engine_is_the_loop_on,
    in_flight,
    problem,
)

from miras.engines.native import build
from miras.memory import MLP
from miras.rule import Rule
from miras.state import tensors


def on(engine, *values, name=None):
    """A case of an engine; native kernels need a compiler."""
    marks = [pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")] * (engine == "native")
    return pytest.param(engine, *values, id=engine if name is None else f"{engine}-{name}", marks=marks)


ENGINES = pytest.mark.parametrize("engine", [on("native"), on("triton")])
CASES = [
    on(engine, Rule(*axes, chunk=4), channels, name=i)
    for engine in ("native", "triton")
    for i, (*axes, channels) in enumerate(COVERING)
    if engine == "triton" or (isinstance(axes[0], MLP) and not (channels and axes[3].slots))
]
CASES += [on("triton", *case, name=f"own-{i}") for i, case in enumerate(TRITON)]
NAMED = [
    *(
        on(engine, rule, name=name)
        for engine in ("native", "triton")
        for name, rule in {"yaad": YAAD, "momentary": MOMENTARY}.items()
    ),
    on("triton", AT_TOKENS, name="token"),
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
        on("triton", SWIGLU, CUTS[1], name="swiglu"),
        on("triton", replace(SWIGLU, first_order=True), CUTS[1], name="swiglu-first-order"),
        on("triton", replace(SWIGLU, link_at="token"), CUTS[1], name="swiglu-token"),
        on("triton", replace(YAAD, first_order=True), CUTS[1], name="first-order"),
    ],
)
def test_from_the_middle_of_a_chunk_cut_anywhere(engine, rule, cuts):
    tokens, weights, slow = problem(rule, 10)
    assert_engine_is_the_loop_from_the_middle(engine, rule, tokens, weights, slow, cuts)


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
        on("triton", SWIGLU, PADDED["pack"], name="swiglu-pack"),
    ],
)
def test_padding_and_packs(engine, rule, options):
    packed = "cu_seqlens" in options
    tokens, weights, slow = problem(rule, 18 if packed else 9, batch=1 if packed else 2)
    assert_engine_is_the_loop_on(options, engine, rule, tokens, weights, slow)


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
