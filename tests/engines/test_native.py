"""What is the native engine's own; `test_kernels.py` has what it shares with others."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch
from cases import call, draw_memory, draw_tokens
from kernel_cases import (
    GD,
    MOMENTARY,
    SMALL,
    SWIGLU,
    YAAD,
    assert_engine_is_the_loop,
    assert_engine_is_the_loop_from_the_middle,
    assert_engine_is_the_loop_on,
    assert_rounds_like,
    assert_threads_make_no_difference,
    problem,
)
from torch.utils.flop_counter import FlopCounterMode

import miras
from miras import variants
from miras.algorithm import Momentum
from miras.bias import L2, Huber
from miras.engines.native import build
from miras.engines.native import engine as native
from miras.engines.native.scan import scan
from miras.memory import MLP
from miras.retention import KL, Bregman, Lq, NoRetention
from miras.retention import L2 as Decay
from miras.rule import Rule

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_states_between_those_that_are_kept_are_computed_again(every, monkeypatch):
    monkeypatch.setattr(native, "_every", lambda *_: every)
    tokens, weights, slow = problem(MOMENTARY, 24)
    state = MOMENTARY.init(weights, slow, batch=2)
    assert_engine_is_the_loop("native", MOMENTARY, tokens, state, {**tokens.named(), **weights, **slow})


@pytest.mark.parametrize("chunk", [2, 7, 20])
@pytest.mark.parametrize("memory", [SMALL, MLP(expansion=3)], ids=["16", "48"])
def test_chunks_and_memories_that_fill_no_tile(chunk, memory):
    rule = Rule(memory, Huber(), KL(to="initial"), GD, chunk=chunk)
    tokens, weights, slow = problem(rule, 2 * chunk + 1, batch=1)
    state = rule.init(weights, slow)
    assert_engine_is_the_loop("native", rule, tokens, state, {**tokens.named(), **weights, **slow})


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("channels", [False, True], ids=["heads", "channels"])
@pytest.mark.parametrize(
    "retention",
    [NoRetention(), Decay(), Decay(to="initial"), KL(to="initial"), Lq(to="initial"), Lq(link="mirror")],
    ids=str,
)
def test_a_chunk_of_one_token_reads_with_the_link_itself(retention, channels, every, monkeypatch):
    monkeypatch.setattr(native, "_every", lambda *_: every)
    rule = Rule(SMALL, Huber(), retention, GD, chunk=1)
    tokens, weights, slow = problem(rule, 7, channels=channels)
    state = rule.init(weights, slow, batch=2)
    assert_engine_is_the_loop("native", rule, tokens, state, {**tokens.named(), **weights, **slow}, (3,))


@pytest.mark.parametrize(
    "rule", [MOMENTARY, replace(MOMENTARY, retention=Decay(to="initial"), read_at="before")], ids=["after", "before"]
)
def test_momentum_in_chunks_of_one_token(rule):
    rule = replace(rule, chunk=1)
    tokens, weights, slow = problem(rule, 7)
    state = rule.init(weights, slow, batch=2)
    assert_engine_is_the_loop("native", rule, tokens, state, {**tokens.named(), **weights, **slow}, (3,))


@pytest.mark.parametrize("retention", [Decay(to="initial"), KL(to="initial"), Lq(to="initial"), Lq()], ids=str)
@pytest.mark.parametrize("layout", ["left", "right", "pack"])
def test_chunks_of_one_token_with_padding_and_in_a_pack(retention, layout):
    rule = Rule(SMALL, Huber(), retention, GD, chunk=1)
    tokens, weights, slow = problem(rule, 9, batch=1 if layout == "pack" else 2)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    options = {
        "left": {"mask": mask.flip(-1)},
        "right": {"mask": mask},
        "pack": {"cu_seqlens": torch.tensor([0, 3, 9])},
    }
    assert_engine_is_the_loop_on(options[layout], "native", rule, tokens, weights, slow)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("retention", [NoRetention(), Decay(to="initial"), KL(to="initial"), Lq()], ids=str)
@pytest.mark.parametrize("learner", [GD, Momentum()], ids=["descent", "momentum"])
def test_of_first_order_no_cotangents_go_to_the_weights_of_inner_gradients(chunk, retention, learner):
    rule = Rule(SMALL, Huber(), retention, learner, chunk=chunk, first_order=True)
    tokens, weights, slow = problem(rule, 10)
    assert_engine_is_the_loop_from_the_middle("native", rule, tokens, weights, slow, (3,))


def test_several_threads_share_the_sequences_and_heads():
    tokens, weights, slow = problem(YAAD, 8)
    state = YAAD.init(weights, slow, batch=2)
    assert_threads_make_no_difference(YAAD, tokens, state, {**tokens.named(), **weights})


ROUNDED = {
    "home": (replace(YAAD, memory=MLP(expansion=4), chunk=16), False),
    "momentum, chunks that fill no tile": (replace(MOMENTARY, chunk=9), False),
    "channel gates": (replace(YAAD, chunk=20), True),
    "slopes": (Rule(MLP(expansion=3), L2(), KL(to="initial"), GD, chunk=32), False),
    "few rows": (YAAD, False),
}


@pytest.mark.parametrize("rule, channels", ROUNDED.values(), ids=ROUNDED.keys())
def test_under_autocast_it_rounds_as_the_plain_engine(rule, channels):
    """Where the machine has no instructions for bfloat16 nothing is rounded, which is less."""
    sizes = {"heads": 1, "d_k": 48}
    tokens = draw_tokens(rule, time=70, channels=channels, **sizes)
    assert_rounds_like("chunk", "native", "cpu", rule, tokens, draw_memory(rule, **sizes))


def test_it_rounds_where_the_machine_multiplies_bfloat16():
    rule = replace(YAAD, chunk=16)
    tokens, *memory = problem(rule, 16)
    weights, slow = ({n: x.float() for n, x in part.items()} for part in memory)
    tokens = tokens.map(torch.Tensor.float)
    expected, _ = call(rule, tokens, rule.init(weights, slow, batch=2), engine="native")
    with torch.autocast("cpu", torch.bfloat16):
        y, after = call(rule, tokens, rule.init(weights, slow, batch=2), engine="native")
    words = [build.compiler(), *build.FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert torch.equal(y, expected) == ("__AVX512BF16__" not in macros)
    assert after.dual["w1"].dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_wanted():
    found = arguments(torch.no_grad())
    *_, every = found
    assert every == 0 and not any(x.numel() for x in scan(*found)[5:])


def test_nan_in_one_sequence_stays_there():
    tokens, weights, slow = problem(YAAD, 8)
    with torch.no_grad():
        tokens.k[1, 3] = torch.nan
        y, state = call(YAAD, tokens, YAAD.init(weights, slow, batch=2), engine="native")
    assert y[0].isfinite().all() and y[1, 4:].isnan().all()
    assert state.dual["w1"][0].isfinite().all() and state.dual["w1"][1].isnan().any()


def test_a_layer_is_one_graph_for_the_compiler():
    layer, x = miras.MirasLayer(32, 2, variants.memora(chunk=4)), torch.randn(1, 8, 32)
    expected, _ = layer(x)
    y, _ = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4])
def test_operators_keep_their_contract(chunk):
    """Schemas, fake tensors, autograd registration, under torch.compile: `torch.library.opcheck`."""
    torch.library.opcheck(scan, arguments(rule=replace(YAAD, chunk=chunk)))


def arguments(context=None, rule=YAAD):
    """Of `scan`: 8 tokens, two chunks of Yaad, two sequences, one head of 16."""
    tokens, weights, slow = problem(rule, 8)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "scan", lambda *given: found.append(given) or scan(*given))
        with context or torch.enable_grad():
            call(rule, tokens, rule.init(weights, slow, batch=2), engine="native")
    return found[0]


@pytest.mark.parametrize(("chunk", "products", "pairs"), [(4, 9, 5), (1, 7, 0)])
def test_flops_are_those_of_the_formula(chunk, products, pairs):
    """Of P = 2 e d^2 entries a head 9 P a token forward (`miras/bench/flops.py`), and what it sees of its chunk."""
    given = arguments(torch.no_grad(), replace(YAAD, chunk=chunk))
    with FlopCounterMode(display=False) as counter:
        scan(*given)
    assert counter.get_total_flops() == 2 * 8 * (products * 2 * 16 * 16 + 2 * 2 * pairs * 16)


def test_of_first_order_three_products_are_left_out_of_the_way_back():
    counted = []
    for rule in (YAAD, replace(YAAD, first_order=True)):
        tokens, weights, slow = problem(rule, 8)
        y, _ = call(rule, tokens, rule.init(weights, slow, batch=2), engine="native")
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counted.append(counter.get_flop_counts()["Global"][torch.ops.miras.scan_backward])
    assert counted[0] - counted[1] == 2 * 8 * 3 * 2 * 16 * 16


# -- which rules it runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, tokens, reason",
    [
        (Rule(SMALL, L2(), KL(), GD, chunk=1), None, "chosen"),
        (Rule(SMALL, L2(), KL(), GD, chunk=1, read_at="before"), None, "of one token, read after it"),
        (SWIGLU, None, "an MLP of 2 layers without fast biases, not SwiGLU"),
        (Rule(SMALL, L2(), Lq(to="initial"), GD, chunk=4, link_at="token"), None, "link_at='chunk'"),
        (Rule(SMALL, L2(), Bregman(), GD, chunk=4), None, "do not know the link"),
        (YAAD, (torch.zeros(1, 4, 1, 24),) * 2, "a multiple of 16 up to 256, not of 24 and 24"),
        (Rule(SMALL, L2(), Decay(), GD, chunk=1), (torch.zeros(1, 4, 1, 16),) * 2, "chosen"),
        (variants.yaad(), None, "chosen"),
    ],
    ids=["one token", "one token, read before", "gated", "token", "logistic", "heads", "linear decay", "yaad"],
)
def test_it_says_why_not(rule, tokens, reason):
    assert reason in miras.explain(rule, tokens=tokens)["native"]


def test_momentum_per_channel_is_left_to_others():
    tokens, *_ = problem(MOMENTARY, 8, channels=True)
    assert "gradient descent only" in miras.explain(MOMENTARY, tokens.gates, (tokens.k, tokens.v))["native"]


@pytest.mark.parametrize("retention", [Decay(to="initial"), KL(to="initial")], ids=["L2", "KL"])
def test_gates_per_channel_from_the_middle_of_a_chunk(retention):
    rule = Rule(SMALL, Huber(), retention, GD, chunk=4)
    tokens, weights, slow = problem(rule, 10, channels=True)
    assert_engine_is_the_loop_from_the_middle("native", rule, tokens, weights, slow, (3, 7))


@pytest.fixture
def nothing_compiled():
    for known in (build.library, build._missing):
        known.cache_clear()
    yield
    for known in (build.library, build._missing):
        known.cache_clear()


def test_without_a_compiler_another_engine_runs(nothing_compiled, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: None)
    said = miras.explain(YAAD)
    assert "CXX" in said["native"] and said["chunk"] == "chosen"


def test_what_a_failing_compiler_says_is_the_reason(nothing_compiled, monkeypatch, tmp_path):
    wrong = tmp_path / "c++"
    wrong.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrong))
    said = miras.explain(YAAD, tokens=(torch.zeros(1, 4, 1, 16),) * 2)
    assert "no such option" in said["native"] and said["chunk"] == "chosen"
