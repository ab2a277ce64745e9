"""Every named model against its published equations, written out here without the library."""

import dataclasses
import itertools
import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from cases import assert_same, assert_same_states, call, draw_memory, draw_tokens, own
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import miras
from miras import variants
from miras.errors import UsageError

TIME, D = 21, 4


def numpy_of(tree):
    """One row and head of tensors [B, T, H, n] or [H, ...] as float64 arrays."""
    return {n: x.detach().numpy() for n, x in tree.items()}


def rows_and_heads(tokens):
    batch, _, heads, _ = tokens.v.shape
    for b in range(batch):
        for h in range(heads):
            yield b, h, {n: x[b, :, h].detach().numpy() for n, x in tokens.named().items()}


def directional(rule, loop, tokens, weights, slow, tolerance=1e-6):
    """Outer gradients against central differences of an independent loop, along one random direction."""
    inputs = {**tokens.named(), **weights, **slow}
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    gates = {n: leaves[n] for n in tokens.gates}
    start = rule.init({n: leaves[n] for n in weights}, {n: leaves[n] for n in slow}, batch=1)
    y, _ = miras.run(rule, leaves["q"], leaves["k"], leaves["v"], gates, state=start)
    cotangent, step = torch.randn_like(y), 1e-6
    direction = {n: torch.randn_like(x) for n, x in inputs.items()}
    grads = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()), materialize_grads=True, allow_unused=True)
    got = sum((g * direction[n]).sum() for n, g in zip(leaves, grads, strict=True)).item()

    def value(sign):
        moved = {n: x + sign * step * direction[n] for n, x in inputs.items()}
        arrays = {n: x[0, :, 0].numpy() for n, x in moved.items() if n not in weights and n not in slow}
        outputs, _ = loop(arrays, {n: moved[n][0].numpy() for n in (*weights, *slow)})
        return (outputs * cotangent[0, :, 0].numpy()).sum()

    expected = (value(1) - value(-1)) / (2 * step)
    assert abs(got - expected) <= tolerance * max(1.0, abs(expected))


# -- linear memories --------------------------------------------------------------------------------------------------


def delta_rule(x, memory):
    """M_t = alpha_t M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T, y_t = M_t q_t (arXiv 2406.06484, 2412.06464)."""
    m, outputs = memory["w"], []
    for t in range(len(x["v"])):
        k, eta = x["k"][t], x["eta"][t]
        alpha = np.exp(x["log_alpha"][t]) if "log_alpha" in x else 1.0
        m = alpha * m @ (np.eye(len(k)) - eta * np.outer(k, k)) + eta * np.outer(x["v"][t], k)
        outputs.append(m @ x["q"][t])
    return np.stack(outputs), m


def hebbian(x, memory):
    """y_t = sum_{s <= t} eta_s v_s (k_s . q_t)."""
    m = memory["w"] + np.cumsum(x["eta"][:, :, None] * x["v"][:, :, None] * x["k"][:, None, :], 0)
    return np.einsum("toi,ti->to", m, x["q"]), m[-1]


@pytest.mark.parametrize(
    ("name", "loop"), [("linear_attention", hebbian), ("deltanet", delta_rule), ("gated_deltanet", delta_rule)]
)
@pytest.mark.parametrize("d_v", [4, 7])
@pytest.mark.parametrize("time", [21, 75])
def test_linear_variants_are_their_published_equations(name, loop, d_v, time):
    rule = variants.variant(name)
    tokens = draw_tokens(rule, time=time, d_v=d_v)
    weights = {"w": torch.randn(2, 2, d_v, 4).double()}  # from any state, not only from zero
    y, state = call(rule, tokens, rule.init(weights))
    for b, h, x in rows_and_heads(tokens):
        expected, last = loop(x, {"w": weights["w"][b, h].numpy()})
        assert_same(y[b, :, h], torch.from_numpy(expected), 1e-12)
        assert_same(state.dual["w"][b, h], torch.from_numpy(last), 1e-12)
    one = draw_tokens(rule, batch=1, heads=1, d_v=d_v)
    directional(rule, loop, one, {"w": torch.randn(1, d_v, 4).double()}, {})


def test_gated_deltanet_is_that_of_transformers():
    """Transformers' `torch_recurrent_gated_delta_rule` (Qwen3-Next). It divides queries by sqrt(d) and keeps its state
    as [B, H, d_k, d_v]. Keys and queries are of norm 1 already, so its own normalisation is off."""
    rule = variants.gated_deltanet()
    tokens = draw_tokens(rule, time=70, heads=4, d_k=16, d_v=8).map(torch.Tensor.float)
    ours, theirs = (tokens.map(lambda x: x.clone().requires_grad_()) for _ in range(2))
    start = torch.randn(2, 4, 8, 16).double().float()
    y, state = call(rule, ours._replace(q=ours.q / 4), rule.init({"w": start}))
    y_theirs, state_theirs = torch_recurrent_gated_delta_rule(
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

SQRT_2 = math.sqrt(2)
erf = np.vectorize(math.erf)


def gelu(a):
    return 0.5 * a * (1 + erf(a / SQRT_2))


def gelu_slope(a):
    return 0.5 * (1 + erf(a / SQRT_2)) + a * np.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def forward(w, slow, x):
    """x + LN(W1 gelu(W2 x)), and what the gradient needs."""
    a = w["w2"] @ x
    z = w["w1"] @ gelu(a)
    std = np.sqrt(z.var() + 1e-5)
    n = (z - z.mean()) / std
    return x + n * slow["norm_scale"] + slow["norm_shift"], a, n, std


def gradients(w, slow, x, surprise):
    """Gradients of L(M(W, x)) by the chain rule, `surprise` mapping the prediction to dL/dy."""
    y, a, n, std = forward(w, slow, x)
    dn = surprise(y) * slow["norm_scale"]
    dz = (dn - dn.mean() - n * (dn * n).mean()) / std
    return {"w1": np.outer(dz, gelu(a)), "w2": np.outer((w["w1"].T @ dz) * gelu_slope(a), x)}


def l2(r, delta):
    return r


def clipped_l3(r, delta):
    u = 3 * r * np.sqrt(r * r + 1e-6)
    return u * min(1.0, math.sqrt(len(r)) / np.linalg.norm(u))


def huber(r, delta):
    return np.clip(r, -delta, delta)


def mixture(r, delta):
    return r if math.sqrt((r * r).mean()) <= delta else delta * r / np.sqrt(r * r + 1e-6)


class Identity:
    """W = A."""

    # One over the power of the input: h hidden units, keys of norm 1.
    rates = MappingProxyType({"w1": 1 / (4 * D), "w2": 1.0})

    def link(self, name, a):
        return a

    def chunked(self, name, origin, a):
        return a


class L4(Identity):
    """W = A / (mean (A / s)^4)^(1/2), s = 3^(1/4) std of the initial entries."""

    def factor(self, name, a):
        s = 3**0.25 * (1.0 if name == "w2" else 1 / math.sqrt(4 * D))
        return 1 / np.sqrt(((a / s) ** 4).mean() + 1e-6)

    def link(self, name, a):
        return a * self.factor(name, a)

    def chunked(self, name, origin, a):
        return self.link(name, origin) + self.factor(name, origin) * (a - origin)


class Simplex:
    """W = c softmax(A) along the hidden units: W1's columns with c = sqrt(h), W2's rows with c = h."""

    # One over the power of the input and the slope c / h.
    rates = MappingProxyType({"w1": 1 / (4 * D) * math.sqrt(4 * D), "w2": 1.0})
    axis = MappingProxyType({"w1": 1, "w2": 0})
    mass = MappingProxyType({"w1": math.sqrt(4 * D), "w2": 4.0 * D})

    def link(self, name, a):
        e = np.exp(a - a.max(self.axis[name], keepdims=True))
        return self.mass[name] * e / e.sum(self.axis[name], keepdims=True)

    def chunked(self, name, origin, a):
        def centre(x):
            return x - x.mean(self.axis[name], keepdims=True)

        o, w, size = centre(origin), self.link(name, origin), 4 * D
        along = (o * w).mean(self.axis[name], keepdims=True) + 1e-6 * self.mass[name] / size
        slope = along / ((o * o).mean(self.axis[name], keepdims=True) + 1e-6)
        return w + slope * centre(a - origin)


def deep_loop(loss, gate, to, chunk):
    """A token loop of arXiv 2504.13173 eq. 24, 26, 27 and of Titans, gradients at the weights of the chunk's start."""

    def loop(x, memory):
        a = {n: memory[n] for n in ("w1", "w2")}
        home = a if to == "initial" else {n: 0 * m for n, m in a.items()}
        surprise, origin, outputs = {n: 0 * m for n, m in a.items()}, a, []
        for t in range(len(x["v"])):
            alpha, eta = np.exp(x["log_alpha"][t]), x["eta"][t]
            delta, theta = x.get("delta", x["eta"])[t], x["theta"][t] if "theta" in x else 0.0
            start = {n: gate.link(n, o) for n, o in origin.items()}
            grad = gradients(start, memory, x["k"][t], lambda y, t=t, delta=delta: loss(y - x["v"][t], delta))
            surprise = {n: theta * surprise[n] + eta * gate.rates[n] * grad[n] for n in a}
            a = {n: home[n] + alpha * (a[n] - home[n]) - surprise[n] for n in a}
            w = {n: gate.link(n, a[n]) if chunk == 1 else gate.chunked(n, origin[n], a[n]) for n in a}
            outputs.append(forward(w, memory, x["q"][t])[0])
            if (t + 1) % chunk == 0:
                origin = a
        return np.stack(outputs), {n: a[n] - home[n] for n in a}

    return loop


DEEP = {
    ("yaad", False): (huber, Identity(), "initial"),
    ("yaad", True): (mixture, Identity(), "zero"),
    ("moneta", False): (clipped_l3, L4(), "initial"),
    ("moneta", True): (clipped_l3, L4(), "zero"),
    ("memora", False): (l2, Simplex(), "initial"),
    ("memora", True): (l2, Simplex(), "zero"),
    ("titans", False): (l2, Identity(), "initial"),
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
    loop = deep_loop(*DEEP[name, letter], chunk)
    weights, slow = draw_memory(rule, d_k=D)
    tokens = ordinary_and_extreme(rule, draw_tokens(rule, time=TIME, d_k=D), weights, slow)
    for engine in ("auto", "recurrence"):
        y, state = call(rule, tokens, rule.init(weights, slow, batch=2), engine=engine)
        for b, h, x in rows_and_heads(tokens):
            expected, last = loop(x, {n: w[h].numpy() for n, w in (weights | slow).items()})
            assert_same(y[b, :, h], torch.from_numpy(expected), 1e-10)
            for n, a in last.items():
                assert_same(state.dual[n][b, h], torch.from_numpy(a), 1e-10, n)
    one = draw_tokens(rule, batch=1, heads=1, time=8, d_k=D)
    directional(rule, loop, one, *draw_memory(rule, heads=1, d_k=D))


# -- attention --------------------------------------------------------------------------------------------------------


def softmax_attention(q, k, v, window=None):
    """Rotated by exp(i position / 10000^(2 j / d)) as complex numbers, then a softmax over the visible tokens."""
    time, d = q.shape
    turn = np.exp(1j * np.arange(time)[:, None] * 10000.0 ** (-2 * np.arange(d // 2) / d))
    q, k = ((x[:, : d // 2] + 1j * x[:, d // 2 :]) * turn for x in (q, k))
    scores = (q @ k.conj().T).real / math.sqrt(d)
    distance = np.arange(time)[:, None] - np.arange(time)
    visible = (distance >= 0) & (distance < (window or time))
    p = np.where(visible, np.exp(scores - scores.max()), 0)
    return p / p.sum(1, keepdims=True) @ v


ATTENTION = [(variants.transformer(), None), (variants.sliding_window(5), 5), (variants.sliding_window(1), 1)]
attention = pytest.mark.parametrize(("mixer", "window"), ATTENTION, ids=["transformer", "window 5", "window 1"])


def attended(tokens, window, row, lo, hi):
    heads = tokens.v.shape[2]
    parts = [softmax_attention(*(x[row, lo:hi, h].numpy() for x in tokens[:3]), window) for h in range(heads)]
    return torch.from_numpy(np.stack(parts, 1))


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
    has_chunk = name in ("moneta", "yaad", "memora", "titans")
    assert mixer == (dataclasses.replace(plain, chunk=5) if has_chunk else plain)
    assert variants.VARIANTS[name].make.__doc__ and variants.VARIANTS[name].paper.startswith("arXiv")


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
