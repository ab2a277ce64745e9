import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import miras
from miras.errors import MirasError, UsageError
from miras.state import tensors
from miras.storage import load_state, save_state


@pytest.fixture
def stream():
    rule = miras.variants.titans(chunk=4)
    q, k, v = (F.normalize(torch.randn(2, 11, 2, 8), dim=-1) for _ in range(3))
    gates = {g.name: torch.full((2, 11, 2, 1), g.init) for g in rule.gates}
    return rule, (q, k, v), gates, rule.init(rule.initial(2, 8, 8), batch=2)


def piece(stream, state, here):
    rule, tokens, gates, _ = stream
    return miras.run(rule, *(x[:, here] for x in tokens), {n: g[:, here] for n, g in gates.items()}, state=state)


def test_a_stream_goes_on_from_a_file(stream, tmp_path):
    rule, *_, state = stream
    whole, _ = piece(stream, state, slice(0, 11))
    _, state = piece(stream, state, slice(0, 6))
    save_state(tmp_path / "state", rule, state)
    loaded = load_state(tmp_path / "state", rule)
    assert all(torch.equal(x, tensors(loaded)[name]) for name, x in tensors(state).items())
    rest, _ = piece(stream, loaded, slice(6, 11))
    torch.testing.assert_close(rest, whole[:, 6:])
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("mixer", [miras.variants.titans(chunk=4), miras.Attention()], ids=["titans", "attention"])
def test_a_layer_goes_on_from_a_file(mixer, conv, tmp_path):
    layer, x = miras.MirasLayer(16, 2, mixer, conv=conv), torch.randn(2, 11, 16)
    whole, _ = layer(x)
    _, state = layer(x[:, :6])
    save_state(tmp_path / "state", layer, state)
    loaded = load_state(tmp_path / "state", layer)
    assert tensors(loaded).keys() == tensors(state).keys()
    assert all(torch.equal(y, tensors(loaded)[name]) for name, y in tensors(state).items())
    rest, _ = layer(x[:, 6:], loaded)
    torch.testing.assert_close(rest, whole[:, 6:])


def test_a_state_of_another_layer_is_refused(stream, tmp_path):
    rule, *_, state = stream
    layer, other = miras.MirasLayer(16, 2, rule), miras.MirasLayer(16, 2, rule, conv=0)
    _, seen = layer(torch.randn(2, 3, 16))
    save_state(tmp_path / "state", layer, seen)
    with pytest.raises(UsageError, match=r"2 heads of 8 and a convolution over 4 tokens, asked .* no convolution"):
        load_state(tmp_path / "state", other)
    with pytest.raises(UsageError, match="asked for was that of a rule"):
        load_state(tmp_path / "state", rule)
    save_state(tmp_path / "state", rule, state)
    with pytest.raises(UsageError, match="the state of a rule, asked for was that of a layer of 2 heads of 8"):
        load_state(tmp_path / "state", layer)


def test_a_fresh_state_stays_aligned(stream, tmp_path):
    rule, *_, state = stream
    save_state(tmp_path / "state", rule, state)
    assert load_state(tmp_path / "state", rule).aligned


def test_a_state_of_another_rule_is_refused_by_name(stream, tmp_path):
    rule, *_, state = stream
    save_state(tmp_path / "state", rule, state)
    with pytest.raises(UsageError, match=r"Momentum.*GradientDescent"):
        load_state(tmp_path / "state", miras.variants.yaad(chunk=4))
    with pytest.raises(UsageError, match="no file"):
        load_state(tmp_path / "none", rule)


def test_another_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(MirasError, match="not written by save_state"):
        load_state(tmp_path / "other", miras.variants.yaad())
