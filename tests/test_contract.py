"""What every memory, bias, retention, algorithm, rule and engine promises, whichever they are."""

import itertools
import json
import math

import contract
import pytest
import torch
import torch.nn.functional as F
from cases import (
    AXES,
    BIASES,
    CENTRES,
    FEW,
    MEMORIES,
    RETENTIONS,
    RULES,
    as_leaves,
    assert_same,
    assert_same_states,
    call,
    draw_gates,
    draw_memory,
    draw_tokens,
    own,
)
from contract import EXACT, engines_agree, state_in_flight, with_another_token
from hypothesis import given
from hypothesis import strategies as st

import miras
from miras import algorithm, bias, memory, retention, variants
from miras.bias.huber import EPS
from miras.errors import UsageError
from miras.mixer import Mixer, mixer_from_config
from miras.registry import choices, from_config, to_config
from miras.rule import Rule
from miras.state import tensors
from miras.weights import Decayed, Linearised, PerToken, Scaled, Unrolled

every_rule = pytest.mark.parametrize("case", RULES, ids=str)
some_rules = pytest.mark.parametrize("case", FEW, ids=str)


# -- the table of cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES, ids=lambda a: a.axis)
def test_every_class_is_in_the_table_of_cases(axis):
    missing = set(choices(axis).values()) - {type(part) for part in AXES[axis]}
    assert not missing, f"add {sorted(c.__name__ for c in missing)} to the {axis.axis} tuple of tests/cases.py"


def test_rules_cover_every_instance_of_every_axis():
    for name, instances in (("memory", MEMORIES), ("bias", BIASES), ("retention", RETENTIONS)):
        assert {getattr(case.rule, name) for case in RULES} == set(instances)
    assert {type(case.rule.algorithm) for case in RULES} == set(choices(algorithm.Algorithm).values())


def test_every_two_classes_that_go_together_meet():
    met, possible = set(), set()
    for found, rules in ((met, [case.rule for case in RULES]), (possible, plain_rules())):
        for rule in rules:
            parts = (rule.memory, rule.bias, rule.retention, rule.algorithm)
            found.update(itertools.combinations([type(part) for part in parts], 2))
    assert not possible - met


def plain_rules():
    """Every choice of the four axes that goes together in the plain frame."""
    for parts in itertools.product(*AXES.values()):
        try:
            yield Rule(*parts)
        except UsageError:
            continue


def test_what_a_refusal_says_to_write_makes_a_rule():
    names = {**vars(memory), **vars(algorithm)}
    # Every 7th choice: all instances of every two axes meet in them.
    for parts in list(itertools.product(*AXES.values()))[::7]:
        chosen = dict(zip(("memory", "bias", "retention", "algorithm"), parts, strict=True))
        for _ in range(5):
            try:
                Rule(**chosen)
            except UsageError as refusal:
                assert any(str(part) in str(refusal) for part in chosen.values()), refusal
                said = str(refusal).rpartition(" Write ")[2].removesuffix(".")
                written = eval(said.removeprefix("memory="), names)  # such as Linear(start='learned')
                chosen["memory" if isinstance(written, memory.Memory) else "algorithm"] = written
            else:
                break
        else:
            raise AssertionError(f"no advice helps: {chosen}")


# -- axes: closed forms -----------------------------------------------------------------------------------------------


def size(r):
    """|r| as smoothed in the paper, sqrt(r^2 + eps)."""
    return (r.square() + EPS).sqrt()


# Gradients that are those of no loss, by their formula.
FORMULAS = {
    bias.Lp: lambda b, r: b.p * torch.tanh(b.sharpness * r) * size(r) ** (b.p - 1),
    bias.L1: lambda b, r: torch.tanh(b.sharpness * r),
}


def true_gradient(loss, y, v, gates):
    """dL/dy by autograd, or by the formula where there is no loss."""
    if getattr(loss, "form", None) == "paper":
        return FORMULAS[type(loss)](loss, y - v)
    y = y.detach().requires_grad_()
    return torch.autograd.grad(loss.loss(y, v, gates).sum(), y)[0]


def true_step(loss, y, v, gates):
    """The gradient that a rule uses, u min(1, sqrt(d) / ||u||) where the bias clips."""
    u = true_gradient(loss, y, v, gates)
    if not loss.clip:
        return u
    return u * (u.shape[-1] ** 0.5 / u.norm(dim=-1, keepdim=True)).clamp_max(1.0)


def plain_rule(mem, loss):
    return Rule(mem, loss, retention.NoRetention(), algorithm.GradientDescent())


@pytest.mark.parametrize("loss", BIASES, ids=str)
def test_bias_gradient_is_that_of_its_loss(loss):
    rule = plain_rule(memory.Linear(), loss)
    y, v = (3 * torch.randn(2, 2, 200, 5, dtype=torch.float64) for _ in range(2))
    gates = draw_gates(rule, (2, 2, 200))
    for channels in [None, 5] if any(g.channel for g in loss.gates) else [None]:
        gates = draw_gates(rule, (2, 2, 200), channels)
        assert_same(loss.grad(y, v, gates), true_gradient(loss, y, v, gates), 1e-10)
        assert_same(loss.clipped(y, v, gates), true_step(loss, y, v, gates), 1e-10)


@pytest.mark.parametrize("loss", BIASES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e3])
def test_outer_loop_finds_finite_derivatives_of_the_bias(loss, scale):
    rule = plain_rule(memory.Linear(), loss)
    v = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    r = (scale * torch.randn(v.shape, dtype=torch.float64)).requires_grad_()
    gates = {n: g.requires_grad_() for n, g in draw_gates(rule, (2, 2, 6)).items()}
    u = loss.clipped(v + r, v, gates)
    assert u.isfinite().all()
    if u.requires_grad:
        first = torch.autograd.grad(u.sum(), [r, *gates.values()], create_graph=True, materialize_grads=True)
        assert all(x.isfinite().all() for x in first)
        second = torch.autograd.grad(sum(x.sum() for x in first), r, materialize_grads=True, allow_unused=True)[0]
        assert second.isfinite().all()


@pytest.mark.parametrize("loss", [b for b in BIASES if not isinstance(b, bias.Erase)], ids=str)
@pytest.mark.parametrize("mem", MEMORIES, ids=str)
def test_inner_gradient_is_that_of_the_loss_of_the_memory(mem, loss):
    rule = plain_rule(mem, loss)
    tokens = draw_tokens(rule, heads=2, d_k=4)
    k, v = tokens.k.transpose(1, 2), tokens.v.transpose(1, 2)
    gates = {n: g.transpose(1, 2) for n, g in tokens.gates.items()}
    weights, slow = draw_memory(rule)
    # One copy of the weights per token, so that autograd sees each token's own gradient.
    copies = {n: torch.randn(2, 2, 13, *w.shape[1:]).double().requires_grad_() for n, w in weights.items()}
    operators = {n: PerToken(w) for n, w in copies.items()}
    y = mem.read(operators, k, slow)
    expected = torch.autograd.grad(y, list(copies.values()), true_step(loss, y.detach(), v, gates))
    got = rule.gradient(operators, slow, k, v, gates)
    for (name, outer), grad in zip(got.items(), expected, strict=True):
        assert_same(outer.dense(), grad, 1e-10, name)


@pytest.mark.parametrize("along", ["own", "key"])
def test_erase_takes_away_what_stands_at_its_key(along):
    rule = plain_rule(memory.Linear(), bias.Erase(along=along))
    _, k, v, gates = draw_tokens(rule)
    weights = torch.randn(2, 2, 4, 4).double()
    k, v, gates = k.transpose(1, 2), v.transpose(1, 2), {n: g.transpose(1, 2) for n, g in gates.items()}
    got = rule.gradient({"w": weights}, {}, k, v, gates)["w"].dense()
    b = gates["along"] if along == "own" else k
    stored = torch.einsum("bhoi,bhti->bhto", weights, gates["erase"])
    expected = torch.einsum("bhto,bhti->bhtoi", stored, b) - torch.einsum("bhto,bhti->bhtoi", v, k)
    assert_same(got, expected, 1e-14)


@pytest.mark.parametrize("mem", MEMORIES, ids=str)
def test_memory_reads_and_predicts_alike_and_its_leaves_say_its_shapes(mem):
    rule = plain_rule(mem, bias.L2())
    weights, slow = draw_memory(rule)
    x = draw_tokens(rule).k.transpose(1, 2)
    weights = {n: torch.randn_like(w) for n, w in weights.items()}
    y, pullback = mem.vjp(weights, x, slow)
    assert_same(mem.read(weights, x, slow), y, 1e-14)
    for name, leaf in mem.leaves(4, 4).items():
        outer = pullback(torch.randn_like(y))[name]
        assert weights[name].shape[1:] == (leaf.rows, leaf.cols)
        assert (outer.left.shape[-1], outer.right.shape[-1]) == (leaf.rows, leaf.cols)


@pytest.mark.parametrize("width", [1, "channels"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_operators_are_the_matrices_that_they_stand_for(width, axis):
    o, i, tokens, n = 5, 3, 4, 2
    w = (o if axis == -2 else i) if width == "channels" else 1
    x, u = torch.randn(2, n, tokens, i).double(), torch.randn(2, n, tokens, o).double()
    bases = (torch.randn(2, n, o, i).double(), torch.randn(n, o, i).double())
    scaled = Scaled(bases, torch.randn(2, n, tokens, 1, w).double(), axis)
    coef = (
        torch.randn(2, n, tokens, tokens, w).double().tril_()
        if w == 1
        else torch.randn(2, n, tokens, tokens, w).double()
    )
    outer = miras.weights.Outer(torch.randn_like(u), torch.randn_like(x))
    for operator in (scaled, Unrolled(scaled, outer, coef), PerToken(torch.randn(2, n, tokens, o, i).double())):
        dense = operator.matrix if isinstance(operator, PerToken) else operator.dense()
        assert_same(operator.mv(x), torch.einsum("...toi,...ti->...to", dense, x), 1e-13)
        if isinstance(operator, Scaled):
            assert_same(operator.tmv(u), torch.einsum("...toi,...to->...ti", dense, u), 1e-13)


@pytest.mark.parametrize("tokens", [16, 12, 7])
@pytest.mark.parametrize("diagonal", [0, -1])
@pytest.mark.parametrize("axis", [-2, -1])
def test_a_decay_per_channel_is_the_same_by_blocks_and_written_out(axis, diagonal, tokens, monkeypatch):
    monkeypatch.setattr("miras.decay.BLOCK", 4)  # 4 blocks of 4, 3 of 4, 7 of 1
    o, i, n = 5, 3, 2
    x = torch.randn(2, n, tokens, i).double()
    outer = miras.weights.Outer(torch.randn(2, n, tokens, o).double(), torch.randn(2, n, tokens, i).double())
    log = -torch.rand(2, n, tokens, o if axis == -2 else i).double().cumsum(-2)
    rows = log if diagonal == 0 else F.pad(log[..., :-1, :], (0, 0, 1, 0))
    bases = Scaled((torch.randn(2, n, o, i).double(),), rows.exp().unsqueeze(-2), axis)
    for width in (1, log.shape[-1]):
        decayed = Decayed(bases, outer, rows, log, torch.rand(2, n, tokens, width).double(), diagonal)
        assert_same(decayed.mv(x), torch.einsum("...toi,...ti->...to", decayed.dense(), x), 1e-13)


@pytest.mark.parametrize(
    ("simplex", "slope"), [(None, (1, 1)), (None, (5, 1)), (None, (1, 3)), (-2, (1, 3)), (-1, (5, 1))]
)
def test_a_linearised_link_is_the_matrix_that_it_stands_for(simplex, slope):
    o, i, tokens, n = 5, 3, 4, 2
    x = torch.randn(2, n, tokens, i).double()
    outer = miras.weights.Outer(torch.randn(2, n, tokens, o).double(), torch.randn(2, n, tokens, i).double())
    bases = Scaled((torch.randn(2, n, o, i).double(),), torch.randn(2, n, tokens, 1, 1).double(), None)
    change = Unrolled(bases, outer, torch.randn(2, n, tokens, tokens, 1).double().tril_())
    slope = torch.randn(2, n, *slope).double()
    base = torch.randn(2, n, o, i).double()
    dense = change.dense()
    if simplex is not None:
        dense = dense - dense.mean(simplex, keepdim=True)
    dense = base.unsqueeze(2) + slope.unsqueeze(2) * dense
    y = Linearised(base, slope, change, simplex).mv(x)
    assert_same(y, torch.einsum("...toi,...ti->...to", dense, x), 1e-13)


# -- engines: equal to the token loop ---------------------------------------------------------------------------------


@every_rule
def test_engine_equals_token_loop_from_the_initial_memory_and_everything_has_a_gradient(case):
    contract.from_the_start(case)


@every_rule
def test_engine_equals_token_loop_from_a_state_in_the_middle_of_a_chunk(case):
    contract.from_the_middle(case)


@given(data=st.data())
def test_any_cut_by_any_engines_is_the_whole(data):
    for case in FEW:
        chunk = data.draw(st.sampled_from([1, 2, 3, 5]), "chunk") if case.rule.chunk > 1 else 1
        rule = variants.Rule(**{**vars(case.rule), "chunk": chunk, "link_at": case.rule.link_at if chunk > 1 else None})
        time = data.draw(st.integers(1, 14), "time")
        cuts = sorted({0, time, *data.draw(st.lists(st.integers(0, time), max_size=3), "cuts")})
        engines = data.draw(st.lists(st.sampled_from(["auto", "recurrence"]), min_size=4, max_size=4), "engines")
        tokens = draw_tokens(rule, time=time, channels=case.channels)
        start = rule.init(*draw_memory(rule), batch=2)
        with torch.no_grad():
            y, whole = call(rule, tokens, start, engine="recurrence")
            parts, state = [], start
            for engine, (lo, hi) in zip(engines, itertools.pairwise(cuts), strict=False):
                part, state = call(rule, tokens.part(lo, hi), state, engine=engine)
                parts.append(part)
        assert_same(torch.cat(parts, 1), y, EXACT)
        assert_same_states(state, whole, EXACT)


@some_rules
def test_decoding_one_token_at_a_time_is_the_whole(case):
    tokens = draw_tokens(case.rule, channels=case.channels)
    start = case.rule.init(*draw_memory(case.rule), batch=2)
    y, whole = call(case.rule, tokens, start)
    state = start
    for t in range(13):
        y_t, state = call(case.rule, tokens.part(t, t + 1), state)
        assert_same(y_t, y[:, t : t + 1], EXACT)
    assert_same_states(state, whole, EXACT)


# -- sequences do not see what they must not see ----------------------------------------------------------------------


@every_rule
def test_causal(case):
    rule, t = case.rule, 6
    tokens = draw_tokens(rule, channels=case.channels)
    other = draw_tokens(rule, channels=case.channels)
    start = rule.init(*draw_memory(rule), batch=2)
    changed = with_another_token(tokens, other, t)
    for engine in ("auto", "recurrence"):
        y, y_changed = (call(rule, x, start, engine=engine)[0] for x in (tokens, changed))
        assert_same(y_changed[:, :t], y[:, :t], 1e-12)
        assert not torch.equal(y_changed[:, t], y[:, t])


@every_rule
def test_rows_are_independent_even_of_nan(case):
    tokens = draw_tokens(case.rule, channels=case.channels)
    ill = tokens.map(lambda x: torch.cat([x[:1], torch.full_like(x[1:], torch.nan)]))
    start = case.rule.init(*draw_memory(case.rule), batch=2)
    for engine in ("auto", "recurrence"):
        (y, after), (y_ill, after_ill) = (call(case.rule, x, start, engine=engine) for x in (tokens, ill))
        assert y_ill[1].isnan().any()
        assert_same(y_ill[:1], y[:1], 1e-13)
        assert_same_states(after_ill.index_select(torch.tensor([0])), after.index_select(torch.tensor([0])), 1e-13)


# -- learning ---------------------------------------------------------------------------------------------------------


@every_rule
def test_a_pair_that_was_written_is_recalled_better(case):
    contract.recall(case)


def test_recall_is_promised_by_all_but_two_kinds_of_rules():
    assert {contract.recall_not_promised(case.rule) for case in RULES} - {None} == {
        "the printed link of Lq has degree 3 - q: a step that lengthens A may shorten W",
        "the orthogonalised step of a chunk has norm 1 whatever eta is, beyond where a deep memory is linear",
    }


@every_rule
def test_a_layer_takes_a_step_in_float32_and_under_autocast(case):
    contract.training(case)


# -- padding and packing: exactly as one by one -----------------------------------------------------------------------

SPANS = ((0, 13), (5, 13), (0, 4), (3, 11), (6, 6))  # full, left-, right-padded, both, empty


def one_by_one(rule, tokens, spans, states):
    """Each row's span alone, from a state of its own, by the token loop: outputs per row, and the states."""
    outputs, after = [], []
    for row, ((lo, hi), one) in enumerate(zip(spans, states, strict=True)):
        y, one = call(rule, tokens.part(lo, hi, row), one, engine="recurrence") if lo < hi else (None, one)
        outputs.append(y)
        after.append(one)
    return outputs, after


def assert_rows(y, state, expected, spans):
    for row, ((lo, hi), y_one, one) in enumerate(zip(spans, *expected, strict=True)):
        if lo < hi:
            assert_same(y[row : row + 1, lo:hi], y_one, EXACT, f"row {row}")
        assert not y[row, :lo].any() and not y[row, hi:].any(), "padding reads as zero"
        assert_same_states(state.index_select(torch.tensor([row])), one, EXACT)


def with_nan_outside(tokens, mask):
    return tokens.map(lambda x: torch.where(mask.repeat_interleave(tokens.per(x), 1)[:, :, None, None], x, torch.nan))


@every_rule
def test_padding_is_as_if_it_were_not_there(case):
    rule, rows = case.rule, len(SPANS)
    tokens = draw_tokens(rule, batch=rows, channels=case.channels)
    start = rule.init(*draw_memory(rule), batch=rows)
    more, spans = (
        draw_tokens(rule, batch=rows, time=7, channels=case.channels),
        ((0, 7), (2, 7), (0, 7), (1, 6), (4, 7)),
    )
    mask, mask_more = (
        torch.tensor([[lo <= t < hi for t in range(time)] for lo, hi in where])
        for time, where in ((13, SPANS), (7, spans))
    )
    whole = ((0, 7),) * rows
    first = one_by_one(rule, tokens, SPANS, [start.index_select(torch.tensor([row])) for row in range(rows)])
    # The rows are now at different places of their chunks, and go on with and without padding.
    padded, unpadded = (one_by_one(rule, more, where, first[1]) for where in (spans, whole))
    for engine in ("auto", "recurrence"):
        y, state = call(rule, with_nan_outside(tokens, mask), start, mask=mask, engine=engine)
        assert_rows(y, state, first, SPANS)
        y, after = call(rule, with_nan_outside(more, mask_more), state, mask=mask_more, engine=engine)
        assert_rows(y, after, padded, spans)
        y, after = call(rule, more, state, engine=engine)
        assert_rows(y, after, unpadded, whole)


@every_rule
def test_packing_is_as_one_by_one(case):
    rule = case.rule
    cuts = [0, 3, 4, 12, 14, 19]
    spans = list(itertools.pairwise(cuts))
    start = rule.init(*draw_memory(rule), batch=len(spans))
    packs = [draw_tokens(rule, batch=1, time=19, channels=case.channels) for _ in range(2)]
    expected, states = [], [start.index_select(torch.tensor([n])) for n in range(len(spans))]
    for tokens in packs:  # the second goes on from states at different places of their chunks
        expected.append(one_by_one(rule, tokens.map(lambda x: x.expand(len(spans), *x.shape[1:])), spans, states))
        states = expected[-1][1]
    for engine in ("auto", "recurrence"):
        state = start
        for tokens, (outputs, states) in zip(packs, expected, strict=True):
            y, state = call(rule, tokens, state, cu_seqlens=torch.tensor(cuts), engine=engine)
            assert_same(y, torch.cat(outputs, 1), EXACT)
            for n, one in enumerate(states):
                assert_same_states(state.index_select(torch.tensor([n])), one, EXACT)


@some_rules
def test_outer_gradients_do_not_see_padding(case):
    rule = case.rule
    mask = torch.tensor([[2 <= t < 11 for t in range(13)], [True] * 13])
    tokens = draw_tokens(rule, channels=case.channels)
    weights, slow = ({n: w.requires_grad_() for n, w in part.items()} for part in draw_memory(rule))
    start = rule.init(weights, slow, batch=2)
    cotangent = torch.randn_like(tokens.v[:, : tokens.q.shape[1]])
    grads = {}
    for engine in ("auto", "recurrence"):
        for name, x in (("clean", tokens), ("ill", with_nan_outside(tokens, mask))):
            leaves = x.map(lambda x: x.clone().requires_grad_())
            y, _ = call(rule, leaves, start, mask=mask, engine=engine)
            wrt = [*leaves.named().values(), *weights.values(), *slow.values()]
            grads[engine, name] = torch.autograd.grad(
                (y * cotangent).sum(), wrt, materialize_grads=True, allow_unused=True
            )
    for (engine, name), found in grads.items():
        for got, expected in zip(found, grads["recurrence", "clean"], strict=True):
            assert_same(got, expected, EXACT, f"{engine}, {name} padding")


@some_rules
def test_tensors_of_the_caller_are_not_changed(case):
    tokens = draw_tokens(case.rule, channels=case.channels)
    state = state_in_flight(case.rule, *draw_memory(case.rule), case.channels)
    named = {**tokens.named(), **tensors(state)}
    before = {n: x.clone() for n, x in named.items()}
    for engine in ("auto", "recurrence"):
        for options in ({}, {"mask": torch.tensor([[False] + [True] * 12, [True] * 12 + [False]])}):
            call(case.rule, tokens, state, engine=engine, **options)
        call(case.rule, tokens.part(0, 1), state, engine=engine)
    for n, x in named.items():
        assert torch.equal(x, before[n]), n


# -- precision --------------------------------------------------------------------------------------------------------


def relative(got, expected):
    """RMSE over RMS."""
    assert got.isfinite().all()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def in_precision(rule, tokens, weights, slow, dtype, engine, cotangent):
    """Output, state and outer gradients by name, computed in a dtype."""
    tokens = tokens.map(lambda x: x.to(dtype).requires_grad_())
    weights, slow = ({n: w.to(dtype).requires_grad_() for n, w in part.items()} for part in (weights, slow))
    y, state = call(rule, tokens, rule.init(weights, slow, batch=tokens.v.shape[0]), engine=engine)
    wrt = {**tokens.named(), **weights, **slow}
    grads = torch.autograd.grad(
        (y * cotangent.to(dtype)).sum(), list(wrt.values()), materialize_grads=True, allow_unused=True
    )
    outputs = {"y": y, **{n: x for n, x in own(state).items() if x.is_floating_point()}}
    return outputs, dict(zip(wrt, grads, strict=True))


def float32_problem(rule, time, eta, d=8, channels=False):
    """A problem whose numbers are exact in float32, and a cotangent."""
    centres = CENTRES | {"log_alpha": -0.01, "eta": eta}
    tokens = draw_tokens(rule, batch=1, time=time, d_k=d, channels=channels, centres=centres)
    rounded = tokens.map(lambda x: x.float().double())
    weights, slow = ({n: w.float().double() for n, w in part.items()} for part in draw_memory(rule, d_k=d))
    return rounded, weights, slow, torch.randn_like(rounded.v[:, :time]).float().double()


@some_rules
def test_float32_engine_is_as_precise_as_the_float32_token_loop(case):
    """The engine's error is at most twice the token loop's plus 1e-6, in the geometric mean over problems: in a single
    ill-conditioned one the ratio of two rounding errors is an accident."""
    excess: dict[str, list[float]] = {}
    for _ in range(4):
        *problem, cotangent = float32_problem(case.rule, 29, eta=0.03, channels=case.channels)
        # The engine in float64 stands for the token loop, which it equals to 1e-9.
        exact, loop, engine = (
            in_precision(case.rule, *problem, dtype, name, cotangent)
            for dtype, name in ((torch.float64, "auto"), (torch.float32, "recurrence"), (torch.float32, "auto"))
        )
        for part in (0, 1):
            for name, expected in exact[part].items():
                if expected.any():
                    error, allowed = (
                        relative(engine[part][name], expected),
                        2 * relative(loop[part][name], expected) + 1e-6,
                    )
                    excess.setdefault(name, []).append(math.log(max(error, 1e-9) / allowed))
    for name, logs in excess.items():
        assert sum(logs) <= 0, f"{name}: {math.exp(sum(logs) / len(logs)):.2f} times what is allowed"


PRECISE = ("linear_attention", "deltanet", "gated_deltanet", "moneta", "yaad", "memora")


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("time", [300, pytest.param(2048, marks=pytest.mark.slow)])
def test_float32_precision_of_linear_memories_and_presets(name, time):
    rule = variants.variant(name)
    *problem, cotangent = float32_problem(rule, time, eta=0.1, d=16)
    # The chunk engine in float64 stands for the token loop, which it equals to 1e-9.
    exact, engine = (in_precision(rule, *problem, dtype, "auto", cotangent) for dtype in (torch.float64, torch.float32))
    assert relative(engine[0]["y"], exact[0]["y"]) <= 2e-6
    for name, expected in exact[1].items():
        if expected.any():
            assert relative(engine[1][name], expected) <= 3e-5, name


@every_rule
def test_under_autocast_the_state_stays_in_float32(case):
    tokens = draw_tokens(case.rule, channels=case.channels).map(torch.Tensor.float)
    weights, slow = ({n: w.float() for n, w in part.items()} for part in draw_memory(case.rule))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = call(case.rule, tokens, case.rule.init(weights, slow, batch=2))
    assert y.isfinite().all()
    for name, x in own(state).items():
        assert x.dtype == (torch.int64 if name == "offset" else torch.float32), name
        assert x.isfinite().all() if x.is_floating_point() else True


@some_rules
def test_bfloat16_activations_give_bfloat16_outputs_and_a_float32_state(case):
    tokens = draw_tokens(case.rule, channels=case.channels).map(torch.Tensor.bfloat16)
    weights, slow = ({n: w.float() for n, w in part.items()} for part in draw_memory(case.rule))
    y, state = call(case.rule, tokens, case.rule.init(weights, slow, batch=2))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert {x.dtype for x in own(state).values()} == {torch.float32, torch.int64}


# -- shapes -----------------------------------------------------------------------------------------------------------


@some_rules
def test_grouped_heads_are_repeated_heads(case):
    tokens = draw_tokens(case.rule, heads=4, channels=case.channels)
    grouped = tokens._replace(q=tokens.q[:, :, ::2], k=tokens.k[:, :, ::2])
    repeated = tokens._replace(q=grouped.q.repeat_interleave(2, 2), k=grouped.k.repeat_interleave(2, 2))
    start = case.rule.init(*draw_memory(case.rule, heads=4), batch=2)
    (y, state), (y_repeated, state_repeated) = (call(case.rule, x, start) for x in (grouped, repeated))
    assert torch.equal(y, y_repeated)
    assert_same_states(state, state_repeated, 1e-15)


@pytest.mark.parametrize(
    "mem",
    [memory.Linear(), memory.MLP(residual=False, bias=True), memory.SwiGLU(residual=False), memory.Polynomial()],
    ids=str,
)
@pytest.mark.parametrize("loss", [bias.Dot(), bias.L2(), bias.Huber()], ids=str)
def test_values_may_have_another_size_than_keys(mem, loss):
    rule = Rule(mem, loss, retention.L2(), algorithm.GradientDescent(rate="input"), chunk=4)
    tokens = draw_tokens(rule, d_k=4, d_v=6).map(torch.Tensor.requires_grad_)
    weights, slow = draw_memory(rule, d_k=4, d_v=6)
    state = rule.init(weights, slow, batch=2)
    assert call(rule, tokens, state)[0].shape == (2, 13, 2, 6)
    assert {n: x.shape for n, x in rule.init(weights).slow.items()} == {n: x.shape for n, x in slow.items()}
    engines_agree(rule, tokens, state, tokens.named())


def test_a_memory_that_starts_at_zero_needs_no_state():
    rule = variants.deltanet()
    tokens = draw_tokens(rule)
    start = rule.init(*draw_memory(rule), batch=2)
    assert torch.equal(call(rule, tokens)[0], call(rule, tokens, start)[0])


# -- states -----------------------------------------------------------------------------------------------------------


@some_rules
def test_states_fork_reorder_clone_and_detach(case):
    weights, slow = draw_memory(case.rule)
    state = state_in_flight(case.rule, weights, slow)
    tokens = draw_tokens(case.rule, time=5, channels=case.channels)
    y, _ = call(case.rule, tokens, state)
    y_forked, _ = call(case.rule, tokens.map(lambda x: x.repeat_interleave(2, 0)), state.fork(2))
    assert_same(y_forked, y.repeat_interleave(2, 0), 1e-13)
    swap = torch.tensor([1, 0])
    assert_same(call(case.rule, tokens.map(lambda x: x[swap]), state.index_select(swap))[0], y[swap], 1e-13)
    assert all(
        a is not b and torch.equal(a, b) for a, b in zip(own(state.clone()).values(), own(state).values(), strict=True)
    )
    grown = as_leaves(state)
    assert any(x.requires_grad for x in tensors(grown).values())
    assert not any(x.requires_grad for x in tensors(grown.detach()).values())
    copies = {"dual": 1, "origin": 1, "slots": case.rule.algorithm.slots, "pending": case.rule.step_at == "chunk"}
    entries = sum(copies.values()) * sum(a.numel() for a in state.dual.values())
    entries += sum(x.numel() for x in state.recent.values())
    entries += state.pending["log_alpha"].numel() if state.pending else 0
    assert state.nbytes == 8 * entries + 8 * 2
    assert all(value == value for value in state.health().values())


# -- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [p for parts in AXES.values() for p in parts], ids=str)
def test_parts_survive_their_configuration(part):
    axis = next(a for a in AXES if isinstance(part, a))
    again = from_config(axis, json.loads(json.dumps(to_config(part))))
    assert again == part and hash(again) == hash(part) and str(again) == str(part)


@pytest.mark.parametrize(
    "mixer",
    [*(c.rule for c in RULES), miras.Attention(), miras.Attention(window=7, rope=False)],
    ids=lambda mixer: str(mixer).partition(" at 0x")[0],  # of a function; workers must agree on names
)
def test_mixers_survive_their_configuration(mixer):
    again = mixer_from_config(json.loads(json.dumps(mixer.to_config())))
    assert again == mixer and again.fingerprint == mixer.fingerprint
    assert mixer.describe().keys() >= {"memory", "bias", "retention", "algorithm", "update"}


def test_different_mixers_have_different_fingerprints():
    mixers = {c.rule for c in RULES} | {variants.variant(name) for name in variants.VARIANTS}
    assert len({m.fingerprint for m in mixers}) == len(mixers)


def test_every_mixer_is_registered():
    assert set(choices(Mixer)) == {"Rule", "Attention"}
