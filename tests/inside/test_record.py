"""What is recorded equals the definition, written out here."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import miras.layer
from miras.bias import Huber
from miras.hf import MirasConfig, MirasForCausalLM
from miras.inside import trace
from miras.inside.record import _Watch
from miras.layer import layers_of
from miras.layout import layout
from miras.recurrence import recurrence
from miras.rule import token
from miras.variants import deltanet, variant

T = 23


def make(*mixers, **options):
    shape = {"hidden_size": 16, "num_hidden_layers": len(mixers), "num_attention_heads": 2}
    return MirasForCausalLM(MirasConfig(mixer=list(mixers), **shape, **options)).eval()


def read(model, monkeypatch):
    """Tokens and what every layer with a rule hands to `miras.run`."""
    calls = []

    def run(rule, q, k, v, gates=None, state=None, **rest):
        calls.append((rule, state, q, k, v, gates))
        return miras.engines.run(rule, q, k, v, gates, state, **rest)

    tokens = torch.randint(0, 257, (T,))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(miras.layer, "run", run)
        model(tokens[None])
    return tokens, calls


def surprises(rule, state, q, k, v, gates):
    """|grad| of every token by `Rule.surprise` in the token loop, and the weights after each, W_0 first."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    gates = {n: g.transpose(1, 2) for n, g in gates.items()}
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    norms, weights = [], [rule.link(state.dual, state.home, leaves)]
    for t in range(T):
        one, now = slice(t, t + 1), token(gates, t)
        origin = state.origin
        if rule.gradient_at == "decayed":
            origin = {n: now["log_alpha"].exp() * a for n, a in origin.items()}
        at = rule.link(origin, state.home, leaves)
        grad = rule.surprise(at, state.slow, k[..., one, :], v[..., one, :], now, leaves)
        norms.append(torch.cat([g.dense().flatten(2) for g in grad.values()], -1).norm(dim=-1)[0])
        _, state = recurrence(rule, state, q[..., one, :], k[..., one, :], v[..., one, :], now)
        weights.append(rule.link(state.dual, state.home, leaves))
    return torch.stack(norms), weights


def size(weights):
    return torch.cat([w.flatten(2) for w in weights.values()], -1).norm(dim=-1)[0]


@pytest.mark.parametrize("piece", [7, 256], ids=["in pieces that cut chunks", "at once"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("yaad", {"chunk": 1}), ("yaad", {"chunk": 4}), ("memora", {"chunk": 5}), ("gated_deltanet", {}), ("titans", {})],
)
def test_it_is_the_surprise_of_the_token_loop(name, options, piece, monkeypatch):
    model = make(variant(name, **options), variant(name, **options))
    tokens, calls = read(model, monkeypatch)
    found = trace(model, tokens, piece)
    for layer, call in zip(found.layers, calls, strict=True):
        norms, weights = surprises(*call)
        torch.testing.assert_close(layer["surprise"], norms, rtol=1e-4, atol=1e-6)
        change = [size({n: b[n] - a[n] for n in a}) / size(b) for a, b in pairwise(weights)]
        torch.testing.assert_close(layer["change"], torch.stack(change), rtol=1e-3, atol=1e-6)
        away = [size({n: w[n] - weights[0][n] for n in w}) for w in weights[1:]]
        start = size(weights[0])
        away = [x / start if start.all() else x for x in away]
        torch.testing.assert_close(layer["distance"], torch.stack(away), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gates", ["head", "channel"])
def test_gates_are_those_of_the_layer(gates, monkeypatch):
    model = make(variant("yaad", chunk=4), variant("titans"), gates=gates)
    tokens, calls = read(model, monkeypatch)
    for layer, call in zip(trace(model, tokens, 7).layers, calls, strict=True):
        assert {"eta", "log_alpha"} <= set(call[5]) <= set(layer)
        for name, gate in call[5].items():
            torch.testing.assert_close(layer[name], gate[0].mean(-1))


def test_the_model_reads_as_ever_and_the_loss_is_the_cross_entropy():
    model = make(variant("yaad", chunk=4), variant("transformer"), variant("gated_deltanet"))
    tokens = torch.randint(0, 257, (T,))
    found = trace(model, tokens, 7)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="none") / torch.tensor(2.0).log()
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)
    assert found.layers[1] == {} and "extreme" in found.layers[0] and "extreme" not in found.layers[2]
    assert model.model.backbone.engine == "auto"


@pytest.mark.parametrize(
    "name", ["moneta", "delta_product", "atlas", "lact", "ttt_mlp", "mesa", "rwkv7", "linear_attention"]
)
def test_every_kind_of_rule_can_be_watched(name):
    model = make(variant(name))
    assert layers_of(model)[0].rule == variant(name)
    tokens = torch.randint(0, 257, (T,))
    (whole,), (cut,) = (trace(model, tokens, piece).layers for piece in (T, 5))
    assert {"surprise", "change", "distance"} <= set(whole)
    for quantity, values in whole.items():
        assert values.shape == (T, 2) and values.isfinite().all(), quantity
        torch.testing.assert_close(values, cut[quantity], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "share"), [("coordinate", 0.5), ("norm", 1.0), ("mixture", 1.0)])
def test_the_extreme_share_of_a_case_made_by_hand(form, share):
    """An empty matrix predicts 0, so the errors are the values: of the first token two of four are beyond 1."""
    rule = deltanet()
    rule = type(rule)(rule.memory, Huber(form=form), rule.retention, rule.algorithm)
    values = torch.tensor([[0.5, 2.0, -3.0, 0.1], [0.1, 0.2, 0.1, 0.1]])[None, :, None]
    keys = torch.eye(4)[None, :2, None]
    gates = {"eta": torch.ones(1, 2, 1, 1), "delta": torch.ones(1, 2, 1, 1)}
    watch = _Watch(1)
    watch(rule, rule.init({"w": torch.zeros(1, 4, 4)}), keys, keys, values, gates, layout(1, 2))
    assert torch.cat(watch.seen[0]["extreme"], -1)[0, 0].tolist() == [share, 0.0]


def test_a_clipped_gradient_counts_as_extreme():
    model = make(variant("moneta"))
    values = trace(model, torch.randint(0, 257, (T,))).layers[0]["extreme"]
    assert set(values.unique().tolist()) <= {0.0, 1.0}
