"""Identities between rules, and the paper's equations written out by hand."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, assert_same_states, call, draw_memory, draw_tokens

from miras import algorithm, bias, memory, retention, variants
from miras.engines import unroll
from miras.errors import UsageError
from miras.gates import hole
from miras.mixer import mixer_from_config
from miras.retention.base import mass
from miras.rule import Rule
from miras.weights import COLUMNS, ROWS, Leaf

DEEP = memory.MLP(expansion=2)
MATRIX = memory.Linear(start="learned")
YAAD = Rule(DEEP, bias.Huber(), retention.L2(), algorithm.GradientDescent(rate="input"), chunk=4)


def outputs(rules, change=lambda gates: gates, time=15):
    """What each of some rules says to the same tokens from the same memory; a rule takes the gates that it has."""
    wide = replace(rules[0], bias=bias.Huber(), algorithm=algorithm.Momentum(rate="input"))
    wide = replace(wide, retention=retention.L2(), gradient_at="previous")
    tokens = draw_tokens(wide, time=time)
    gates = change(tokens.gates)
    weights, slow = draw_memory(replace(rules[0], retention=retention.L2(), gradient_at="previous"))
    found = []
    for rule in rules:
        mine = tokens._replace(gates={g.name: gates[g.name] for g in rule.gates})
        found.append(
            call(rule, mine, rule.init(dict(zip(rule.leaves(4, 4), weights.values(), strict=True)), slow, batch=2))[0]
        )
    return found


def given(**values):
    """Gates with some of them set to a constant."""
    return lambda gates: {n: torch.full_like(g, values[n]) if n in values else g for n, g in gates.items()}


def equal(rules, change=lambda gates: gates, tolerance=1e-12):
    first, *rest = outputs(rules, change)
    for other in rest:
        assert_same(other, first, tolerance)


def differ(rules, change=lambda gates: gates, least=1e-3):
    first, second = outputs(rules, change)
    assert (first - second).norm() > least * first.norm()


# -- one axis becomes another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mem", [DEEP, MATRIX], ids=str)
@pytest.mark.parametrize("to", ["zero", "initial"])
@pytest.mark.parametrize("link_at", ["token", "chunk"])
@pytest.mark.parametrize("link", ["paper", "mirror"])
def test_lq_with_q_2_is_l2(link, link_at, to, mem):
    rule = replace(YAAD, memory=mem, retention=retention.L2(to=to))
    equal([rule, replace(rule, retention=retention.Lq(q=2.0, link=link, to=to), link_at=link_at)])


@pytest.mark.parametrize("form", ["coordinate", "norm", "mixture"])
def test_huber_without_threshold_is_l2(form):
    rule = replace(YAAD, bias=bias.L2())
    equal([rule, replace(rule, bias=bias.Huber(form=form))], given(delta=1e9))


def test_huber_with_a_small_threshold_is_l1_times_the_threshold():
    v = torch.randn(1, 1, 50, 4).double()
    y, gates = torch.zeros_like(v), {"delta": torch.full((1, 1, 50, 1), 1e-4, dtype=torch.float64)}
    for form in ("coordinate", "mixture"):
        far = v.abs() > 0.1
        got = bias.Huber(form=form).grad(y, v, gates) / 1e-4
        torch.testing.assert_close(got[far], bias.L1().grad(y, v, {})[far], rtol=0, atol=1e-4)
    unit = bias.Huber(form="norm").grad(y, v, gates) / 1e-4
    assert_same(unit, -v / v.norm(dim=-1, keepdim=True), 1e-12)


def test_lp_with_p_2_is_twice_l2():
    v, y = torch.randn(2, 1, 1, 50, 4).double()
    assert_same(bias.Lp(p=2.0).grad(y, v, {}), 2 * bias.L2().grad(y, v, {}), 1e-14)
    rule = replace(YAAD, bias=bias.L2())
    tokens = draw_tokens(rule)
    state = rule.init(*draw_memory(rule), batch=2)
    half = tokens._replace(gates=tokens.gates | {"eta": tokens.gates["eta"] / 2})
    assert_same(call(replace(rule, bias=bias.Lp(p=2.0)), half, state)[0], call(rule, tokens, state)[0], 1e-12)


def test_the_robust_loss_is_that_of_the_worst_value_within_the_shift():
    """Far from r = 0, where the norm is smoothed."""
    y, v = 100 * torch.randn(2, 1, 1, 50, 4).double()
    shift = torch.rand(1, 1, 50, 1).double()
    loss = bias.Robust().loss(y, v, {"shift": shift})
    dv = shift * F.normalize(torch.randn(1000, *v.shape).double(), dim=-1)
    assert (bias.L2().loss(y, v + dv, {}) < loss).all()
    worst = -shift * F.normalize(y - v, dim=-1)
    torch.testing.assert_close(bias.L2().loss(y, v + worst, {}), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(y - v - worst, bias.Robust().grad(y, v, {"shift": shift}), rtol=1e-4, atol=1e-4)


def test_the_robust_loss_without_shift_is_l2():
    rule = replace(YAAD, bias=bias.L2())
    equal([rule, replace(rule, bias=bias.Robust())], lambda g: g | {"shift": torch.zeros_like(g["eta"])})


def half_square(y, v):
    return 0.5 * (y - v).square().sum()


@pytest.mark.parametrize("mem", [DEEP, MATRIX], ids=str)
@pytest.mark.parametrize("engine", ["auto", "recurrence"])
def test_half_the_square_as_a_loss_of_ones_own_is_l2_forwards_and_backwards(engine, mem):
    rules = [replace(YAAD, memory=mem, bias=b) for b in (bias.L2(), bias.Custom(half_square))]
    tokens = draw_tokens(rules[0]).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: w.requires_grad_() for n, w in part.items()} for part in draw_memory(rules[0]))
    wrt = {**tokens.named(), **weights, **slow}
    (y, after, grads), (y_own, after_own, grads_own) = (
        (
            *(out := call(rule, tokens, rule.init(weights, slow, 2), engine=engine)),
            torch.autograd.grad(out[0].square().sum(), list(wrt.values())),
        )
        for rule in rules
    )
    assert_same(y_own, y, 1e-13)
    assert_same_states(after_own, after, 1e-13)
    for name, a, b in zip(wrt, grads_own, grads, strict=True):
        assert_same(a, b, 1e-12, name)


def test_a_loss_of_ones_own_is_known_by_its_name():
    rule = replace(YAAD, bias=bias.Custom(half_square))
    config = json.loads(json.dumps(rule.to_config()))
    assert config["bias"] == {"name": "Custom", "fn": f"{__name__}:half_square", "clip": False}
    again = mixer_from_config(config)
    assert again == rule and again.bias.fn is half_square and again.fingerprint == rule.fingerprint
    assert str(rule.bias) == "Custom(fn=half_square)" and str(bias.Custom()) == "Custom()"
    assert rule.fingerprint != replace(YAAD, bias=bias.Custom()).fingerprint


def test_a_lambda_is_a_loss_for_as_long_as_nothing_is_saved():
    rule = replace(YAAD, bias=bias.Custom(lambda y, v: 0.5 * (y - v).square().sum()))
    equal([replace(rule, bias=bias.L2()), rule])
    with torch.inference_mode():
        equal([replace(rule, bias=bias.L2()), rule])


def test_lp_with_p_1_is_l1():
    v, y = torch.randn(2, 1, 1, 50, 4).double()
    assert_same(bias.Lp(p=1.0).grad(y, v, {}), bias.L1().grad(y, v, {}), 1e-14)


@pytest.mark.parametrize("mem", [DEEP, MATRIX], ids=str)
def test_decay_of_nothing_is_no_retention(mem):
    rules = [
        replace(YAAD, memory=mem, retention=r)
        for r in (retention.NoRetention(), retention.L2(), retention.L2("initial"))
    ]
    equal([*rules, replace(rules[0], retention=retention.NoRetention(to="initial"))], given(log_alpha=0.0))
    differ(rules[1:])


def test_decay_to_the_initial_memory_is_said_about_the_weights():
    """W_t = W_0 + alpha_t (W_{t-1} - W_0) - eta_t (W_{t-1} k_t - v_t) k_t^T, by hand."""
    rule = Rule(MATRIX, bias.L2(), retention.L2(to="initial"), algorithm.GradientDescent())
    tokens = draw_tokens(rule)
    weights, slow = draw_memory(rule)
    y, _ = call(rule, tokens, rule.init(weights, slow, batch=2))
    start = w = weights["w"].expand(2, -1, -1, -1)
    for t in range(13):
        q, k, v = (x[:, t, :, :, None] for x in tokens[:3])
        alpha, eta = tokens.gates["log_alpha"][:, t, :, :, None].exp(), tokens.gates["eta"][:, t, :, :, None]
        w = start + alpha * (w - start) - eta * (w @ k - v) @ k.mT
        assert_same(y[:, t], (w @ q)[..., 0], 1e-12)


@pytest.mark.parametrize("mem", [DEEP, MATRIX], ids=str)
@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_at_the_decayed_memory_are_those_at_the_previous_one_without_decay(mem, chunk):
    rule = replace(YAAD, memory=mem, chunk=chunk)
    pair = [rule, replace(rule, gradient_at="decayed")]
    equal(pair, given(log_alpha=0.0))
    differ(pair)


def test_momentum_that_forgets_at_once_is_gradient_descent():
    pair = [replace(YAAD, algorithm=algorithm.GradientDescent()), replace(YAAD, algorithm=algorithm.Momentum())]
    equal(pair, given(theta=0.0))
    differ(pair, given(theta=0.5))


@pytest.mark.parametrize("kernel", [bias.L2(), bias.Huber()], ids=str)
def test_a_bare_mlp_of_one_layer_is_the_matrix_memory(kernel):
    rule = replace(YAAD, bias=kernel, memory=memory.MLP(layers=1, residual=False, norm=False))
    equal([rule, replace(rule, memory=MATRIX)])


def test_the_residual_of_a_one_layer_mlp_shifts_the_value_by_the_key():
    bare, residual = (
        replace(YAAD, bias=bias.L2(), memory=memory.MLP(1, residual=r, norm=False)) for r in (False, True)
    )
    tokens = draw_tokens(bare)
    state = bare.init(*draw_memory(bare), batch=2)
    shifted = tokens._replace(v=tokens.v + tokens.k)
    assert_same(call(residual, shifted, state)[0], call(bare, tokens, state)[0] + tokens.q, 1e-12)


def test_swiglu_is_its_formula():
    x, w = torch.randn(2, 3, 7, 4).double(), {n: torch.randn(3, 8, 4).double() for n in ("w2", "w3")}
    w["w1"] = torch.randn(3, 4, 8).double()
    inner = F.silu(torch.einsum("hoi,bhti->bhto", w["w3"], x)) * torch.einsum("hoi,bhti->bhto", w["w2"], x)
    y = torch.einsum("hoi,bhti->bhto", w["w1"], inner)
    assert_same(memory.SwiGLU(residual=False, norm=False).read(w, x, {}), y, 1e-13)
    slow = {"norm_scale": torch.ones(3, 4).double(), "norm_shift": torch.zeros(3, 4).double()}
    assert_same(memory.SwiGLU().read(w, x, slow), x + F.layer_norm(y, (4,)), 1e-13)


def test_an_mlp_with_biases_is_its_formula():
    mem = memory.MLP(expansion=2, activation="gelu_tanh", residual=False, norm=False, bias=True)
    assert {n: leaf[:4] for n, leaf in mem.leaves(5, 4).items()} == {
        "w1": (4, 9, ROWS, COLUMNS),
        "w2": (8, 6, None, ROWS),
    }
    x, w1, w2 = torch.randn(1, 1, 7, 5).double(), torch.randn(1, 4, 9).double(), torch.randn(1, 8, 6).double()
    hidden = F.gelu(F.linear(x, w2[0, :, :5], w2[0, :, 5]), approximate="tanh")
    assert_same(mem.read({"w1": w1, "w2": w2}, x, {}), F.linear(hidden, w1[0, :, :8], w1[0, :, 8]), 1e-13)


def test_a_matrix_with_a_bias_learns_by_hand():
    """W_t = W_{t-1} - eta_t r_t k_t^T, b_t = b_{t-1} - eta_t r_t: the inner loop of TTT-Linear without its norm."""
    rule = Rule(
        memory.MLP(1, residual=False, norm=False, bias=True),
        bias.L2(),
        retention.NoRetention(),
        algorithm.GradientDescent(),
    )
    tokens = draw_tokens(rule)
    weights, _ = draw_memory(rule)
    y, _ = call(rule, tokens, rule.init(weights, batch=2))
    w, b = (x.expand(2, -1, -1, -1) for x in weights["w1"].split([4, 1], -1))
    for t in range(13):
        q, k, v = (x[:, t, :, :, None] for x in tokens[:3])
        step = tokens.gates["eta"][:, t, :, :, None] * (w @ k + b - v)
        w, b = w - step @ k.mT, b - step
        assert_same(y[:, t], (w @ q + b)[..., 0], 1e-12)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_products_of_polynomial_features_are_the_taylor_polynomial_of_the_exponential(degree):
    mem, (x, y) = memory.Polynomial(degree), torch.randn(2, 50, 5).double()
    terms = range(1, degree + 1)
    dot = (x * y).sum(-1)
    kernel = sum(dot**n / math.factorial(n) for n in terms) / sum(1 / math.factorial(n) for n in terms)
    phi = mem.features(x)
    assert_same((phi * mem.features(y)).sum(-1), kernel, 1e-13)
    assert phi.shape[-1] == mem.leaves(5, 4)["w"].cols
    assert_same(mem.features(F.normalize(x, dim=-1)).norm(dim=-1), torch.ones(50).double(), 1e-13)


def test_a_polynomial_memory_with_the_dot_product_is_attention_with_that_kernel():
    rule = Rule(memory.Polynomial(2), bias.Dot(), retention.NoRetention(), algorithm.GradientDescent())
    tokens = draw_tokens(rule)
    dot = torch.einsum("bthd,bshd->bhts", tokens.q, tokens.k)
    scores = ((dot + dot.square() / 2) / 1.5).tril()
    assert_same(call(rule, tokens)[0], torch.einsum("bhts,bshd->bthd", scores, tokens.gates["eta"] * tokens.v), 1e-12)


def test_a_polynomial_memory_of_degree_1_is_the_matrix_memory():
    equal(
        [replace(YAAD, memory=m("learned")) for m in (partial(memory.Linear, "values"), partial(memory.Polynomial, 1))]
    )


def test_features_made_in_inference_mode_first_can_be_trained_with_later():
    mem = memory.Polynomial(3)
    with torch.inference_mode():
        mem.features(torch.randn(7))
    x = torch.randn(7, requires_grad=True)
    mem.features(x).sum().backward()
    assert x.grad is not None


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 7, 16])
@pytest.mark.parametrize("learner", [algorithm.GradientDescent(), algorithm.Momentum()], ids=str)
def test_chunks_change_nothing_for_a_linear_memory_with_the_dot_product_and_else_much(chunk, learner):
    dot = Rule(MATRIX, bias.Dot(), retention.L2(), learner)
    equal([dot, replace(dot, chunk=chunk)])
    for other in (replace(dot, bias=bias.L2()), replace(dot, memory=DEEP)):
        differ([other, replace(other, chunk=chunk)])


@pytest.mark.parametrize(("chunk", "expected"), [(1, 4.0), (2, 6.0)])
@pytest.mark.parametrize("engine", ["auto", "recurrence"])
def test_a_key_written_twice_is_overwritten_by_the_delta_rule_and_added_up_by_stale_gradients(chunk, expected, engine):
    rule = replace(variants.deltanet(), chunk=chunk)
    key = torch.tensor([1.0, 0.0]).double().expand(1, 2, 1, 2)
    v = torch.tensor([[2.0, 0.0], [4.0, 0.0]]).double().reshape(1, 2, 1, 2)
    tokens = draw_tokens(rule)._replace(q=key, k=key, v=v, gates={"eta": torch.ones(1, 2, 1, 1).double()})
    y, _ = call(rule, tokens, engine=engine)
    assert y[0, :, 0].tolist() == [[2.0, 0.0], [expected, 0.0]]


# -- links ------------------------------------------------------------------------------------------------------------

SLICES = [Leaf(6, 5, COLUMNS, ROWS, 1.0, 1.0), Leaf(6, 5, ROWS, COLUMNS, 9.0, 0.3)]


@pytest.mark.parametrize("link_at", ["token", "chunk"])
@pytest.mark.parametrize("to", ["zero", "initial"])
def test_kl_keeps_positive_weights_of_constant_mass(to, link_at):
    rule = replace(variants.memora(chunk=4), retention=retention.KL(to=to), link_at=link_at)
    tokens = draw_tokens(rule, time=23, channels=True)
    state = rule.init(*draw_memory(rule), batch=2)
    leaves = rule.leaves(4, 4)
    for start in range(0, 23, 4):
        _, state = call(rule, tokens.part(start, start + 4), state)
        for name, w in rule.link(state.dual, state.home, leaves).items():
            total = w.sum(leaves[name].simplex)
            assert (w > 0).all()
            assert_same(total, torch.full_like(total, mass(leaves[name])), 1e-13, name)


@pytest.mark.parametrize("leaf", SLICES, ids=["rows", "columns"])
@pytest.mark.parametrize("constant", [0.0, -3.0])
def test_slope_of_kl_at_a_constant_dual_is_mass_over_size(leaf, constant):
    gate = retention.KL()
    slope = gate.linearise(torch.full((6, 5), constant).double(), leaf)[1]
    assert_same(slope, torch.full_like(slope, mass(leaf) / leaf.simplex_size), 1e-13)
    assert gate.slope0(leaf) == mass(leaf) / leaf.simplex_size


@pytest.mark.parametrize("leaf", SLICES, ids=["rows", "columns"])
def test_slope_of_kl_is_the_least_squares_fit_of_the_link(leaf):
    gate, origin = retention.KL(), torch.randn(6, 5).double()
    o, w, axis = gate.centre(origin, leaf), gate.primal(origin, leaf), leaf.simplex
    fit = (o * (w - w.mean(axis, keepdim=True))).sum(axis, keepdim=True) / o.square().sum(axis, keepdim=True)
    torch.testing.assert_close(gate.linearise(origin, leaf)[1], fit, rtol=1e-4, atol=0)


def test_the_unit_of_lq_makes_the_papers_link_the_identity_on_average():
    for q in (1.5, 3.0, 4.0):
        for std in (1.0, 0.05):
            leaf = Leaf(700, 700, COLUMNS, ROWS, 1.0, std)
            dual = std * torch.randn(700, 700).double()
            assert_same(retention.Lq(q=q).primal(dual, leaf), dual, 1e-2)
    # q = 4: s = 3^(1/4) std, and W = A s^2 / sqrt(mean A^4).
    leaf, dual = Leaf(4, 5, COLUMNS, ROWS, 1.0, 0.5), torch.randn(4, 5).double()
    factor = math.sqrt(3) * 0.25 / dual.pow(4).mean().sqrt()
    assert_same(retention.Lq().primal(dual, leaf), factor * dual, 1e-5)


@pytest.mark.parametrize(("link", "degree"), [("paper", -1), ("mirror", 1)])
def test_degree_of_the_lq_links(link, degree):
    gate, leaf, dual = retention.Lq(q=4.0, link=link), SLICES[0], 3 * torch.randn(6, 5).double()
    torch.testing.assert_close(
        gate.primal(10 * dual, leaf), 10.0**degree * gate.primal(dual, leaf), rtol=1e-4, atol=1e-5
    )


def test_the_mirror_link_is_the_mirror_map_of_half_the_squared_norm():
    """W = sign(A) |A|^(q-1) / ||A||_q^(q-2) is the gradient of 1/2 ||A||_q^2, up to the unit."""
    gate, leaf = retention.Lq(q=3.0, link="mirror"), SLICES[0]
    dual = (3 * torch.randn(6, 5).double()).requires_grad_()
    expected = torch.autograd.grad(0.5 * dual.abs().pow(3).sum().pow(2 / 3), dual)[0]
    got = gate.primal(dual, leaf).detach()
    ratio = got[0, 0] / expected[0, 0]
    torch.testing.assert_close(got, ratio * expected, rtol=1e-4, atol=1e-4)


def test_kl_as_an_f_divergence_is_kl():
    for leaf in SLICES:
        dual = 3 * torch.randn(6, 5).double()
        pair = [gate.linearise(dual, leaf) for gate in (retention.FDivergence(f="kl"), retention.KL())]
        for got, expected in zip(*pair, strict=True):
            assert_same(got, expected, 1e-12)
    for to in ("zero", "initial"):
        pair = [replace(YAAD, retention=r) for r in (retention.FDivergence(f="kl", to=to), retention.KL(to=to))]
        equal(pair)


def test_the_local_f_divergence_of_kl_is_kl_without_decay_where_the_matrix_is_one_slice():
    rule = replace(YAAD, memory=memory.Vector(start="learned"), link_at="token")
    equal(
        [replace(rule, retention=r) for r in (retention.LocalFDivergence(f="kl"), retention.KL())], given(log_alpha=0.0)
    )


F_OF = {
    "kl": lambda t: t * t.log() - t + 1,
    "chi2": lambda t: (t - 1).square(),
    "reverse_kl": lambda t: t - 1 - t.log(),
    "hellinger": lambda t: (t.sqrt() - 1).square(),
}
every_f = pytest.mark.parametrize("f", F_OF)


def derivative(f, t):
    t = t.detach().requires_grad_()
    return torch.autograd.grad(f(t).sum(), t)[0]


def assert_minimal(slope, weights, axis):
    """Where weights >= 0 with a given sum minimise: the slope of the objective is one number on those that are not
    zero, and no less than it on those that are."""
    alive = weights > 0
    level = slope.masked_fill(~alive, 0).sum(axis, keepdim=True) / alive.sum(axis, keepdim=True)
    assert_same(torch.where(alive, slope, level), level.expand_as(slope), 1e-9)
    assert (slope >= level - 1e-9).all()


@every_f
@pytest.mark.parametrize("leaf", SLICES, ids=["rows", "columns"])
def test_an_f_divergence_is_minimised_on_the_simplex(f, leaf):
    gate, uniform = retention.FDivergence(f=f), mass(leaf) / leaf.simplex_size
    for scale in (0.1, 3.0, 100.0):
        dual = scale * torch.randn(7, 6, 5).double()
        w = gate.primal(dual, leaf)
        total = w.sum(leaf.simplex)
        assert (w >= 0).all() and (f != "chi2" or scale < 1 or (w == 0).any())
        assert_same(total, torch.full_like(total, mass(leaf)), 1e-12)
        if f == "chi2" or scale < 100:  # others have slopes of 1e43 where entries are 1e-43
            assert_minimal(derivative(F_OF[f], w / uniform) - dual, w, leaf.simplex)


@every_f
def test_the_local_f_divergence_is_minimised_on_the_simplex(f):
    gate, leaf = retention.LocalFDivergence(f=f), SLICES[0]
    dual, step = torch.randn(2, 7, 6, 5).double()
    before, after = (gate.primal(a, leaf).flatten(-2) for a in (dual, gate.retain(dual, 0.5 * step, {})))
    assert_same(after.sum(-1), torch.full((7,), 5 * mass(leaf)).double(), 1e-12)
    assert_minimal(derivative(F_OF[f], after / before) + 0.5 * step.flatten(-2), after, -1)


def test_what_chi2_sets_to_zero_keeps_a_logarithm():
    gate = retention.LocalFDivergence(f="chi2")
    dual = torch.zeros(6, 5).double().requires_grad_()
    step = torch.full_like(dual, 10.0).index_fill(0, torch.tensor([0]), 0.0)
    after = gate.retain(gate.retain(dual, step, {}), step, {})
    assert (gate.primal(after, SLICES[0])[1:] < 1e-5).all()
    assert torch.autograd.grad(after.sum(), dual)[0].isfinite().all()


@every_f
@pytest.mark.parametrize("leaf", SLICES, ids=["rows", "columns"])
def test_the_normaliser_of_an_f_divergence_has_the_derivative_of_the_implicit_function(f, leaf):
    dual, step = (torch.randn(6, 5).double().requires_grad_() for _ in range(2))
    link, local = retention.FDivergence(f=f), retention.LocalFDivergence(f=f)
    assert torch.autograd.gradcheck(lambda a: link.linearise(a, leaf), dual)
    assert torch.autograd.gradcheck(lambda a, s: local.retain(a, 0.3 * s, {}), (dual, step))


POTENTIALS = {
    "logistic": lambda w: torch.logit(w / 4),
    "hypentropy": lambda w: 2 * torch.asinh(w / 2),
    "entropy": torch.log,
}


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_link_of_bregman_inverts_the_derivative_of_its_potential(potential):
    gate, constant = retention.Bregman(potential), torch.full((6, 5), 0.0).double().requires_grad_()
    for leaf in SLICES:
        dual = leaf.std * torch.randn(6, 5).double()
        w, slope = gate.linearise(dual, leaf)
        assert_same(leaf.std * POTENTIALS[potential](w / leaf.std), dual, 1e-12)
        o = dual - dual.mean()
        torch.testing.assert_close(slope.squeeze(), (o * w).sum() / o.square().sum(), rtol=1e-3, atol=0)
        w, slope = gate.linearise(constant, leaf)
        assert slope.item() == pytest.approx(gate.slope0(leaf))
        at_zero, of_slope = (torch.autograd.grad(x.sum(), constant, retain_graph=True)[0] for x in (w, slope))
        assert_same(at_zero, torch.full_like(w, gate.slope0(leaf)), 1e-12)
        assert of_slope.isfinite().all()


def test_the_sigmoid_gate_is_the_papers():
    """W_t = sigmoid(alpha_t logit(W_{t-1}) - step_t) of entries in units of 4, by hand."""
    rule = Rule(MATRIX, bias.L2(), retention.Bregman("logistic"), algorithm.GradientDescent())
    tokens = draw_tokens(rule)
    weights, slow = draw_memory(rule)
    y, _ = call(rule, tokens, rule.init(weights, slow, batch=2))
    w = torch.sigmoid(weights["w"]).expand(2, -1, -1, -1)
    for t in range(13):
        q, k, v = (x[:, t, :, :, None] for x in tokens[:3])
        alpha, eta = tokens.gates["log_alpha"][:, t, :, :, None].exp(), tokens.gates["eta"][:, t, :, :, None]
        w = torch.sigmoid(alpha * torch.logit(w) - eta * (4 * w @ k - v) @ k.mT)
        assert_same(y[:, t], (4 * w @ q)[..., 0], 1e-12)


@pytest.mark.parametrize("mem", [DEEP, MATRIX], ids=str)
@pytest.mark.parametrize("to", ["zero", "initial"])
@pytest.mark.parametrize("link_at", ["token", "chunk"])
def test_an_elastic_net_without_threshold_is_l2(link_at, to, mem):
    rule = replace(YAAD, memory=mem, retention=retention.L2(to=to))
    equal([rule, replace(rule, retention=retention.ElasticNet(0.0, to=to), link_at=link_at)])


def test_a_local_elastic_net_without_threshold_is_l2():
    """From the same weights, which the net carries in units of their standard deviation."""
    for mem in (DEEP, MATRIX):
        rule, net = (replace(YAAD, memory=mem, retention=r) for r in (retention.L2(), retention.LocalElasticNet(0.0)))
        tokens = draw_tokens(rule)
        weights, slow = draw_memory(rule)
        scaled = {n: weights[n] / leaf.std for n, leaf in rule.leaves(4, 4).items()}
        expected = call(rule, tokens, rule.init(weights, slow, batch=2))[0]
        assert_same(call(net, tokens, net.init(scaled, slow, batch=2))[0], expected, 1e-12)


def minimum(objective, lo, hi):
    """Where a convex function of each entry is least, by ternary search."""
    for _ in range(100):
        a, b = lo + (hi - lo) / 3, hi - (hi - lo) / 3
        left = objective(a) < objective(b)
        lo, hi = torch.where(left, lo, a), torch.where(left, b, hi)
    return (lo + hi) / 2


def test_elastic_nets_minimise_what_the_paper_says():
    """Eq. 22 with its own eta, beta and a, and eq. 23 (with the half that it lacks), entry by entry."""
    w, g = torch.randn(2, 40, 5).double()
    eta, beta, a, leaf = 0.5, 2.0, 1.5, SLICES[0]
    far = torch.full_like(w, 20.0)
    found = minimum(lambda x: x * g + (x - w).square() / (2 * eta) + x.square() / (2 * beta) + x.abs() / a, -far, far)
    scale = beta / (beta + eta)
    gate = retention.LocalElasticNet(gamma=eta * scale / a)
    got = gate.retain(w, eta * scale * g, {"alpha": torch.tensor(scale).double()})
    assert_same(got, found, 1e-6)
    assert 10 < (got == 0).sum() < 190
    link = retention.ElasticNet(gamma=0.7).primal(w, leaf)
    assert_same(link, minimum(lambda x: x.square() / 2 - w * x + 0.7 * x.abs(), -far, far), 1e-6)
    assert 10 < (link == 0).sum() < 190


def test_a_sphere_keeps_the_norm_of_rows_and_the_direction_of_their_duals():
    gate = retention.Sphere()
    for leaf in (*SLICES, Leaf(6, 1, ROWS, ROWS, 1.0, 0.3)):
        dual = torch.randn(2, leaf.rows, leaf.cols).double()
        axis = COLUMNS if leaf.cols > 1 else (-2, -1)
        w, slope = gate.linearise(dual, leaf)
        radius = leaf.std * math.sqrt(leaf.cols if leaf.cols > 1 else leaf.rows)
        norm = w.norm(dim=axis, keepdim=True)
        torch.testing.assert_close(norm, torch.full_like(norm, radius), rtol=1e-4, atol=0)
        assert_same(w, radius * dual / dual.norm(dim=axis, keepdim=True), 1e-4)
        assert_same(slope.expand_as(w) * dual, w, 1e-14)
        torch.testing.assert_close(gate.primal(100 * dual, leaf), w, rtol=1e-4, atol=0)


# -- where the link acts inside a chunk -------------------------------------------------------------------------------


def gap(rule, scale):
    """How far the two places of the link are apart when all steps are multiplied by `scale`."""
    torch.manual_seed(0)
    pair = [replace(rule, link_at=at) for at in ("token", "chunk")]
    token, chunk = outputs(pair, lambda g: g | {"eta": scale * g["eta"], "log_alpha": scale * g["log_alpha"]}, time=8)
    return (token - chunk).norm().item()


SLOPED = [
    retention.KL(),
    retention.KL("initial"),
    retention.Lq(),
    retention.Lq(3.0, "mirror", "initial"),
    retention.Bregman(),
    retention.Bregman("hypentropy", "initial"),
    retention.FDivergence("hellinger"),
    retention.ElasticNet(),
    retention.Sphere("initial"),
]


@pytest.mark.parametrize("gate", SLOPED, ids=str)
def test_the_link_at_the_chunk_is_the_link_at_the_token_in_the_limit_of_small_steps(gate):
    rule = replace(YAAD, retention=gate, chunk=8, link_at="chunk")
    assert gap(rule, 1.0) > 1e-3
    # The error falls with the step, at least in proportion.
    assert gap(rule, 1e-4) < 1.2e-1 * gap(rule, 1e-3) < 1.2e-1 * 1.2e-1 * gap(rule, 1e-2)


@pytest.mark.parametrize("leaf", SLICES, ids=["rows", "columns"])
def test_the_slope_of_kl_is_exact_to_first_order_where_the_dual_is_constant(leaf):
    gate, origin, step = retention.KL(), torch.zeros(6, 5).double(), torch.randn(6, 5).double()

    def error(size):
        linear = gate.primal(origin, leaf) + gate.linearise(origin, leaf)[1] * gate.centre(size * step, leaf)
        return (gate.primal(origin + size * step, leaf) - linear).norm()

    assert error(1e-4) < 1.1e-2 * error(1e-3)


def test_the_slope_of_the_papers_lq_is_exact_to_first_order_along_steps_that_keep_the_norm():
    gate, leaf = retention.Lq(q=4.0), SLICES[0]
    origin, step = torch.randn(2, 6, 5).double()
    normal = origin.pow(3)
    step = step - normal * (normal * step).sum() / normal.square().sum()

    def error(size):
        linear = gate.primal(origin, leaf) + gate.linearise(origin, leaf)[1] * size * step
        return (gate.primal(origin + size * step, leaf) - linear).norm()

    assert error(1e-4) < 1.1e-2 * error(1e-3)


# -- Memora by its letter ---------------------------------------------------------------------------------------------


def test_memora_is_the_papers_softmax_of_a_logarithm():
    """W_t = c softmax(alpha_t log(W_{t-1} / c) - eta_t grad l_2(W_{t-1}; k_t, v_t)), gradients by autograd."""
    rule = variants.memora(chunk=1, letter=True)
    tokens = draw_tokens(rule, batch=1, heads=1, time=20)
    weights, slow = draw_memory(rule, heads=1)
    y, state = call(rule, tokens, rule.init(weights, slow))
    leaves, d, h = rule.leaves(4, 4), 4, 16
    mass = {"w1": math.sqrt(h), "w2": float(h)}  # c: slices along the hidden axis, that of W1 and W2 both of size h
    axis = {"w1": 1, "w2": 0}
    rate = {"w1": 1 / (h * mass["w1"] / h), "w2": 1 / (1.0 * mass["w2"] / h)}  # eta over input power times c / n
    assert set(leaves) == set(mass)

    def read(w, x):
        z = w["w1"] @ F.gelu(w["w2"] @ x)
        return x + F.layer_norm(z, (d,), eps=1e-5) * slow["norm_scale"][0] + slow["norm_shift"][0]

    w = {n: mass[n] * weights[n][0].softmax(axis[n]) for n in mass}
    for t in range(20):
        q, k, v = (x[0, t, 0] for x in tokens[:3])
        alpha, eta = tokens.gates["log_alpha"][0, t, 0].exp(), tokens.gates["eta"][0, t, 0]
        held = {n: x.clone().requires_grad_() for n, x in w.items()}
        loss = 0.5 * (read(held, k) - v).square().sum()
        grads = dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))
        w = {
            n: mass[n] * torch.softmax(alpha * torch.log(w[n] / mass[n]) - eta * rate[n] * grads[n], axis[n])
            for n in mass
        }
        assert_same(y[0, t, 0], read(w, q), 1e-10, f"token {t}")
    for n, x in rule.link(state.dual, state.home, leaves).items():
        assert_same(x[0, 0], w[n], 1e-10, n)


def bounded_both_ways(a):
    return 2 * torch.tanh(a)


def test_a_potential_of_ones_own_is_a_bregman_gate():
    gate = retention.Bregman(bounded_both_ways, to="initial")
    rule = Rule(memory.MLP(expansion=2), bias.L2(), gate, algorithm.GradientDescent("input"), chunk=4)
    leaf = rule.leaves(4, 4)["w1"]
    assert gate.slope0(leaf) == 2 and gate.eta_limit == 1 / 16
    assert mixer_from_config(json.loads(json.dumps(rule.to_config()))) == rule
    tokens, start = draw_tokens(rule, time=12), rule.init(*draw_memory(rule), batch=2)
    (y, after), (y_fast, after_fast) = (call(rule, tokens, start, engine=e) for e in ("recurrence", "chunk"))
    assert_same(y_fast, y, 1e-9)
    assert_same_states(after_fast, after, 1e-9)
    weights = rule.link(after.dual, after.home, rule.leaves(4, 4))["w1"]
    assert weights.abs().max() < 2 * leaf.std
    with pytest.raises(UsageError, match="logistic, hypentropy, entropy or a function"):
        retention.Bregman("square")


# -- first order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_the_derivative_of_one_step_by_hand(first):
    # y = (W_0 - eta (W_0 k - v) k^T) q: of first order the step is a constant to W_0, but not to k, v and eta.
    rule = Rule(MATRIX, bias.L2(), retention.NoRetention(), algorithm.GradientDescent(), first_order=first)
    tokens = draw_tokens(rule, time=1).map(torch.Tensor.requires_grad_)
    weights = {n: w.requires_grad_() for n, w in draw_memory(rule)[0].items()}
    y, _ = call(rule, tokens, rule.init(weights, batch=2), engine="recurrence")
    (found,) = torch.autograd.grad(y.sum(), weights.values(), retain_graph=True)
    k, q, eta = (x[:, 0, :, :] for x in (tokens.k, tokens.q, tokens.gates["eta"]))
    reads = q if first else q - eta * (k * q).sum(-1, keepdim=True) * k
    assert_same(found, reads.sum(0).unsqueeze(-2).expand_as(found), 1e-12)
    (by_value,) = torch.autograd.grad(y.sum(), [tokens.v])
    assert_same(by_value[:, 0], (eta * (k * q).sum(-1, keepdim=True)).expand_as(k), 1e-12)


@pytest.mark.parametrize("limit", [0, math.inf], ids=["scan", "autograd"])
def test_first_order_is_the_same_function_and_the_same_derivative_in_all_engines(limit, monkeypatch):
    monkeypatch.setattr("miras.engines.chunk.LARGE", limit)
    found = {}
    tokens = draw_tokens(YAAD, time=12).map(torch.Tensor.requires_grad_)
    weights, slow = ({n: x.requires_grad_() for n, x in part.items()} for part in draw_memory(YAAD))
    wrt = [*tokens.named().values(), *weights.values(), *slow.values()]
    for rule in (YAAD, replace(YAAD, first_order=True)):
        for engine in ("recurrence", "chunk"):
            y, _ = call(rule, tokens, rule.init(weights, slow, batch=2), engine=engine)
            found[rule.first_order, engine] = y, torch.autograd.grad(y.square().sum(), wrt)
    for first in (False, True):
        for one, other in zip(found[first, "chunk"][1], found[first, "recurrence"][1], strict=True):
            assert_same(one, other, 1e-10)
    assert_same(found[True, "chunk"][0], found[False, "chunk"][0], 0)
    assert any(
        (a - b).norm() > 1e-3 * b.norm() for a, b in zip(found[True, "chunk"][1], found[False, "chunk"][1], strict=True)
    )


@pytest.mark.parametrize("read_at", ["after", "before"])
@pytest.mark.parametrize("gradient_at", ["previous", "decayed"])
@pytest.mark.parametrize("learner", [YAAD.algorithm, algorithm.Momentum(rate="input")], ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_coefficients_in_closed_form_are_those_of_the_update(holes, learner, gradient_at, read_at):
    rule = replace(YAAD, algorithm=learner, gradient_at=gradient_at, read_at=read_at)
    log_alpha, eta, theta = -torch.rand(2, 3, 6, 1).double(), *torch.rand(2, 2, 3, 6, 1).double()
    log_alpha[0, 1, 3], theta[0, 1, 4] = -math.inf, 0  # everything is forgotten
    keep = torch.tensor([[False, True, True, True, True, True], [True, True, False, False, False, False]])
    gates = {"log_alpha": log_alpha.requires_grad_(), "eta": eta.requires_grad_()}
    if learner.slots:
        gates["theta"] = theta.requires_grad_()
    found = []
    for function in (unroll._per_head, unroll._by_tokens):
        # As engines fill holes.
        seen = {n: torch.where(keep[:, None, :, None], g, hole(n)) if holes else g for n, g in gates.items()}
        seen["alpha"] = seen["log_alpha"].exp()
        c = function(rule, seen, keep if holes else None)
        parts = [c.read, c.write.dual, c.write.slots, *([] if c.write.origin is None else [c.write.origin])]
        total = sum((x * torch.arange(x.numel()).view_as(x)).sum() for x in parts)
        found.append([*parts, *torch.autograd.grad(total, list(gates.values()))])
    for one, other in zip(*found, strict=True):
        assert_same(one, other, 1e-12)
