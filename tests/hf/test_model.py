"""The Hugging Face model: saving, loading, initialisation, losses, checkpointing, packs, bad input, user-made rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import miras
from miras import variants
from miras.algorithm import GradientDescent, Momentum
from miras.bias import L1, Custom, Huber, Lp, Robust
from miras.errors import UsageError
from miras.gates import ETA
from miras.hf import MirasConfig, MirasForCausalLM, MirasModel
from miras.memory import MLP, Linear, Polynomial, SwiGLU, Vector
from miras.model import INIT_STD, Block
from miras.retention import KL, L2, Lq
from miras.sources import SHORTEST

VOCAB = 29


def smooth_l1(y, v):
    """A loss of the user's own."""
    return ((y - v).square() + 0.01).sqrt().sum()


USER_MADE = {
    "mlp3-l1-kl-momentum": miras.Rule(MLP(layers=3), L1(), KL(), Momentum(rate="input"), chunk=8),
    "linear-huber-lq-descent": miras.Rule(
        Linear(start="learned"), Huber(form="norm"), Lq(q=3.0, link="mirror"), GradientDescent(), chunk=4
    ),
    "vector-lp-initial-momentum": miras.Rule(
        Vector(start="learned"), Lp(p=1.5), L2(to="initial"), Momentum(), chunk=8, gradient_at="decayed"
    ),
    "swiglu-custom": miras.Rule(SwiGLU(), Custom(smooth_l1), L2(to="initial"), GradientDescent(rate="input"), chunk=8),
    "polynomial-robust": miras.Rule(Polynomial(), Robust(), L2(), GradientDescent(), chunk=4),
}
MIXERS = {
    **{name: variants.variant(name, 8) for name in variants.VARIANTS},
    "hybrid": [variants.yaad(8), variants.sliding_window(5)],
    **USER_MADE,
}
FEW = ("yaad", "memora", "gated_deltanet", "hybrid", "mlp3-l1-kl-momentum")


def config(name: str = "yaad", **options) -> MirasConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **options}
    return MirasConfig(mixer=MIXERS[name], eos_token_id=None, pad_token_id=0, **sizes)


def make(name: str = "yaad", dtype: torch.dtype = torch.float32, **options) -> MirasForCausalLM:
    """A small model with random biases and scales too, so that nothing is equal by being at its initial value."""
    torch.manual_seed(0)
    model = MirasForCausalLM(config(name, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def draw(rows: int = 2, length: int = 21) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, VOCAB, (rows, length))


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_a_saved_model_loads_with_equal_weights_logits_and_configuration(name, tmp_path):
    model, ids = make(name, gates="channel" if name == "yaad" else "head"), draw()
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MirasForCausalLM
    assert loaded.config.mixers() == model.config.mixers()
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""} | {
        "dtype": loaded.config.to_dict()["dtype"],
        "architectures": ["MirasForCausalLM"],
    }
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_list_may_hold_names():
    made = MirasConfig(mixer=["yaad", "gated_deltanet"], num_hidden_layers=3)
    assert made.mixers() == MirasConfig(mixer="yaad,gated_deltanet", num_hidden_layers=3).mixers()


@pytest.mark.parametrize("name", MIXERS)
def test_the_configuration_survives_json_and_says_exactly_which_mixers(name, tmp_path):
    made = config(name)
    made.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MirasConfig
    given = MIXERS[name] if isinstance(MIXERS[name], list) else [MIXERS[name]] * 2
    assert list(loaded.mixers()) == given
    assert [part["name"] for part in json.loads((tmp_path / "config.json").read_text())["mixer"]] == [
        type(part).__name__ for part in given
    ]


def test_automodel_loads_the_stack_without_the_output_layer(tmp_path):
    model, ids = make(), draw()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MirasModel
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        assert torch.equal(hidden, model.model(ids).last_hidden_state)
        torch.testing.assert_close(F.linear(hidden, base.get_input_embeddings().weight), model(ids).logits)


def test_a_model_is_made_from_its_configuration_by_the_auto_classes():
    assert type(AutoModelForCausalLM.from_config(config())) is MirasForCausalLM
    assert type(AutoModel.from_config(config())) is MirasModel
    assert type(AutoConfig.for_model("miras", mixer="memora")) is MirasConfig


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_shares_the_embedding_where_asked(tied, tmp_path):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    for m in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (m.lm_head.weight is m.get_input_embeddings().weight) is tied
        assert (m.get_output_embeddings().weight is m.get_input_embeddings().weight) is tied
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in saved.values())


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tied):
    model, ids = make(tie_word_embeddings=tied), draw()
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(VOCAB + 5)
        after = model(ids).logits
    assert after.shape[-1] == VOCAB + 5
    torch.testing.assert_close(after[..., :VOCAB], before)


@pytest.mark.parametrize("name", FEW)
def test_loaded_in_bfloat16_memory_slow_parameters_and_gates_stay_in_float32(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for key, parameter in model.named_parameters():
        kept = any(part in key.split(".") for part in ("memory", "slow", "gates"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), key
    ids = draw()
    out = model(ids)
    assert out.logits.dtype == torch.bfloat16
    for layer in out.past_key_values.layers:
        if isinstance(layer.state.mixer, miras.State):
            assert {x.dtype for x in layer.state.mixer.dual.values()} == {torch.float32}
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert cached.shape == (2, 33)
    # The rounding of activations costs no more than that of the weights does.
    exact, rounded = make(name)(ids).logits, model.float()(ids).logits
    assert (out.logits.float() - exact).norm() <= 2 * (rounded - exact).norm()


# What is missing -> the mean and standard deviation that a fresh model gives it.
HIDDEN = 4 * 16
FRESH = {
    "backbone.blocks.0.mixer.memory.w1": (0.0, 1 / math.sqrt(HIDDEN)),
    "backbone.blocks.1.mixer.memory.w2": (0.0, 1.0),
    "backbone.blocks.0.mixer.slow.norm_scale": (1.0, 0.0),
    "backbone.blocks.0.mixer.slow.norm_shift": (0.0, 0.0),
    "backbone.blocks.0.mixer.gates.eta.weight": (0.0, 0.02),
    "backbone.blocks.0.mixer.gates.eta.bias": (ETA.unsquash(ETA.init), 0.0),
    "backbone.blocks.0.mixer.gates.eta.down.weight": (0.0, INIT_STD),
    "backbone.blocks.0.mixer.qkv.weight": (0.0, INIT_STD),
    "backbone.blocks.1.mixer.out.weight": (0.0, INIT_STD / 2),
    "backbone.blocks.1.mixer.conv.weight": (0.0, 0.5 / math.sqrt(3)),
    "backbone.blocks.0.mixer.norm.weight": (1.0, 0.0),
    "backbone.blocks.0.mlp.gate_in.weight": (0.0, INIT_STD),
    "backbone.blocks.0.mlp.out.weight": (0.0, INIT_STD / 2),
    "backbone.norm.weight": (1.0, 0.0),
    "backbone.embed.weight": (0.0, INIT_STD),
}


def assert_fresh(key: str, value: torch.Tensor) -> None:
    """Mean and standard deviation of a parameter as they should be in a fresh model, within what chance permits."""
    mean, std = FRESH[key]
    assert value.std().item() == pytest.approx(std, rel=0.2, abs=1e-9), key
    assert value.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(value.numel()) + 1e-6), key


def test_a_fresh_model_is_initialised_as_the_library_says():
    state = MirasForCausalLM(config(gates="channel")).state_dict()
    for key in FRESH:
        assert_fresh(key, state[f"model.{key}"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(gates="channel").save_pretrained(folder)
    return folder


def load_without(checkpoint: Path, folder: Path, keys: list[str]) -> tuple[MirasForCausalLM, dict]:
    """The model of a checkpoint that has lost some tensors, and the tensors that are left."""
    left = load_file(checkpoint / "model.safetensors")
    for key in keys:
        del left[key]
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder), left


@pytest.mark.parametrize("key", FRESH)
def test_a_tensor_missing_in_a_checkpoint_is_as_in_a_fresh_model_and_the_others_as_loaded(key, checkpoint, tmp_path):
    model, left = load_without(checkpoint, tmp_path, [f"model.{key}"])
    for name, value in left.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert_fresh(key, model.state_dict()[f"model.{key}"])
    assert torch.isfinite(model(draw(), labels=draw()).loss)


def test_a_missing_gate_of_retention_gets_its_spread_of_time_constants(checkpoint, tmp_path):
    key = "model.backbone.blocks.0.mixer.gates.log_alpha.bias"
    model, _ = load_without(checkpoint, tmp_path, [key])
    start = model.model.backbone.blocks[0].mixer.gates["log_alpha"].gate.squash(model.state_dict()[key])
    torch.testing.assert_close(-1 / start[:, 0], torch.tensor([SHORTEST, 2048.0]), rtol=1e-3, atol=0)


def test_an_empty_checkpoint_gives_a_fresh_model(checkpoint, tmp_path):
    keys = list(load_file(checkpoint / "model.safetensors"))
    model, left = load_without(checkpoint, tmp_path, keys[:-1])
    assert len(left) == 1
    for key in FRESH:
        if f"model.{key}" not in left:
            assert_fresh(key, model.state_dict()[f"model.{key}"])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor came after 5.5
@pytest.mark.parametrize("name", FEW)
def test_checkpointing_recomputes_each_block_and_changes_neither_loss_nor_gradient(name, monkeypatch):
    calls = 0
    forward = Block.forward

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    model, ids, seen = make(name).train(), draw(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = 0
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        forward_calls = calls
        loss.backward()
        seen.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        assert forward_calls == 2
        assert calls == (4 if checkpointing else 2)
    assert seen[0][0] == seen[1][0]
    for key, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][key]), key


@pytest.mark.parametrize("name", ["yaad", "memora", "gated_deltanet", "transformer", "hybrid"])
def test_packed_sequences_give_the_hidden_states_and_loss_of_each_alone(name):
    model, lengths = make(name, torch.float64), (3, 8, 1, 21)
    parts = [draw(1, n) for n in lengths]
    packed = torch.cat(parts, 1)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with torch.no_grad():
        hidden = model.model(packed, cu_seqlens=cu_seqlens).last_hidden_state
        alone = torch.cat([model.model(part).last_hidden_state for part in parts], 1)
        torch.testing.assert_close(hidden, alone, rtol=1e-9, atol=1e-9)
        loss = model(packed, labels=packed, cu_seqlens=cu_seqlens).loss
        sums = [F.cross_entropy(model(p).logits[0, :-1], p[0, 1:], reduction="sum") for p in parts if p.shape[1] > 1]
    # transformers' own loss works in float32.
    expected = sum(sums) / sum(n - 1 for n in lengths)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_the_loss_of_labels_is_the_plain_cross_entropy_of_the_next_token():
    model, ids = make(), draw()
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100))
    # As the trainer asks for under gradient accumulation: the sum over a number of tokens that it knows.
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=100).loss, total / 100)


def test_embeddings_may_be_given_instead_of_tokens():
    model, ids = make(), draw()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False),
        model.generate(ids, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :],
    )


@pytest.mark.parametrize("given", ["neither", "both"])
def test_tokens_and_embeddings_exclude_each_other(given):
    model, ids = make(), draw()
    inputs = {} if given == "neither" else {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}
    with pytest.raises(UsageError, match="either input_ids or inputs_embeds"):
        model(**inputs)


def test_a_cache_comes_back_when_asked_for_and_not_while_training():
    model, ids = make(), draw()
    assert model(ids).past_key_values.get_seq_length() == ids.shape[1]
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


# -- bad input ---------------------------------------------------------------------------------------------------------

YAAD = variants.yaad().to_config()
BAD_CONFIGURATIONS = {
    "misspelt": ({"mixer": "yaadd"}, "Did you mean 'yaad'"),
    "misspelt in a hybrid": ({"mixer": "yaad,sliding_windw"}, "Did you mean 'sliding_window'"),
    "unlike any": ({"mixer": "zzz"}, "Choose one of moneta, yaad, memora"),
    "no mixers": ({"mixer": []}, "empty list"),
    "unknown class": ({"mixer": [{"name": "Rulee"}]}, "Did you mean 'Rule'"),
    "unknown bias": (
        {"mixer": [YAAD | {"bias": {"name": "Hubber"}}]},
        "Did you mean 'Huber'",
    ),
    "unknown field": ({"mixer": [YAAD | {"chnk": 4}]}, "Did you mean 'chunk'"),
    "chunk beside a rule": ({"mixer": variants.yaad(), "chunk": 4}, "already holds its own"),
    "chunk of nothing": ({"mixer": "yaad", "chunk": 0}, "at least 1"),
}


@pytest.mark.parametrize("options, message", BAD_CONFIGURATIONS.values(), ids=BAD_CONFIGURATIONS.keys())
def test_a_bad_configuration_is_refused_with_what_to_write(options, message):
    with pytest.raises(UsageError, match=message):
        MirasConfig(**options)


BAD_MODELS = {
    "heads": ({"num_attention_heads": 3}, "multiple of heads"),
    "gates": ({"gates": "chanel"}, "'head' or 'channel'"),
}


@pytest.mark.parametrize("options, message", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_configuration_that_no_layer_can_have_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        MirasForCausalLM(config(**options))


# -- user-made rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USER_MADE)
def test_a_user_made_rule_trains_decodes_saves_and_loads(name, tmp_path):
    torch.manual_seed(0)
    model, ids = MirasForCausalLM(config(name)), draw(4, 33)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05), "a fresh model knows nothing"
    assert losses[2] < losses[0]
    assert losses[9] < losses[0] - 0.3
    model.eval().double()
    cached = model.generate(ids[:, :11], max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, model.generate(ids[:, :11], max_new_tokens=12, do_sample=False, use_cache=False))
    model.float().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
