"""The engine `fla`: its arguments are right where fla's own naive references, in place of its kernels, give what the
token loop gives. The kernels themselves run in Triton's interpreter (slow) and on a GPU.
"""

import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import as_leaves, assert_same, assert_same_states, call, draw_memory, draw_tokens, steps
from contract import EXACT, result
from kernel_cases import assert_rounds_like
from oracles import fla_naive

import miras
from miras import Rule, algorithm, bias, memory, retention
from miras.engines import fla
from miras.errors import UsageError
from miras.state import tensors
from miras.variants import variant


def matrix(loss, gate, learner=None, **frame):
    return Rule(memory.Linear(), loss, gate, learner or algorithm.GradientDescent(), **frame)


def homing(loss, **frame):
    return replace(matrix(loss, retention.L2(to="initial"), **frame), memory=memory.Linear(start="learned"))


DECAY, NONE = retention.L2(), retention.NoRetention()
# Rule, gates per channel, the kernel.
CASES = {
    "linear_attention": (variant("linear_attention"), False, "chunk_linear_attn"),
    "retnet": (variant("retnet"), False, "chunk_simple_gla"),
    "lightning": (variant("lightning"), False, "chunk_simple_gla"),
    "mamba2": (variant("mamba2"), False, "chunk_simple_gla"),
    "gla": (variant("gla"), True, "chunk_gla"),
    "hgrn2": (variant("hgrn2"), True, "chunk_gla"),
    "deltanet": (variant("deltanet"), False, "chunk_delta_rule"),
    "longhorn": (variant("longhorn"), False, "chunk_delta_rule"),
    "gated_deltanet": (variant("gated_deltanet"), False, "chunk_gated_delta_rule"),
    "delta_product": (variant("delta_product"), False, "chunk_gated_delta_rule"),
    "kda": (variant("kda"), {"log_alpha"}, "chunk_kda"),
    "comba": (variant("comba"), False, "chunk_comba"),
    "rwkv7": (variant("rwkv7"), {"log_alpha"}, "chunk_dplr_delta_rule"),
    "mesa": (variant("mesa"), False, "chunk_mesa_net"),
    # Rules without a name, which differ from those above in one thing.
    "dot, eta per channel": (matrix(bias.Dot(), NONE), True, "chunk_linear_attn"),
    "delta rule, eta per channel": (matrix(bias.L2(), NONE), True, "chunk_dplr_delta_rule"),
    "gated deltanet at the memory before": (matrix(bias.L2(), DECAY), False, "chunk_comba"),
    "kda at the memory before": (matrix(bias.L2(), DECAY), True, "chunk_dplr_delta_rule"),
    "kda, eta per channel": (matrix(bias.L2(), DECAY, gradient_at="decayed"), True, "chunk_dplr_delta_rule"),
    "dot, to a home": (homing(bias.Dot()), False, "chunk_simple_gla"),
    "homing_deltanet": (variant("homing_deltanet"), False, "chunk_gated_delta_rule"),
    "comba to a home": (homing(bias.Erase(along="key")), False, "chunk_comba"),
    "comba, nothing decays": (matrix(bias.Erase(along="key"), NONE), False, "chunk_comba"),
    "comba at the decayed memory": (
        matrix(bias.Erase(along="key"), DECAY, gradient_at="decayed"),
        False,
        "chunk_dplr_delta_rule",
    ),
    "rwkv7 per head": (matrix(bias.Erase(), DECAY), False, "chunk_dplr_delta_rule"),
    "longhorn with decay": (matrix(bias.L2(), DECAY, algorithm.Implicit()), False, "chunk_comba"),
    "mesa, nothing decays": (matrix(bias.L2(), NONE, algorithm.LeastSquares()), False, "chunk_mesa_net"),
}


# -- fla's references with the signatures of its kernels --------------------------------------------------------------


def unscaled(q):
    """For references that cannot be told the scale."""
    return q * q.shape[-1] ** 0.5


def head_first(*x):
    return [t.transpose(1, 2) for t in x]


def gla(q, g, scale, **x):
    return fla_naive._call("gla", "naive_recurrent_gla", q=unscaled(q), gk=g, **x)


def delta_rule(q, k, v, beta, scale, **x):
    y, s = fla_naive._call("delta_rule", "delta_rule_recurrence", *head_first(unscaled(q), k, v, beta[..., None]), **x)
    return y.transpose(1, 2), s


def dplr(q, k, v, a, b, gk, scale, **x):
    parts = head_first(unscaled(q), k, v, a, b, gk)
    y, s = fla_naive._call("generalized_delta_rule/dplr", "dplr_recurrence", *parts, **x)
    return y.transpose(1, 2), s


def mesa(output_final_state, **x):
    return fla_naive._call("mesa_net", "naive_mesa_net_exact", **x)


def naive(op, function):
    """A reference with its kernel's signature."""
    return partial(fla_naive._call, op, function)


NAIVE = {
    "linear_attn.chunk_linear_attn": naive("linear_attn", "naive_recurrent_linear_attn"),
    "simple_gla.chunk_simple_gla": naive("simple_gla", "naive_recurrent_simple_gla"),
    "gla.chunk_gla": gla,
    "delta_rule.chunk_delta_rule": delta_rule,
    "gated_delta_rule.chunk_gated_delta_rule": naive("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
    "kda.chunk_kda": naive("kda", "naive_recurrent_kda"),
    "comba.chunk_comba": naive("comba", "naive_chunk_comba"),
    "generalized_delta_rule.chunk_dplr_delta_rule": dplr,
    "mesa_net.chunk_mesa_net": mesa,
}


@pytest.fixture
def called(monkeypatch):
    """The engine on a CPU, by the references; the kernels it asks for are noted."""
    seen = []

    def load(name):
        def kernel(cu_seqlens, **x):
            seen.append(name.split(".")[1])
            # The references have no packs: sequence by sequence.
            if cu_seqlens is None:
                return NAIVE[name](**x)
            start = {n: t for n, t in x.items() if n.endswith(("state", "init")) and isinstance(t, torch.Tensor)}
            tokens = {n: t for n, t in x.items() if isinstance(t, torch.Tensor) and n not in start and n != "lamb"}
            rest = {n: t for n, t in x.items() if n not in start and n not in tokens}
            ends = cu_seqlens.tolist()
            parts = [
                NAIVE[name](
                    **{k: t[:, a:b] for k, t in tokens.items()}, **{k: t[n : n + 1] for k, t in start.items()}, **rest
                )
                for n, (a, b) in enumerate(itertools.pairwise(ends))
            ]
            return [torch.cat(found, int(i == 0)) for i, found in enumerate(zip(*parts, strict=True))]

        return kernel

    monkeypatch.setattr(fla, "load", load)
    monkeypatch.setattr(fla, "_unavailable", lambda tokens: None)
    return seen


def draw_with(rule, channels, **sizes):
    """Tokens with all gates per channel, or only those that are named."""
    tokens = draw_tokens(rule, channels=bool(channels), **sizes)
    if isinstance(channels, bool):
        return tokens
    wide = channels | {g.name for g in rule.gates if g.vector}
    return tokens._replace(gates={n: g if n in wide else g[..., :1] for n, g in tokens.gates.items()})


def draw(rule, channels, time=9):
    """Tokens, d_v other than d_k where a kernel permits, and a state that some tokens have been learned into."""
    d_v = 4 if isinstance(rule.algorithm, algorithm.LeastSquares) else 5
    tokens = draw_with(rule, channels, time=time, d_v=d_v)
    weights, slow = draw_memory(rule, d_v=d_v)
    with torch.no_grad():
        state = call(rule, tokens, rule.init(weights, slow, batch=2), engine="recurrence")[1]
    return tokens, state


@pytest.mark.parametrize("name", CASES)
def test_by_the_references_it_is_the_token_loop(name, called):
    rule, channels, kernel = CASES[name]
    tokens, state = draw(rule, channels)
    tokens, state = tokens.map(torch.Tensor.requires_grad_), as_leaves(state)
    wrt = tokens.named() | {n: x for n, x in tensors(state).items() if x.is_floating_point()}
    cotangents = []
    loop = result(rule, tokens, state, wrt, cotangents, "recurrence", (4,))
    found = result(rule, tokens, state, wrt, cotangents, "fla", (4,))
    assert called == [kernel] * 2
    assert_same(found.y, loop.y, EXACT, "y")
    assert_same_states(found.states[-1], loop.states[-1], EXACT)
    for n, grad in loop.grads.items():
        assert_same(found.grads[n], grad, EXACT, f"gradient of {n}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["mask", "cu_seqlens"])
def test_padding_and_packing(name, how, called):
    rule, channels, _ = CASES[name]
    tokens, state = draw(rule, channels)
    if how == "mask":
        # Both sides, and nothing of what stands there may be seen.
        mask = torch.tensor([[0, 0, *[1] * 6, 0], [1] * 9]).bool()
        options = {"mask": mask}
        exists = {n: mask.repeat_interleave(n, 1)[..., None, None] for n in (1, steps(rule))}
        tokens = tokens.map(lambda x: torch.where(exists[tokens.per(x)], x, torch.nan))
    else:
        options = {"cu_seqlens": torch.tensor([0, 2, 9])}
        tokens = tokens.part(row=0)
    loop, found = (call(rule, tokens, state, engine=engine, **options) for engine in ("recurrence", "fla"))
    assert called
    assert_same(found[0], loop[0], EXACT, "y")
    assert_same_states(found[1], loop[1], EXACT)


def test_the_kernels_have_these_arguments():
    pytest.importorskip("triton")
    for kernel in fla.KERNELS:
        known = inspect.signature(fla.load(kernel.name)).parameters
        x = {n: torch.ones(1, 2, 1, 4) for n in ("q", "k", "v", "eta", "log_alpha", "erase", "along", "ridge")}
        given = kernel.arguments(variant("gated_deltanet"), x)
        assert {*given, *dict(kernel.states).values(), "output_final_state", "cu_seqlens"} <= known.keys(), kernel.name


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (variant("yaad"), "linear memories"),
        (variant("titans", 1), "linear memories"),
        (matrix(bias.L2(), DECAY, chunk=4), "at chunk 4"),
        (matrix(bias.L2(), DECAY, algorithm.Momentum()), "Momentum"),
        (matrix(bias.Huber(), DECAY), "Huber"),
        (matrix(bias.L2(clip=True), DECAY), "clip=True"),
        (matrix(bias.Erase(), retention.L2(to="initial")), "Erase(along='key')"),
        (variant("dfw"), "TwoSided"),
        (matrix(bias.L2(), DECAY, read_at="before"), "read after"),
        (matrix(bias.Dot(), DECAY, window=2), "window=2"),
        (variant("gated_deltanet"), "GPU"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_refuses_and_why(rule, said):
    assert said in miras.explain(rule)["fla"]


def test_gates_per_value_channel_are_refused():
    rule = replace(variant("gla"), memory=memory.Linear(gated="values"))
    gates = draw_tokens(rule, channels=True).gates
    assert "per key channel" in miras.explain(rule, gates)["fla"]


def on_a_gpu(size):
    """As much of keys and values on a GPU as there is to see without one."""
    return (SimpleNamespace(is_cuda=True, device=SimpleNamespace(type="cuda"), shape=(1, 1, 1, size)),) * 2


def test_on_a_gpu_it_stands_first_under_autocast(monkeypatch):
    rule = variant("gated_deltanet")
    assert "autocast" in miras.explain(rule, tokens=on_a_gpu(64))["fla"]
    assert miras.plan(rule, tokens=on_a_gpu(64)).name == "exact"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert miras.plan(rule, tokens=on_a_gpu(64)).name == "fla"
    assert "d_k up to 256" in miras.explain(rule, tokens=on_a_gpu(512))["fla"]
    assert miras.plan(rule, tokens=on_a_gpu(512)).name == "exact"
    monkeypatch.setattr(fla, "INSTALLED", False)
    assert "pip install fla-core" in miras.explain(rule, tokens=on_a_gpu(64))["fla"]


def test_sizes_that_a_kernel_does_not_have(called):
    rule = variant("mesa")
    tokens = draw_tokens(rule, d_v=6)
    weights, slow = draw_memory(rule, d_v=6)
    with pytest.raises(UsageError, match=r"d_v = d_k, not 4 and 6. Write engine='auto'"):
        call(rule, tokens, rule.init(weights, slow, batch=2), engine="fla")
    assert not called


@pytest.mark.slow
def test_in_the_interpreter_the_kernels_are_the_token_loop():
    """Outputs, memory and gradients, with operands in float16: half a thousandth of rounding."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here.parent, here)))
    words = [sys.executable, str(here / "interpreted_fla.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= CASES.keys()
    # Mesa's kernel solves by conjugate gradients.
    limit = {name: 1e-2 if name.startswith("mesa") else 2e-3 for name in found}
    assert not {name: errors for name, errors in found.items() if not all(e < limit[name] for e in errors.values())}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    """Errors in bfloat16 at most twice those of the plain engine under the same autocast, outputs and gradients."""
    rule, channels, _ = CASES[name]
    tokens = draw_with(rule, channels, time=200, d_k=64)
    # Mesa's kernel solves by conjugate gradients in float16.
    slack = 2e-2 if isinstance(rule.algorithm, algorithm.LeastSquares) else 1e-3
    assert_rounds_like("exact", "fla", "cuda", rule, tokens, draw_memory(rule, d_k=64), slack)
