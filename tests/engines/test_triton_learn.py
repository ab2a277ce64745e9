"""What is the Triton engine's own, in Triton's interpreter; `test_kernels.py` has what it shares with others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import call
from kernel_cases import GATED, GD, MOMENTUM, SMALL, SWIGLU, YAAD, assert_engine_is_the_loop, problem
from torch.utils.flop_counter import FlopCounterMode

import miras
from miras import variants
from miras.algorithm import MiniBatch
from miras.bias import L2, Custom, Huber
from miras.engines.triton import engine
from miras.engines.triton import learn as learning
from miras.engines.triton.learn import learn
from miras.errors import UsageError
from miras.memory import MLP, SwiGLU
from miras.retention import KL, Lq
from miras.retention import L2 as Decay
from miras.rule import Rule


@pytest.mark.parametrize(
    "axes",
    [
        (SMALL, L2(), KL(to="initial"), MOMENTUM),
        (MLP(expansion=2), Huber(), Decay(), GD),
        (SwiGLU(expansion=2), L2(), Decay(to="initial"), GD),
    ],
    ids=lambda axes: str(axes[0]),
)
def test_chunks_of_several_tiles_the_last_not_full(axes, monkeypatch):
    whole = learning.compiled_for
    monkeypatch.setattr(learning, "compiled_for", lambda *given: whole(*given) | {"TILE": 16, "LIMIT": 20})
    rule = Rule(*axes, chunk=20)
    tokens, weights, slow = problem(rule, 40, batch=1)
    assert_engine_is_the_loop("triton", rule, tokens, rule.init(weights, slow), {**tokens.named(), **weights, **slow})


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
    torch.library.opcheck(learn, arguments(SWIGLU))


@pytest.mark.parametrize("rule, products", [(YAAD, 5), (replace(YAAD, memory=GATED), 7)], ids=["MLP", "SwiGLU"])
def test_flops_are_those_of_the_formula(rule, products):
    """One of d^2 a token for each matrix forward, its pullback if it does not read the key, and its step
    (`miras/bench/flops.py`); the rest is reads.
    """
    given = arguments(rule)
    with FlopCounterMode(display=False) as counter:
        learn(*given)
    assert counter.get_total_flops() == products * 2 * 16 * 16 * 8


def arguments(rule):
    """Of `learn`: two chunks of 4 tokens, one head of 16."""
    found = []
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
        ({"memory": MLP(layers=3)}, "SwiGLU and for an MLP of 2 layers"),
        ({"bias": Custom()}, "do not know the gradient"),
        ({"retention": Lq(q=1.5)}, "do not know the link"),
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
        miras.plan(rule, tokens=tokens).name == "native" and miras.plan(rule, "triton", tokens=tokens).name == "triton"
    )
    assert "CUDA" in miras.explain(rule, tokens=tokens)["triton"]
    with pytest.raises(UsageError, match="heads of 16, 32, 64, 128, not of 24"):
        miras.plan(rule, "triton", tokens=(torch.zeros(1, 4, 1, 24),) * 2)
