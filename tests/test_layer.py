"""MirasLayer: any cut, padding and packing = whole; what states and gates promise; no idle parameter; bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import miras
from miras import variants
from miras.algorithm import GradientDescent, Momentum
from miras.attention import Attention
from miras.bias import L1, Huber
from miras.errors import UsageError
from miras.inputs import Inputs
from miras.layer import LayerState, MirasLayer
from miras.layout import layout
from miras.memory import MLP, Vector
from miras.pointwise import BLOCK, GatedNorm, ShortConv
from miras.retention import KL, L2
from miras.sources import SHORTEST, SLOW_DECAY, GateConstant, GateMaker
from miras.state import tensors

DIM, HEADS, CHUNK, LENGTH = 32, 2, 4, 13
RULES = {name: variants.variant(name, CHUNK) for name in variants.VARIANTS if name != "sliding_window"}
RULES["window"] = variants.sliding_window(5)
# A soft sign: with the sharp one of L1() inputs 1e-15 apart give outputs 1e-7 apart, in the definition
# itself, so that no two ways of evaluating it agree to 1e-9.
RULES["user-made"] = miras.Rule(
    MLP(layers=3), L1(form="paper", sharpness=2.0), KL(), Momentum(rate="input"), chunk=CHUNK
)

every_rule = pytest.mark.parametrize("name", RULES)
CHANNEL = ("moneta", "yaad", "memora", "titans", "gated_deltanet", "user-made")

every_layer = pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in RULES),
        *(
            (name, {"gates": "channel"})
            for name in ("moneta", "yaad", "memora", "titans", "gated_deltanet", "user-made")
        ),
        *((name, {"rope": True}) for name in ("yaad", "deltanet")),
        ("yaad", {"conv": 0}),
        ("yaad", {"gates": "channel", "rope": True, "conv": 2, "head_dim": 8}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "plain",
)


def make(name: str, **options) -> MirasLayer:
    """A small layer in float64, far enough from its initialisation that every part acts."""
    torch.manual_seed(0)
    layer = MirasLayer(DIM, HEADS, RULES[name], **{"context": 32, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def draw(rows: int = 2, length: int = LENGTH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, length, DIM, dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def assert_same_states(got: LayerState, expected: LayerState) -> None:
    left, right = tensors(got), tensors(expected)
    assert left.keys() == right.keys()
    for name, x in right.items():
        assert_same(left[name], x, name)


def read(layer: MirasLayer, x: Tensor, cuts: tuple[int, ...] = ()) -> tuple[Tensor, LayerState]:
    """Outputs and state after several calls that go on from each other."""
    state, y = None, []
    for start, stop in itertools.pairwise((0, *cuts, x.shape[1])):
        part, state = layer(x[:, start:stop], state)
        y.append(part)
    assert state is not None
    return torch.cat(y, 1), state


# -- one sequence, however it comes ------------------------------------------------------------------------------------


@every_layer
def test_any_cut_gives_the_outputs_and_the_state_of_the_whole(name, options):
    layer, x = make(name, **options), draw()
    y, state = read(layer, x)
    for cuts in ((1,), (4, 8), (3, 5, 12), tuple(range(1, LENGTH))):
        y_cut, state_cut = read(layer, x, cuts)
        assert_same(y_cut, y, f"cut at {cuts}")
        assert_same_states(state_cut, state)
    assert state.position.tolist() == [LENGTH] * 2


@every_layer
def test_the_token_loop_gives_what_the_chosen_engine_gives(name, options):
    layer, x = make(name, **options), draw()
    y, state = layer(x)
    y_loop, state_loop = layer(x, engine="recurrence")
    assert_same(y_loop, y)
    assert_same_states(state_loop, state)


@every_layer
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_one_by_one(name, options, side):
    layer, lengths = make(name, **options), (3, 13, 1, 4)
    x, mask = draw(4), torch.zeros(4, LENGTH, dtype=torch.bool)
    places = [slice(LENGTH - n, None) if side == "left" else slice(n) for n in lengths]
    for row, place in enumerate(places):
        mask[row, place] = True
    # What stands in the padding is never looked at.
    dirty = torch.where(mask[..., None], x, torch.nan)
    y, state = layer(dirty, mask=mask)
    step = draw(4, 2)
    after, _ = layer(step, state)
    for row, place in enumerate(places):
        alone, state_alone = layer(x[row : row + 1, place])
        assert_same(y[row, place], alone[0], f"row {row}")
        assert_same(after[row], layer(step[row : row + 1], state_alone)[0][0], f"row {row}, going on")
    assert state.position.tolist() == list(lengths)


@every_layer
def test_a_pack_is_its_sequences_one_by_one(name, options):
    layer, lengths = make(name, **options), (3, 13, 1, 4)
    parts = [draw(1, n) + n for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, state = layer(torch.cat(parts, 1), cu_seqlens=cu_seqlens)
    step = draw(1, 4)
    after, _ = layer(step, state, cu_seqlens=torch.arange(5))
    for n, (part, got) in enumerate(zip(parts, y.split(lengths, 1), strict=True)):
        alone, state_alone = layer(part)
        assert_same(got, alone, f"sequence {n}")
        assert_same(after[:, n], layer(step[:, n : n + 1], state_alone)[0][:, 0], f"sequence {n}, going on")


@every_rule
def test_outputs_depend_on_no_later_token_and_on_no_other_row(name):
    layer, x = make(name), draw()
    other = x.clone()
    other[1] = torch.nan
    other[0, 7:] = -other[0, 7:]
    before, after = layer(x)[0], layer(other)[0]
    assert_same(after[0, :7], before[0, :7])
    assert not torch.allclose(after[0, 7:], before[0, 7:])


def test_rope_turns_keys_by_their_place_in_the_sequence_and_only_where_asked():
    # Without a convolution and with nothing forgotten, linear attention does not see how far apart tokens are.
    x = draw(1, 4)
    apart = torch.cat([x[:, :1], torch.zeros(1, 3, DIM).double(), x[:, 1:]], 1)
    for rope in (False, True):
        layer = make("linear_attention", conv=0, rope=rope)
        near, far = layer(x)[0][:, 1:], layer(apart)[0][:, 4:]
        assert torch.allclose(near, far) is not rope


@pytest.mark.parametrize("name", ["yaad", "memora", "gated_deltanet"])
def test_gates_act(name):
    # A gate whose weights are changed changes the output: none is computed for nothing.
    for kind in ("head", "channel"):
        layer, x = make(name, gates=kind), draw()
        y = layer(x)[0]
        for gate, maker in layer.gates.items():
            assert maker(x).shape == (2, LENGTH, HEADS, 1 if kind == "head" else DIM // HEADS), gate
            with torch.no_grad():
                maker.bias.add_(0.5)
            changed = layer(x)[0]
            assert not torch.allclose(changed, y), f"{kind} gate {gate}"
            y = changed


# -- states ------------------------------------------------------------------------------------------------------------


@every_rule
def test_rows_of_a_state_can_be_selected_and_forked(name):
    layer, x = make(name), draw(3)
    step = draw(1, 3)
    _, state = layer(x)
    index = torch.tensor([2, 0, 2])
    expected, _ = layer(step.expand(3, -1, -1), state)
    assert_same(layer(step.expand(3, -1, -1), state.index_select(index))[0], expected[index])
    assert_same(layer(step.expand(6, -1, -1), state.fork(2))[0], expected.repeat_interleave(2, 0))


@every_rule
def test_detach_cuts_the_gradient_to_everything_before(name):
    layer, x = make(name), draw().requires_grad_()
    _, state = layer(x)
    assert any(t.requires_grad for t in tensors(state).values())
    cut = state.detach()
    assert not any(t.requires_grad for t in tensors(cut).values())
    assert_same_states(cut, state)
    layer(draw(2, 2), cut)[0].sum().backward()
    assert x.grad is None


@every_rule
def test_a_state_is_neither_changed_by_going_on_nor_shared_with_its_copy(name):
    layer, x = make(name), draw()
    with torch.no_grad():
        _, state = layer(x)
        before = {n: t.clone() for n, t in tensors(state).items()}
        copy = state.clone()
        layer(draw(2, 3), state)
        for n, t in tensors(state).items():
            assert torch.equal(t, before[n]), n
        shared = {f"mixer.{n}" for n in state.mixer.shared}
        for n, t in tensors(copy).items():
            of_rows = n.rsplit(".", 1)[0] not in shared
            if of_rows and t.numel():
                assert t.data_ptr() != tensors(state)[n].data_ptr(), n
                t.zero_()
        for n, t in tensors(state).items():
            assert torch.equal(t, before[n]), n


@pytest.mark.parametrize("name", ["yaad", "titans", "deltanet"])
def test_a_fresh_state_does_not_share_its_tensors_between_rows_or_with_parameters(name):
    layer = make(name)
    with torch.no_grad():
        state = layer.init(2, draw())
        parameters = {n: p.clone() for n, p in layer.named_parameters()}
        copy = state.clone()
        for x in (*copy.dual.values(), *copy.origin.values()):
            x[0].add_(1.0)
    for n, p in layer.named_parameters():
        assert torch.equal(p, parameters[n]), n
    for n, x in copy.dual.items():
        assert torch.equal(x[1], state.dual[n][1]), n


@every_rule
def test_to_moves_every_tensor_of_a_state(name):
    _, state = make(name)(draw())
    moved = state.to("meta")
    assert {t.device.type for t in tensors(moved).values()} == {"meta"}
    assert {t.device.type for t in tensors(state).values()} == {"cpu"}


@every_rule
def test_health_names_the_size_of_every_part_and_shows_where_a_state_broke(name):
    layer, x = make(name), draw()
    _, state = layer(x)
    health = state.health()
    for n, size in health.items():
        assert size == pytest.approx(tensors(state)[n].float().square().mean().sqrt().item(), rel=1e-5), n
    assert any(n.startswith("mixer.") and size > 0 for n, size in health.items())
    x[0, -1] = torch.nan
    assert any(torch.tensor(size).isnan() for size in layer(x)[1].health().values())


def test_a_state_of_the_convolution_holds_the_last_inputs():
    layer, x = make("yaad"), draw()
    _, state = layer(x)
    assert_same(state.conv, layer.qkv(x)[:, -3:])
    assert make("yaad", conv=0)(x)[1].conv is None


def test_the_bytes_of_a_state_are_those_it_announces():
    layer = MirasLayer(DIM, HEADS, RULES["yaad"])
    _, state = layer(draw().float())
    per_row = RULES["yaad"].state_bytes(HEADS, DIM // HEADS, DIM // HEADS, LENGTH)
    assert state.mixer.nbytes == 2 * (per_row + 8)  # and the offset, an int64


# -- gates and initial values ------------------------------------------------------------------------------------------


def start_of(layer: MirasLayer, name: str) -> Tensor:
    """Mean of a fresh layer's gate over tokens, [heads, channels]."""
    return layer.gates[name](torch.zeros(1, 1, DIM))[0, 0].detach()


def test_huber_says_where_its_threshold_starts():
    layer = MirasLayer(DIM, HEADS, replace(RULES["yaad"], bias=miras.bias.Huber(delta=0.3)))
    torch.testing.assert_close(start_of(layer, "delta"), torch.full((HEADS, 1), 0.3))


@pytest.mark.parametrize("kind", ["head", "channel"])
@every_rule
def test_gates_start_at_their_initial_values(name, kind):
    rule = RULES[name]
    layer = MirasLayer(DIM, HEADS, rule, gates=kind)
    given = {} if isinstance(rule, miras.Attention) else {"eta": rule.inputs.eta, "log_alpha": rule.inputs.alpha}
    own = ("layer", "head", "channel")
    learned = [g for g in rule.gates if not g.vector and g.name != "rho" and given.get(g.name, "layer") in own]
    assert {n for n, made in layer.gates.items() if isinstance(made, GateMaker)} == {gate.name for gate in learned}
    for gate in learned:
        if not gate.name.startswith("log_"):
            torch.testing.assert_close(
                start_of(layer, gate.name), torch.full_like(start_of(layer, gate.name), gate.init)
            )
    # Tokens move them, but little.
    x = torch.randn(1, 50, DIM)
    for gate in learned:
        spread = layer.gates[gate.name](x).std(1)
        assert 0 < spread.max() < 0.25 * abs(start_of(layer, gate.name)).max(), gate.name


def given(name: str, **options) -> dict[str, Tensor]:
    """What a layer feeds its rule for three tokens."""
    layer = MirasLayer(DIM, 4, variants.variant(name), **options)
    x, q, k = torch.randn(1, 3, DIM), torch.randn(1, 3, 4, DIM // 4), torch.randn(1, 3, 4, DIM // 4)
    q_read, k_read, gates = layer.gates(x, q, k if layer.keys else None, torch.tensor([[15, 16, 17]]))
    return {"q": q, "k": k, "q_read": q_read, "k_read": k_read, **gates}


def test_a_constant_delta_is_learned_and_the_same_for_all_tokens():
    rule = replace(variants.yaad(), inputs=Inputs(delta="constant"))
    layer = MirasLayer(DIM, HEADS, rule, gates="channel")
    y, _ = layer(torch.randn(2, 9, DIM))
    y.square().sum().backward()
    made = layer.gates["delta"]
    assert isinstance(made, GateConstant) and [p.shape for p in made.parameters()] == [(HEADS, 1)]
    assert made.bias.grad is not None and made.bias.grad.abs().min() > 0
    torch.testing.assert_close(made(torch.randn(2, 9, DIM)), torch.ones(2, 9, HEADS, 1))
    with pytest.raises(UsageError, match="delta must be one of layer, constant"):
        Inputs(delta="fixed")


@pytest.mark.parametrize("options", [{}, {"conv": 0}], ids=str)
def test_values_may_have_the_size_of_what_a_layer_norm_gives(monkeypatch, options):
    sizes = []

    def run(rule, q, k, v, *rest, **more):
        sizes.append(v.square().mean(-1))
        return miras.run(rule, q, k, v, *rest, **more)

    monkeypatch.setattr("miras.layer.run", run)
    for inputs in (Inputs(value="normed"), Inputs(value="normed", value_size=0.5), Inputs(value="own")):
        rule = replace(variants.yaad(), inputs=inputs)
        MirasLayer(DIM, HEADS, rule, **options)(torch.randn(2, 9, DIM))
    torch.testing.assert_close(sizes[0], torch.ones(2, 9, HEADS))
    torch.testing.assert_close(sizes[1], torch.full((2, 9, HEADS), 0.25))
    assert sizes[2].std() > 0.01


@pytest.mark.parametrize(
    "given", [{"value_size": 0.5}, *({"value": "normed", "value_size": size} for size in (0.0, torch.nan))], ids=str
)
def test_a_size_is_of_normed_values_and_more_than_zero(given):
    with pytest.raises(UsageError, match="value_size must be a number more than 0, and 1 unless value='normed'"):
        Inputs(**given)


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_the_letter_leaves_values_as_they_are(name):
    preset = getattr(variants, name)
    assert (preset().inputs.value, preset(letter=True).inputs.value) == ("normed", "own")


def test_models_with_gates_of_their_own_get_them():
    one = torch.ones(1, 3, 4, 1)
    retnet = given("retnet")
    assert torch.equal(retnet["eta"], one)
    torch.testing.assert_close(retnet["log_alpha"].exp()[0, 0, :, 0], 1 - 2.0 ** -torch.arange(5.0, 9.0))
    torch.testing.assert_close(given("lightning")["log_alpha"][0, 0, :, 0], -2 * torch.arange(4.0))
    mamba = given("mamba2")
    rate = -mamba["log_alpha"] / mamba["eta"]
    torch.testing.assert_close(rate, torch.tensor([1.0, 6.0, 11.0, 16.0])[:, None].expand_as(rate))
    hgrn = given("hgrn2")
    torch.testing.assert_close(hgrn["k_read"], 1 - hgrn["log_alpha"].exp(), rtol=1e-4, atol=1e-6)
    assert given("kda", gates="head")["log_alpha"].shape[-1] == DIM // 4 and given("kda")["eta"].shape[-1] == 1
    ttt = given("ttt_linear")
    torch.testing.assert_close(ttt["rho"][0, :, 0, 0], torch.tensor([1 / 16, 1.0, 1 / 2]))
    rwkv = given("rwkv7")
    torch.testing.assert_close(rwkv["erase"], F.normalize(rwkv["k"], dim=-1))
    torch.testing.assert_close(rwkv["along"], rwkv["erase"] / 2, rtol=0.1, atol=0.05)
    comba = given("comba")
    torch.testing.assert_close(comba["erase"], torch.sigmoid(torch.tensor(3.0)) * comba["k"])
    assert torch.equal(comba["q_read"], comba["q"]), "the correction is learned from none"
    assert torch.equal(given("lact")["log_alpha"], torch.zeros(1, 3, 4, 1))


@pytest.mark.parametrize("context", [64, 2048, 8192])
@pytest.mark.parametrize("name", ["moneta", "yaad", "memora", "titans", "gated_deltanet"])
def test_time_constants_of_retention_spread_evenly_in_their_logarithm_up_to_the_context(name, context):
    layer = MirasLayer(DIM, 4, RULES[name], context=context)
    constants = -1 / start_of(layer, "log_alpha")[:, 0]
    expected = torch.logspace(torch.tensor(SHORTEST).log2(), torch.tensor(float(context)).log2(), 4, base=2.0)
    torch.testing.assert_close(constants, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_a_normalised_memory_that_decays_to_zero_starts_with_hardly_any_decay(name):
    layer = MirasLayer(DIM, 4, getattr(variants, name)(letter=True))
    torch.testing.assert_close(start_of(layer, "log_alpha"), torch.full((4, 1), SLOW_DECAY), rtol=1e-4, atol=0)


def test_the_initial_memory_gives_preactivations_of_order_one():
    layer = MirasLayer(256, 4, variants.yaad())
    assert layer.memory["w2"].std().item() == pytest.approx(1.0, rel=0.05)
    assert layer.memory["w1"].std().item() == pytest.approx(1 / 16, rel=0.05)
    key = F.normalize(torch.randn(4, 64, 1), dim=1)
    assert (layer.memory["w2"] @ key).std().item() == pytest.approx(1.0, rel=0.15)
    assert not torch.equal(layer.memory["w2"][0], layer.memory["w2"][1]), "heads start differently"


@every_layer
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name, options):
    torch.manual_seed(0)
    layer = MirasLayer(DIM, HEADS, RULES[name], **options)
    y, _ = layer(draw().float())
    (y * torch.randn_like(y)).sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


# -- the short convolution and the gated norm --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9, BLOCK + 2])
@pytest.mark.parametrize(("unit", "rest"), [(0, 0.0), (4, 0.0), (4, 1.5), (0, 1.5)])
def test_the_short_convolution_is_torchs_causal_depthwise_one(width, length, unit, rest):
    conv = ShortConv(6, width, unit, 2, rest).double()
    before, x = torch.randn(2, width - 1, 6).double(), torch.randn(2, length, 6).double()
    wrt = [t.requires_grad_() for t in (before, x, conv.weight)]
    past = torch.cat([before, x], 1)
    expected = F.silu(F.conv1d(past.mT, conv.weight.t()[:, None], groups=6).mT)
    heads = F.normalize(expected.unflatten(-1, (-1, 2)), dim=-1).flatten(-2)
    expected = torch.cat([heads[..., :unit], rest * heads[..., unit:] if rest else expected[..., unit:]], -1)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wrt, cotangent)
    # The other branch is that of padding and packs, with nothing to pad.
    for where in (layout(2, length), layout(2, length, mask=torch.ones(2, length).bool())):
        y, state = conv(x, before, where)
        assert_same(y, expected)
        assert_same(state, past[:, length:])
        for got, of in zip(torch.autograd.grad(y, wrt, cotangent), gradients, strict=True):
            assert_same(got, of)


def test_an_empty_head_has_a_gradient():
    """Below the least norm a head is divided by that one."""
    conv = ShortConv(2, 1, 2, 2).double()
    x = torch.full((1, 1, 2), 1e-8).double().requires_grad_()
    with torch.no_grad():
        conv.weight.fill_(1.0)
    y, _ = conv(x, None, layout(1, 1))
    assert_same(y, F.normalize(F.silu(x), dim=-1, eps=1e-6))
    (got,), (expected,) = (torch.autograd.grad(z.sum(), x) for z in (y, F.normalize(F.silu(x), dim=-1, eps=1e-6)))
    assert_same(got, expected)


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 2])
def test_the_gated_norm_is_torchs_norm_times_silu(length):
    norm = GatedNorm(3, eps=1e-6).double()
    x, gate = (torch.randn(2, length, 2, 3).double().requires_grad_() for _ in range(2))
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3))
    expected = F.rms_norm(x, (3,), norm.weight, 1e-6) * F.silu(gate)
    y = norm(x, gate)
    assert_same(y, expected)
    cotangent, wrt = torch.randn_like(y), (x, norm.weight, gate)
    for got, of in zip(*(torch.autograd.grad(z, wrt, cotangent) for z in (y, expected)), strict=True):
        assert_same(got, of)


def test_the_gated_norm_rounds_once():
    """Of bfloat16 it computes in float32."""
    norm = GatedNorm(8, eps=1e-6)
    x, gate = (torch.randn(1, 4, 2, 8).bfloat16().requires_grad_() for _ in range(2))
    y = norm(x, gate)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.rms_norm(x.float(), (8,), norm.weight, 1e-6) * F.silu(gate.float()))
    assert norm.bfloat16()(x, gate).dtype == torch.bfloat16


def test_the_short_convolution_starts_as_torchs_own():
    torch.manual_seed(0)
    weight, own = ShortConv(3000, 4).weight, torch.nn.Conv1d(3000, 3000, 4, groups=3000).weight
    assert weight.std().item() == pytest.approx(own.std().item(), rel=0.05)
    assert weight.abs().max().item() == pytest.approx(own.abs().max().item(), rel=0.01)


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD_LAYERS = {
    "heads": ((32, 3, variants.yaad()), {}, r"multiple of heads, got 32 and 3; or write head_dim"),
    "gates": ((32, 2, variants.yaad()), {"gates": "chanel"}, r"'head' or 'channel', got 'chanel'"),
    "KL on Vector": (
        (32, 2, miras.Rule(Vector(start="learned"), Huber(), KL(), GradientDescent())),
        {"gates": "channel"},
        r"KL\(\) needs alpha constant along the axis it normalises, the channels of matrix w; write gates='head'",
    ),
}


@pytest.mark.parametrize("arguments, options, message", BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_a_layer_that_cannot_be_is_refused_with_what_to_write(arguments, options, message):
    with pytest.raises(UsageError, match=message):
        MirasLayer(*arguments, **options)


def test_kl_on_a_vector_works_with_head_gates_and_l2_with_channel_gates():
    for retention, kind in ((KL(), "head"), (L2(), "channel")):
        rule = miras.Rule(Vector(start="learned"), Huber(), retention, GradientDescent())
        y, _ = MirasLayer(DIM, HEADS, rule, gates=kind)(draw().float())
        assert torch.isfinite(y).all()


BAD_CALLS = {
    "two axes": (lambda x: {"x": x[0]}, r"expected x \[batch, time, 32\], got \[13, 32\]"),
    "another size": (lambda x: {"x": x[..., :31]}, r"expected x \[batch, time, 32\], got \[2, 13, 31\]"),
    "no tokens": (lambda x: {"x": x[:, :0]}, r"expected x \[batch, time, 32\], got \[2, 0, 32\]"),
    "mask of another shape": (
        lambda x: {"x": x, "mask": torch.ones(2, 12)},
        r"mask must be .*\[2, 13\], got \[2, 12\]",
    ),
    "mask with holes": (lambda x: {"x": x, "mask": torch.arange(13).expand(2, 13) % 2}, "side by side"),
    "pack of two rows": (lambda x: {"x": x, "cu_seqlens": torch.tensor([0, 13])}, r"one row, got a batch of 2"),
    "pack that ends early": (lambda x: {"x": x[:1], "cu_seqlens": torch.tensor([0, 5, 12])}, "to the 13 tokens"),
    "unknown engine": (lambda x: {"x": x, "engine": "chunck"}, "Did you mean 'chunk'"),
}


@pytest.mark.parametrize("inputs, message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_does_not_fit_is_refused_with_what_was_expected(inputs, message):
    with pytest.raises(UsageError, match=message):
        make("yaad")(**inputs(draw()))


def test_a_state_of_another_batch_or_another_rule_is_refused():
    _, state = make("yaad")(draw(3))
    with pytest.raises(UsageError, match="state has 3 rows, the input 2 sequences"):
        make("yaad")(draw(2), state)
    for other, message in (
        ("titans", "another rule"),
        ("deltanet", "another rule"),
        ("transformer", "state of its own"),
    ):
        with pytest.raises(UsageError, match=message):
            make(other)(draw(3), state)
    _, cache = make("transformer")(draw(3))
    with pytest.raises(UsageError, match="a Rule continues from a State"):
        make("yaad")(draw(3), cache)


def test_around_attention_only_the_linear_maps_stay():
    layer = MirasLayer(DIM, HEADS, Attention())
    assert {name for name, _ in layer.named_parameters()} == {"qkv.weight", "out.weight"}
    assert not any(isinstance(module, GateMaker | ShortConv) for module in layer.modules())
