import pytest
import torch

from miras.hf import MirasConfig, MirasForCausalLM
from miras.train.optimizer import make_optimizer, parameter_groups

DECAYED = ("qkv.weight", "mixer.out.weight", "out_gate.weight", "gate_in.weight", "mlp.out.weight")


def model(mixer="yaad", gates="head"):
    return MirasForCausalLM(
        MirasConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixer=mixer, gates=gates, gate_rank=4)
    )


@pytest.mark.parametrize(
    "mixer", ["yaad", "moneta", "memora", "gated_deltanet", "transformer", "titans,sliding_window"]
)
@pytest.mark.parametrize("gates", ["head", "channel"])
def test_only_the_weights_of_linear_maps_decay(mixer, gates):
    if mixer == "memora" and gates == "channel":
        gates = "head"
    network = model(mixer, gates)
    names = {id(p): name for name, p in network.named_parameters()}
    optimizer, _ = make_optimizer(network, 1e-3, 0.1, 1, 10)
    groups = [({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups]
    (decayed, weight_decay), (kept, none) = groups
    assert (weight_decay, none) == (0.1, 0.0)
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert all(name.endswith(DECAYED) for name in decayed)
    assert not any(name.endswith(DECAYED) for name in kept)
    forbidden = (".memory.", ".slow.", ".gates.", "norm", ".conv.", "embed")
    assert not any(part in name for name in decayed for part in forbidden)


def test_a_tied_embedding_does_not_decay():
    network = model()
    decayed, kept = parameter_groups(network, 0.1)
    assert all(p is not network.lm_head.weight for p in decayed["params"])
    assert any(p is network.lm_head.weight for p in kept["params"])


def test_the_rate_rises_then_falls_to_a_tenth():
    optimizer, schedule = make_optimizer(model(), 1.0, 0.1, 10, 100)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:11] == pytest.approx([i / 10 for i in range(11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_one_step_moves_every_parameter():
    network = model()
    optimizer, schedule = make_optimizer(network, 1e-2, 0.1, 0, 10)
    before = [p.detach().clone() for p in network.parameters()]
    tokens = torch.randint(0, 257, (2, 40))
    network(tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
