"""The inner learning of the presets is not chaotic: what a token said is forgotten, not amplified (float64)."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Tokens, call

import miras
from miras import algorithm, bias, memory, retention, variants

TIME, D, CHUNK = 8192, 16, 16
CHANGE, AMPLIFIED = 1e-9, 1e-8
PRESETS = {name: getattr(variants, name) for name in ("moneta", "yaad", "memora", "mneme")}


def keys(kind, heads):
    """Unit vectors: all different, or sixteen that come back in random order."""
    k = F.normalize(torch.randn(TIME, heads, D, dtype=torch.float64), dim=-1)
    return k if kind == "random" else k[torch.randint(16, (TIME,))]


def sensitivity(rule, kind, log_alpha):
    """Largest relative change of an output |y'_t - y_t| / |y_t|, t > 0, when token 0's value is changed by 1e-9.

    One time constant per head; other gates at the value that a fresh layer gives them. Both runs are rows of one batch.
    """
    heads = len(log_alpha)
    q, k = keys("random", heads), keys(kind, heads)
    v = rule.inputs.value_size * torch.randn(TIME, heads, D, dtype=torch.float64)
    changed = v.clone()
    changed[0] += CHANGE * F.normalize(torch.randn(heads, D, dtype=torch.float64), dim=-1)
    gates = {g.name: torch.full((2, TIME, heads, 1), g.init, dtype=torch.float64) for g in rule.gates}
    gates["log_alpha"] = torch.as_tensor(log_alpha, dtype=torch.float64)[:, None].expand(2, TIME, -1, -1).contiguous()
    weights = {n: w.double() for n, w in rule.initial(heads, D, D).items()}
    q, k = (torch.stack([x, x]) for x in (q, k))
    with torch.no_grad():
        y, _ = call(rule, Tokens(q, k, torch.stack([v, changed]), gates), rule.init(weights, batch=2))
    assert y.isfinite().all()
    return ((y[1] - y[0]).norm(dim=-1) / y[0].norm(dim=-1))[1:].max().item()


def time_constants(heads):
    """Decay over 8 to 8192 tokens, spread over heads on a log scale."""
    return -1 / torch.logspace(3, 13, heads, base=2.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["random", "recurring"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_small_change_of_the_first_token_stays_small(name, kind):
    assert sensitivity(PRESETS[name](chunk=CHUNK), kind, time_constants(2)) <= AMPLIFIED


GATES = (
    *(retention.Bregman(potential, to="initial") for potential in ("logistic", "hypentropy", "entropy")),
    *(retention.FDivergence(f, to="initial") for f in ("chi2", "reverse_kl", "hellinger")),
    retention.ElasticNet(to="initial"),
    retention.Sphere(to="initial"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "recurring"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate_forgets_at_the_eta_that_it_allows(gate, kind):
    rule = miras.Rule(memory.MLP(), bias.L2(), gate, algorithm.GradientDescent("input"), CHUNK)
    assert sensitivity(rule, kind, time_constants(2)) <= AMPLIFIED


def test_decay_to_zero_would_amplify_it():
    rule = replace(variants.yaad(chunk=CHUNK), retention=retention.L2())
    assert sensitivity(rule, "random", [math.log(0.98)]) > AMPLIFIED
