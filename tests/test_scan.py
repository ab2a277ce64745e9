"""The derivative that `Scan` writes out is that of autograd, for every rule that it runs."""

import pytest
import torch
from cases import RULES, assert_same, call, draw_memory, draw_tokens, own

import miras
from miras import variants
from miras.engines import chunk

WHOLE = [c for c in RULES if c.rule.chunk > 1 and miras.plan(c.rule).name == "chunk"]
PRESETS = ("moneta", "yaad", "memora", "titans", "mneme", "ttt_linear", "ttt_mlp")


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(chunk, "LARGE", 0)


def outcome(rule, tokens, weights, slow, cotangents):
    """Outputs and state, and the outer gradients of one weighted sum of them all."""
    y, state = call(rule, tokens, rule.init(weights, slow, batch=2))
    found = {"y": y, **{n: x for n, x in own(state).items() if x.is_floating_point()}}
    for name, x in found.items():
        cotangents.setdefault(name, torch.randn_like(x))
    wrt = {**tokens.named(), **weights, **slow}
    total = sum((x * cotangents[n]).sum() for n, x in found.items())
    grads = torch.autograd.grad(total, list(wrt.values()), materialize_grads=True, allow_unused=True)
    return found | {f"gradient of {n}": g for n, g in zip(wrt, grads, strict=True)}


def assert_scan_is_autograd(rule, monkeypatch, channels=False):
    ran = []
    applied = chunk.Scan.apply
    monkeypatch.setattr(chunk.Scan, "apply", lambda *given: ran.append(True) or applied(*given))
    tokens = draw_tokens(rule, time=6 * rule.chunk, channels=channels).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: x.requires_grad_() for n, x in part.items()} for part in draw_memory(rule))
    cotangents: dict = {}
    fast = outcome(rule, tokens, weights, slow, cotangents)
    used = bool(ran)
    monkeypatch.setattr(chunk, "_trains", lambda *given: False)
    plain = outcome(rule, tokens, weights, slow, cotangents)
    for name, expected in plain.items():
        assert_same(fast[name], expected, 1e-10, name)
    return used


@pytest.mark.parametrize("together", [1, 8, 256])
@pytest.mark.parametrize("name", PRESETS)
def test_scan_is_autograd_for_the_presets(name, together, monkeypatch):
    monkeypatch.setattr(chunk, "SEGMENT", together)  # reads of one, of two and of all chunks at once
    assert assert_scan_is_autograd(variants.variant(name, 4), monkeypatch)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_scan_is_autograd_for_every_rule(case, monkeypatch):
    used = assert_scan_is_autograd(case.rule, monkeypatch, case.channels)
    per_head = not case.channels or not any(g.channel for g in case.rule.retention.gates + case.rule.algorithm.gates)
    assert used or not per_head or case.rule.gradient_at == "decayed"


def test_it_is_used_where_autograd_would_keep_much(monkeypatch):
    rule, used = variants.yaad(16), []
    applied = chunk.Scan.apply
    monkeypatch.setattr(chunk.Scan, "apply", lambda *given: used.append(True) or applied(*given))
    for large, expected in ((1 << 30, 0), (1 << 16, 1)):
        monkeypatch.setattr(chunk, "LARGE", large)
        tokens = draw_tokens(rule, batch=1, time=64, heads=1).map(torch.Tensor.requires_grad_)
        call(rule, tokens, rule.init(*draw_memory(rule, heads=1)))
        assert len(used) == expected


def test_without_outer_gradients_nothing_is_kept(monkeypatch):
    rule = variants.yaad(4)
    monkeypatch.setattr(chunk.Scan, "apply", lambda *given: pytest.fail("Scan is for training"))
    call(rule, draw_tokens(rule, time=12), rule.init(*draw_memory(rule), batch=2))


def test_scan_under_autocast_has_gradients_near_those_of_float32():
    rule = variants.yaad(4)
    tokens = draw_tokens(rule, time=32, d_k=16).map(lambda x: x.float().requires_grad_())
    weights, slow = ({n: w.float().requires_grad_() for n, w in part.items()} for part in draw_memory(rule, d_k=16))
    wrt = [*tokens.named().values(), *weights.values(), *slow.values()]
    grads = []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y, _ = call(rule, tokens, rule.init(weights, slow, batch=2))
        grads.append(torch.autograd.grad(y.square().sum(), wrt, allow_unused=True, materialize_grads=True))
    for exact, rounded in zip(*grads, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() <= 0.05 * exact.norm()
