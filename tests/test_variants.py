"""Every named model against implementations of it that do not know the library (`oracles/`)."""

import dataclasses
import inspect
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, assert_same_states, call, draw_memory, draw_tokens, own
from oracles.table import LOOPS, ORACLES
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import miras
from miras import variants
from miras.errors import UsageError
from miras.lab import probe

TIME, D = 21, 4


def assert_is(oracle, rule, tokens, weights, slow, tolerance, engines=("auto",)):
    """The rule's outputs, memory and outer gradients with respect to all it is given are the oracle's."""
    inputs, cotangents = {**tokens.named(), **weights, **slow}, {}

    def by_rule(x, engine):
        gates, *start = ({n: x[n] for n in part} for part in (tokens.gates, weights, slow))
        state = rule.init(*start, batch=tokens.q.shape[0])
        y, state = miras.run(rule, x["q"], x["k"], x["v"], gates, state=state, engine=engine)
        return y, state.dual

    def results(function, **options):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        y, memory = function(leaves, **options)
        found = {"y": y} | {n: memory[n] for n in weights}
        total = sum((x * cotangents.setdefault(n, torch.randn_like(x))).sum() for n, x in found.items())
        grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
        return found | {f"grad of {n}": g for n, g in zip(leaves, grads, strict=True)}

    expected = results(oracle)
    for engine in engines:
        for n, got in results(by_rule, engine=engine).items():
            # Gradients through decay to zero are ill-conditioned: up to 1e4 in these problems.
            assert_same(got, expected[n], tolerance * (10 if n.startswith("grad") else 1), f"{engine} {n}")


# -- linear memories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_attention", "deltanet", "gated_deltanet"])
@pytest.mark.parametrize("d_v", [4, 7])
@pytest.mark.parametrize("time", [21, 75])
def test_linear_variants_are_their_published_equations(name, d_v, time):
    rule = variants.variant(name)
    weights = {"w": torch.randn(2, 2, d_v, 4).double()}  # from any state, not only from zero
    assert_is(ORACLES[name].call, rule, draw_tokens(rule, time=time, d_v=d_v), weights, {}, 1e-12)


def test_gated_deltanet_is_that_of_transformers():
    """Transformers' `torch_recurrent_gated_delta_rule` (Qwen3-Next). It divides queries by sqrt(d) and keeps its state
    as [B, H, d_k, d_v]. Keys and queries are of norm 1 already, so its own normalisation is off."""
    rule = variants.gated_deltanet()
    tokens = draw_tokens(rule, time=70, heads=4, d_k=16, d_v=8).map(torch.Tensor.float)
    ours, theirs = (tokens.map(lambda x: x.clone().requires_grad_()) for _ in range(2))
    start = torch.randn(2, 4, 8, 16).double().float()
    y, state = call(rule, ours._replace(q=ours.q / 4), rule.init({"w": start}))
    # Where fla is installed, transformers puts its kernel in the place of this function.
    y_theirs, state_theirs = inspect.unwrap(torch_recurrent_gated_delta_rule)(
        *theirs[:3],
        theirs.gates["log_alpha"][..., 0],
        theirs.gates["eta"][..., 0],
        initial_state=start.mT,
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
    )
    assert_same(y, y_theirs, 2e-6)
    assert_same(state.dual["w"], state_theirs.mT, 2e-6)
    cotangent = torch.randn_like(y)
    grads = (
        torch.autograd.grad(out, list(x.named().values()), cotangent) for out, x in ((y, ours), (y_theirs, theirs))
    )
    for name, got, expected in zip(ours.named(), *grads, strict=True):
        assert_same(got, expected, 1e-5, name)


# -- memories of two layers -------------------------------------------------------------------------------------------

DEEP = {
    ("yaad", False): ("yaad", "initial"),
    ("yaad", True): ("yaad_mixture", "zero"),
    ("moneta", False): ("moneta", "initial"),
    ("moneta", True): ("moneta_letter", "zero"),
    ("memora", False): ("memora", "initial"),
    ("memora", True): ("memora_letter", "zero"),
    ("titans", False): ("titans", "initial"),
    ("mneme", False): ("mneme", "initial"),
}


def ordinary_and_extreme(rule, tokens, weights, slow):
    """Values at all distances from what the memory expects at first: thresholds and clipping act on some tokens."""
    start = rule.link(weights, {}, rule.leaves(D, D))
    expected = rule.memory.read(start, tokens.k.transpose(1, 2), slow).transpose(1, 2)
    return tokens._replace(v=expected + tokens.v * torch.linspace(-2, 1, tokens.v.shape[1]).exp()[:, None, None])


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(
    ("name", "letter"), DEEP, ids=lambda x: x if isinstance(x, str) else "letter" if x else "default"
)
def test_deep_variants_are_their_published_equations(name, letter, chunk):
    rule = getattr(variants, name)(chunk=chunk, **({"letter": True} if letter else {}))
    loop, to = DEEP[name, letter]
    weights, slow = draw_memory(rule, d_k=D)
    tokens = ordinary_and_extreme(rule, draw_tokens(rule, time=TIME, d_k=D), weights, slow)
    oracle = partial(LOOPS[loop], chunk=chunk, to=to)
    assert_is(oracle, rule, tokens, weights, slow, 1e-10, engines=("auto", "recurrence"))


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora", "titans", "mneme"])
def test_a_fresh_memory_goes_a_part_of_the_way_to_what_it_reads(name):
    """With gates and sizes of values as a layer has them: a smaller eta or larger W1 would write next to nothing."""
    rule, heads, pairs, size = variants.variant(name), 64, 16, 32
    k, v = F.normalize(torch.randn(1, pairs, heads, size), dim=-1), torch.randn(1, pairs, heads, size)
    v = rule.inputs.value_size * v
    gates = {gate.name: torch.full((1, pairs, heads, 1), gate.init) for gate in rule.gates}
    start = rule.init(rule.initial(heads, size, size), rule.initial_slow(heads, size, size))
    _, state = miras.run(rule, k, k, v, gates, start)
    before, after = (probe(rule, state, k.transpose(1, 2)).transpose(1, 2) for state in (start, state))
    way = v - before
    assert rule.inputs.value == "normed"
    assert 0.08 < ((after - before) * way).sum() / way.square().sum() < 0.3


# -- attention --------------------------------------------------------------------------------------------------------


ATTENTION = [(variants.transformer(), None), (variants.sliding_window(5), 5), (variants.sliding_window(1), 1)]
attention = pytest.mark.parametrize(("mixer", "window"), ATTENTION, ids=["transformer", "window 5", "window 1"])


def attended(tokens, window, row, lo, hi):
    """One row's sequence by PyTorch and transformers."""
    return ORACLES["transformer"].call({n: x[row : row + 1, lo:hi] for n, x in tokens.named().items()}, window)[0][0]


@attention
@pytest.mark.parametrize("cuts", [(0, 13), (0, 1, 13), (0, 6, 7, 11, 13), tuple(range(14))], ids=str)
def test_attention_is_an_explicit_softmax_at_any_cut(mixer, window, cuts):
    tokens, state, parts = draw_tokens(mixer, d_v=6), None, []
    for lo, hi in itertools.pairwise(cuts):
        y, state = call(mixer, tokens.part(lo, hi), state)
        parts.append(y)
    y = torch.cat(parts, 1)
    assert state.position.tolist() == [13, 13]
    assert state.k.shape[1] == (13 if window is None else min(13, window - 1))
    for row in range(2):
        assert_same(y[row], attended(tokens, window, row, 0, 13), 1e-12)


@attention
def test_attention_does_not_see_padding(mixer, window):
    spans = ((0, 13), (5, 13), (0, 4), (3, 11))
    tokens = draw_tokens(mixer, batch=4, time=13)
    more = draw_tokens(mixer, batch=4, time=6)
    mask = torch.tensor([[lo <= t < hi for t in range(13)] for lo, hi in spans])
    y, state = call(mixer, tokens, mask=mask)
    y_more, after = call(mixer, more, state)
    for row, (lo, hi) in enumerate(spans):
        assert_same(y[row, lo:hi], attended(tokens, window, row, lo, hi), 1e-12)
        assert not y[row, :lo].any() and not y[row, hi:].any()
        whole = tokens._replace(**{n: torch.cat([getattr(tokens, n)[:, lo:hi], getattr(more, n)], 1) for n in "qkv"})
        assert_same(y_more[row], attended(whole, window, row, 0, hi - lo + 6)[hi - lo :], 1e-12)
    assert after.position.tolist() == [hi - lo + 6 for lo, hi in spans]


@attention
def test_attention_does_not_see_other_sequences_of_a_pack(mixer, window):
    cuts, state = [0, 3, 4, 12, 19], None
    seen = [[] for _ in cuts[1:]]
    for _ in range(2):  # the second pack goes on from the first
        tokens = draw_tokens(mixer, batch=1, time=19)
        y, state = call(mixer, tokens, state, cu_seqlens=torch.tensor(cuts))
        for n, (lo, hi) in enumerate(itertools.pairwise(cuts)):
            seen[n].append(tokens.part(lo, hi))
            whole = tokens._replace(**{x: torch.cat([getattr(part, x) for part in seen[n]], 1) for x in "qkv"})
            assert_same(y[0, lo:hi], attended(whole, window, 0, 0, whole.q.shape[1])[lo - hi :], 1e-12)


@attention
def test_attention_serves_groups_of_heads_and_keeps_rows_apart(mixer, window):
    tokens = draw_tokens(mixer, heads=4)
    y, state = call(mixer, tokens)
    y_swapped, swapped = call(mixer, tokens.map(lambda x: x.flip(0)))
    assert_same(y_swapped, y.flip(0), 1e-14)
    assert_same_states(swapped, state.index_select(torch.tensor([1, 0])), 1e-14)
    ill = tokens.map(lambda x: torch.cat([x[:1], torch.full_like(x[1:], torch.nan)]))
    assert_same(call(mixer, ill)[0][:1], y[:1], 1e-14)
    assert own(state)


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_is_made_by_its_name_and_takes_its_chunk(name):
    mixer = variants.variant(name, chunk=5)
    plain = variants.variant(name)
    has_chunk = "chunk" in inspect.signature(variants.VARIANTS[name].make).parameters
    assert mixer == (dataclasses.replace(plain, chunk=5) if has_chunk else plain)
    assert variants.VARIANTS[name].make.__doc__ and variants.VARIANTS[name].paper.startswith(("arXiv", "this library"))


def test_a_hybrid_repeats_its_pattern_over_the_layers():
    yaad, window = variants.yaad(chunk=8), variants.sliding_window()
    assert variants.pattern("yaad, sliding_window", 5, chunk=8) == (yaad, window, yaad, window, yaad)
    assert variants.pattern("memora", 2) == (variants.memora(),) * 2


@pytest.mark.parametrize(
    ("name", "near"), [("yad", "'yaad'"), ("gateddeltanet", "'gated_deltanet'"), ("xyz", "moneta, yaad")]
)
def test_an_unknown_variant_is_refused_with_the_near_ones(name, near):
    with pytest.raises(UsageError, match=near):
        variants.variant(name)
    with pytest.raises(UsageError, match=near):
        variants.pattern(f"yaad,{name}", 2)
