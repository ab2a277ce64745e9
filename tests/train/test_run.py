import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from small_run import small
from transformers import AutoModelForCausalLM, AutoTokenizer

from miras import variants
from miras.data import load_corpus, load_tokenizer, pack
from miras.errors import MirasError, UsageError
from miras.hf import MirasForCausalLM
from miras.train import TrainConfig, train
from miras.train.files import read_metrics
from miras.train.progress import Clock


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    changes = {"steps": 12, "learning_rate": 1e-2, "warmup": 1, "eval_every": 5, "eval_windows": 1024}
    made = small(text, tmp_path_factory.mktemp("finished"), **changes)
    return made, train(made)


def test_a_run_leaves_what_it_promises(finished):
    config, summary = finished
    out = Path(config.out)
    assert json.loads((out / "summary.json").read_text()) == asdict(summary)
    assert TrainConfig(**yaml.safe_load((out / "config.yaml").read_text())) == config
    assert summary.tokens == 12 * 128 and summary.steps == 12 and summary.name == "yaad"
    assert "Huber" in summary.mixer and summary.threads == 1
    assert summary.tokens_per_second > 0 and summary.train_seconds > 0 and summary.peak_memory_bytes > 0
    assert set(summary.data) == {
        *("name", "hash", "train_tokens", "validation_tokens", "bytes_per_token", "tokenizer"),
    }
    assert {"miras", "torch", "transformers", "python"} <= set(summary.versions)
    assert summary.command.startswith("miras train yaad") and "--steps 12" in summary.command
    assert not list(out.rglob("*.partial"))


def test_the_model_card_says_what_was_done(finished):
    config, summary = finished
    path = Path(config.out) / "model" / "README.md"
    said, head = path.read_text(), ModelCard.load(path).data
    assert head.pipeline_tag == "text-generation" and "miras" in head.tags
    assert f"{summary.val_bits_per_byte:.3f} bits per byte" in said and summary.command in said
    assert summary.data["hash"] in said and "context 32" in said


def test_metrics(finished):
    config, summary = finished
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    fields = ["step", "loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "seconds"]
    assert all(list(line) == fields for line in training)
    assert [line["step"] for line in validation] == [5, 10, 12]
    assert validation[-1]["val_loss"] == summary.val_loss
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert abs(training[0]["loss"] - math.log(257)) < 0.3
    seconds = [line["seconds"] for line in training]
    assert seconds == sorted(seconds)


def test_the_model_loads_and_has_the_loss_of_the_summary(finished):
    config, summary = finished
    model = AutoModelForCausalLM.from_pretrained(Path(config.out) / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(config.out) / "model")
    assert model.num_parameters() == summary.parameters
    assert tokenizer.decode(tokenizer("à la carte").input_ids) == "à la carte"
    _, held_out = pack(load_corpus(config.data), load_tokenizer("bytes"), config.context, Path(config.cache))
    assert len(held_out) <= 1024, "the last validation sees all of this text"
    with torch.no_grad():
        losses = [model(w["input_ids"][None], labels=w["labels"][None]).loss for w in held_out]
    assert torch.stack(losses).mean().item() == pytest.approx(summary.val_loss, abs=1e-4)


def test_accumulation_is_the_same_run(config, tmp_path):
    whole = train(config(out=str(tmp_path / "whole"), steps=3))
    parts = train(config(out=str(tmp_path / "parts"), steps=3, accumulation=2))
    assert parts.val_loss == pytest.approx(whole.val_loss, abs=1e-5)


def test_a_rule_of_ones_own_and_a_hybrid(config, tmp_path):
    rules = [variants.titans(chunk=4).to_config(), variants.sliding_window(8).to_config()]
    summary = train(config(model="mine", mixer=rules, steps=2))
    assert summary.name == "mine" and "Momentum" in summary.mixer and "window 8" in summary.mixer
    assert str(Path(config().out) / "config.yaml") in summary.command


def test_a_lost_training_stops_and_says_so(config, monkeypatch):
    plain = MirasForCausalLM.forward

    def broken(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(MirasForCausalLM, "forward", broken)
    with pytest.raises(MirasError, match=r"by step 1: loss nan.*model\.backbone\.embed\.weight"):
        train(config())


def test_a_folder_with_a_run_in_it_is_left_alone(finished):
    config, summary = finished
    with pytest.raises(UsageError, match="already holds a run"):
        train(config)
    assert train(config, resume=True) == summary


def test_tensorboard_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        train(config(tensorboard=True))


def test_a_bar_on_a_terminal(config, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    train(config(steps=3))
    said = capsys.readouterr().err
    assert all(part in said for part in ("3/3", "bits/byte", "tokens/s", "left", "\x1b["))


def test_speed_leaves_out_the_first_steps_and_what_is_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("miras.train.progress.time.perf_counter", lambda: now[0])
    clock = Clock(before=100.0)
    for seconds in (10, 10, 10, 10, 10, 2, 2):
        now[0] += seconds
        clock.step()
        now[0] += 1000
        clock.lap(counts=False)
    assert clock.seconds == 154
    assert clock.steps_per_second() == 0.5
