import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_run import small, write_text

from miras.data import load_corpus, load_tokenizer, pack
from miras.errors import UsageError
from miras.evaluate import evaluate, load_model, mean_loss
from miras.evaluate.perplexity import tokenise
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


def test_a_table_over_the_same_tokens(trained):
    config, summary = trained
    rows = evaluate(config.out, config.data, [32, 64, 500], 4000)
    assert [row.context for row in rows] == [32, 64, 500]
    for row in rows:
        assert row.tokens == 4000 // row.context * (row.context - 1)
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.bits_per_byte == pytest.approx(row.loss / math.log(2) / summary.data["bytes_per_token"])
    assert rows[0].bits_per_byte == pytest.approx(summary.val_bits_per_byte, abs=0.1)


def test_the_whole_text_or_the_held_out_part(trained):
    config, _ = trained
    held_out = evaluate(config.out, config.data, [5000], 100_000)[0].tokens
    assert evaluate(config.out, config.data, [5000], 100_000, "all")[0].tokens > held_out


def test_too_long_a_context_is_refused(trained):
    config, _ = trained
    with pytest.raises(UsageError, match=r"--context 99999: the validation part of words.txt has \d+ tokens"):
        evaluate(config.out, config.data, [99_999], 100)
    with pytest.raises(UsageError, match="--context 1: expected lengths of at least 2"):
        evaluate(config.out, config.data, [1], 100)


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
