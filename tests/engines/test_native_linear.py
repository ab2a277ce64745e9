"""The native engine's kernel for linear memories at chunk 1 against the token loop, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import assert_same_states, call, draw_memory, draw_tokens, matrix
from contract import EXACT, engines_agree
from kernel_cases import assert_engine_is_the_loop, assert_engine_is_the_loop_on, assert_threads_make_no_difference
from torch.utils.flop_counter import FlopCounterMode

import miras
from miras import algorithm, bias, memory, retention, variants
from miras.engines.native import build, linear
from miras.rule import Rule

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

SIZE = {"heads": 2, "d_k": 16, "d_v": 32}
PRESETS = (
    *("linear_attention", "retnet", "gla", "mamba2", "deltanet", "gated_deltanet", "kda", "comba", "rwkv7"),
    "homing_deltanet",
)
MORE = (
    matrix(bias.L2(), retention.L2(), algorithm.Implicit(), start="learned"),
    matrix(bias.L2(), retention.L2(), algorithm.GradientDescent(steps=2), channels=True, gradient_at="decayed"),
    matrix(bias.L2(), retention.L2(), channels=True, gradient_at="decayed", read_at="before"),
    matrix(bias.Erase(), retention.L2(), channels=True, gradient_at="decayed"),
    matrix(bias.Erase(), retention.NoRetention(), read_at="before"),
    matrix(bias.Erase(along="key"), retention.L2(), channels=True),
    matrix(bias.Dot(), retention.L2(), channels=True, read_at="before"),
    matrix(bias.L2(), retention.L2(to="initial"), channels=True, start="learned", read_at="before"),
    matrix(bias.L2(), retention.NoRetention(to="initial"), algorithm.Implicit(), start="learned"),
    matrix(bias.Dot(), retention.L2(to="initial"), start="learned"),
    matrix(bias.Erase(along="key"), retention.L2(to="initial"), start="learned", gradient_at="decayed"),
    matrix(bias.Huber(), retention.L2(), gradient_at="decayed"),
    matrix(bias.Huber(), retention.L2(to="initial"), start="learned"),
    matrix(bias.Huber(), retention.NoRetention(), algorithm.GradientDescent(steps=2), read_at="before"),
    matrix(bias.L1(), retention.L2()),
    matrix(bias.L1(form="paper"), retention.NoRetention()),
    matrix(bias.Lp(p=3.0, clip=False), retention.L2(), channels=True),
    matrix(bias.Lp(p=1.5, form="paper"), retention.L2(to="initial"), start="learned", gradient_at="decayed"),
    matrix(bias.Huber(form="norm"), retention.L2(), read_at="before"),
    matrix(bias.Huber(form="mixture"), retention.L2(to="initial"), start="learned"),
    matrix(bias.Robust(), retention.L2(), gradient_at="decayed"),
    matrix(bias.L2(clip=True), retention.L2(), channels=True),
    matrix(bias.Lp(), retention.NoRetention(), algorithm.GradientDescent(steps=2)),
)
DELTA = variants.gated_deltanet()
HUBER = replace(DELTA, bias=bias.Huber())
HOME = variants.homing_deltanet()


def problem(rule, time, channels=False, batch=2):
    """Tokens, and initial memories that gradients are wanted of."""
    tokens = draw_tokens(rule, batch=batch, time=time, channels=channels, **SIZE).map(torch.Tensor.requires_grad_)
    start = {n: torch.randn_like(w).requires_grad_() for n, w in draw_memory(rule, **SIZE)[0].items()}
    return tokens, start


@pytest.mark.parametrize("time", [7, 64], ids=["a part of a tile", "two tiles"])
@pytest.mark.parametrize(
    "rule, channels",
    [
        *(pytest.param(variants.variant(name), name in ("gla", "kda", "rwkv7"), id=name) for name in PRESETS),
        *(pytest.param(case.rule, case.channels, id=str(case)) for case in MORE),
    ],
)
def test_it_is_the_token_loop(rule, channels, time):
    tokens, start = problem(rule, time, channels)
    assert miras.explain(rule, tokens.gates, (tokens.k, tokens.v))["native"] == "chosen"
    engines_agree(rule, tokens, rule.init(start, batch=2), {**tokens.named(), **start})


@pytest.mark.parametrize("width", [1, SIZE["d_v"]])
def test_gates_per_channel_and_a_threshold_of_either_kind(width):
    tokens, start = problem(HUBER, 40, channels=True)
    delta = (0.1 + torch.rand(2, 40, SIZE["heads"], width)).to(tokens.v).requires_grad_()
    tokens = tokens._replace(gates={**tokens.gates, "delta": delta})
    assert_engine_is_the_loop("native", HUBER, tokens, HUBER.init(start, batch=2), {**tokens.named(), **start})


@pytest.mark.parametrize("rule", [DELTA, HOME, HUBER], ids=["to zero", "to a home", "Huber"])
@pytest.mark.parametrize("cuts", [(20,), (3, 40)], ids=str)
def test_cut_anywhere(cuts, rule):
    tokens, start = problem(rule, 45)
    assert_engine_is_the_loop("native", rule, tokens, rule.init(start, batch=2), {**tokens.named(), **start}, cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.arange(40) < torch.tensor([[40], [6]])},
        {"mask": torch.arange(40) >= torch.tensor([[35], [0]])},
        {"cu_seqlens": torch.tensor([0, 3, 72, 80])},
    ],
    ids=["right", "left", "pack"],
)
@pytest.mark.parametrize("rule", [DELTA, HOME, HUBER], ids=["to zero", "to a home", "Huber"])
def test_padding_and_packs(options, rule):
    packed = "cu_seqlens" in options
    tokens, start = problem(rule, 80 if packed else 40, batch=1 if packed else 2)
    assert_engine_is_the_loop_on(options, "native", rule, tokens, start)


def test_several_threads_share_the_sequences_and_heads():
    tokens, start = problem(DELTA, 40)
    assert_threads_make_no_difference(DELTA, tokens, DELTA.init(start, batch=2), {**tokens.named(), **start})


def test_nan_in_one_sequence_stays_there():
    tokens, start = problem(DELTA, 40)
    with torch.no_grad():
        tokens.k[1, 3] = torch.nan
        y, state = call(DELTA, tokens, DELTA.init(start, batch=2), engine="native")
    assert y[0].isfinite().all() and y[1, 4:].isnan().all()
    assert state.dual["w"][0].isfinite().all() and state.dual["w"][1].isnan().any()


def test_a_gate_that_forgets_everything_leaves_nothing_of_before():
    tokens, start = problem(DELTA, 40)
    gates = {**tokens.gates, "log_alpha": tokens.gates["log_alpha"].clone()}
    gates["log_alpha"][:, 20] = -torch.inf
    _, whole = call(DELTA, tokens._replace(gates=gates), DELTA.init(start, batch=2), engine="native")
    _, tail = call(DELTA, tokens.part(20), engine="native")
    assert_same_states(whole, tail, EXACT)


def test_layers_of_several_rules_are_a_graph_each_for_the_compiler():
    """What differs between them, such as the range of a gate, becomes a symbol to it."""
    x = torch.randn(1, 8, 32)
    for rule in (variants.memora(chunk=4), DELTA):
        layer = miras.MirasLayer(32, 2, rule)
        expected, _ = layer(x)
        y, _ = torch.compile(layer, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, expected)


def arguments():
    """Of `linear_scan`: 2 sequences, 2 heads, 2 tiles."""
    tokens, start = problem(DELTA, 64)
    found, scan = [], linear.linear_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "linear_scan", lambda *given: found.append(given) or scan(*given))
        call(DELTA, tokens, DELTA.init(start, batch=2), engine="native")
    return found[0]


@pytest.mark.slow
def test_operators_keep_their_contract():
    """Schemas, fake tensors, autograd registration, under torch.compile: `torch.library.opcheck`."""
    torch.library.opcheck(torch.ops.miras.linear_scan.default, arguments())


def test_nothing_is_kept_where_no_gradient_is_wanted():
    with torch.no_grad():
        *_, kept = given = arguments()
        assert not kept and not any(x.numel() for x in torch.ops.miras.linear_scan(*given)[2:])


def test_flops_are_those_of_the_formula():
    """Predict, step and read: 2 P each a token and head (`miras/bench/flops.py`), and twice that on the way back."""
    tokens, start = problem(DELTA, 64)
    with FlopCounterMode(display=False) as counter:
        y, _ = call(DELTA, tokens, DELTA.init(start, batch=2), engine="native")
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 2 * (3 * 2 * 16 * 32)


@pytest.mark.parametrize(
    "rule, tokens, reason",
    [
        (Rule(memory.Linear(), bias.L2(), retention.L2(), algorithm.GradientDescent(), chunk=4), None, "chunk 1"),
        (matrix(bias.Dot(), retention.TwoSided()).rule, None, "decay of one side"),
        (matrix(bias.Erase(), retention.L2(to="initial"), start="learned").rule, None, "Erase(along='key')"),
        (matrix(bias.Dot(), retention.L2(), algorithm.Momentum()).rule, None, "gradient descent"),
        (DELTA, (torch.zeros(1, 4, 1, 24), torch.zeros(1, 4, 1, 16)), "a multiple of 16 up to 256, not of 24 and 16"),
    ],
    ids=["chunk", "two sides", "home", "momentum", "heads"],
)
def test_it_says_why_not(rule, tokens, reason):
    assert reason in miras.explain(rule, tokens=tokens)["native"]
