import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_run import small, write_text

from miras.data import load_corpus, load_tokenizer, pack
from miras.errors import UsageError
from miras.evaluate import load_model, mean_loss
from miras.evaluate.perplexity import losses, tokenise
from miras.evaluate.tasks import Perplexity, Positions
from miras.evaluate.tasks.perplexity import octaves
from miras.hf import MirasConfig, MirasForCausalLM
from miras.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = small(write_text(folder), folder, steps=3)
    return config, train(config)


@pytest.fixture(params=["yaad", "titans", "gated_deltanet", "transformer", "memora,sliding_window"])
def model(request):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MirasForCausalLM(MirasConfig(mixer=request.param, **shape)).eval()


def plain(model, windows):
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_it_is_the_plain_cross_entropy(model):
    windows = torch.randint(0, 257, (3, 70))
    assert mean_loss(model, windows) == pytest.approx(plain(model, windows), abs=1e-5)


@pytest.mark.parametrize("piece", [1, 16, 23, 69, 70, 1000])
def test_pieces_change_nothing(model, piece):
    windows = torch.randint(0, 257, (2, 70))
    assert mean_loss(model, windows, piece) == pytest.approx(plain(model, windows), abs=1e-5)


def test_rows_are_taken_in_batches(model, monkeypatch):
    monkeypatch.setattr("miras.evaluate.perplexity.TOKENS_AT_ONCE", 64)
    windows = torch.randint(0, 257, (5, 30))
    assert mean_loss(model, windows) == pytest.approx(plain(model, windows), abs=1e-5)


def test_tokens_are_those_that_training_packs(trained):
    config, _ = trained
    corpus, tokenizer = load_corpus(config.data), load_tokenizer("bytes")
    _, held_out = pack(corpus, tokenizer, 32, Path(config.cache))
    tokens, bytes_per_token = tokenise(corpus.documents("validation"), tokenizer, 10**9)
    assert bytes_per_token == held_out.bytes_per_token
    packed = torch.cat([window["input_ids"] for window in held_out])
    assert torch.equal(tokens[: len(packed)], packed)


def measured(config, task):
    return task.measure(*load_model(config.out), 0, lambda *_: None)


def test_a_table_over_the_same_tokens(trained):
    config, summary = trained
    rows = measured(config, Perplexity(config.data, contexts=(32, 64, 500), limit=4000))
    assert [row["context"] for row in rows] == [32, 64, 500]
    for row in rows:
        assert row["tokens"] == 4000 // row["context"] * (row["context"] - 1)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / summary.data["bytes_per_token"])
    assert rows[0]["bits_per_byte"] == pytest.approx(summary.val_bits_per_byte, abs=0.1)


def test_the_whole_text_or_the_held_out_part(trained):
    config, _ = trained
    parts = [Perplexity(config.data, part, (5000,), 30_000) for part in ("validation", "all")]
    held_out, everything = (measured(config, part)[0]["tokens"] for part in parts)
    assert everything > held_out


def test_too_long_a_context_is_refused(trained):
    config, _ = trained
    with pytest.raises(UsageError, match=r"the validation part of words.txt has \d+ tokens, and a context is 99999"):
        measured(config, Perplexity(config.data, contexts=(99_999,), limit=100))
    with pytest.raises(UsageError, match="expected contexts of at least 2"):
        Perplexity(contexts=(1,))
    with pytest.raises(UsageError, match="expected validation, train or all"):
        Perplexity(part="test")  # type: ignore[arg-type]


def test_positions_are_those_of_one_unbroken_text(trained, monkeypatch):
    config, _ = trained
    model, tokenizer = load_model(config.out)
    tokens, _ = tokenise(load_corpus(config.data).documents("validation"), tokenizer, 300)
    with torch.no_grad():
        logits = model(tokens.view(3, 100)).logits[:, :-1]
    by_hand = F.cross_entropy(logits.transpose(1, 2), tokens.view(3, 100)[:, 1:], reduction="none")
    torch.testing.assert_close(losses(model, tokens.view(3, 100), 7), by_hand, atol=1e-5, rtol=0)
    rows = measured(config, Positions(config.data, length=100, windows=3))
    assert [(row["position"], row["last"]) for row in rows] == [
        *((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 99))
    ]
    assert rows[-1]["loss"] == pytest.approx(by_hand[:, 63:99].mean().item(), abs=1e-5)


def test_octaves_cover_every_predicted_token_once():
    for length in (2, 3, 64, 65, 1000):
        assert [t for first, end in octaves(length) for t in range(first, end)] == list(range(1, length))


def test_too_long_a_stretch_is_refused(trained):
    with pytest.raises(UsageError, match=r"windows of 99999 need 399996. Write for example --set length=\d+"):
        measured(trained[0], Positions(trained[0].data, length=99_999))


def test_models_are_found_or_missed_with_advice(trained, tmp_path):
    config, _ = trained
    for folder in (config.out, config.out + "/model", config.out + "/checkpoints/checkpoint-3"):
        load_model(folder)
    with pytest.raises(UsageError, match="got no such folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="got a folder without them"):
        load_model(str(tmp_path))


def test_a_damaged_model_is_refused(trained, tmp_path):
    model, _ = load_model(trained[0].out)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="it cannot be loaded"):
        load_model(str(tmp_path))
