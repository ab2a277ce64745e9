"""The demo from nothing to its report, with as little training as there can be."""

import json
import subprocess
import sys

import pytest
import torch

from miras import demo
from miras.errors import MirasError
from miras.hf import MirasConfig
from miras.train import TrainConfig
from miras.train.many import Job, train_many
from miras.train.parameters import equal_hidden, parameters

MODELS = demo.MODELS
# A memory and what grows; `.ci/run` has the demo with all of them.
FEW = ("yaad", "transformer")
TINY = demo.Plan(steps=2, contexts=(8, 16), sample_tokens=4, eval_windows=2)
FIELDS = {"name", "parameters", "steps", "val_bits_per_byte", "tokens_per_second", "peak_memory_bytes"}


def test_the_models_have_equal_parameters_and_the_largest_its_preset_width():
    configs = {name: TrainConfig(model=name) for name in MODELS}
    widths = equal_hidden(configs)
    counts = [parameters(configs[name], width) for name, width in widths.items()]
    assert max(counts) / min(counts) < 1.01
    assert min(widths.values()) == MirasConfig(hidden_size=128).intermediate_size


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", TINY)
        patch.setattr(demo, "MODELS", FEW)
        demo.demo(out, quick=True)
        yield out


def test_the_demo_writes_its_numbers_and_its_page(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["models"]] == list(FEW)
    for row in results["models"]:
        assert row.keys() >= FIELDS
        assert row["steps"] == 2 and 0 < row["val_bits_per_byte"] < 10
        assert row["decode_ms_per_token"].keys() == row["state_bytes"].keys() == {"8", "16"}
        grows = row["state_bytes"]["16"] > row["state_bytes"]["8"]
        assert grows == (row["name"] == "transformer")
    assert results["data"]["hash"] and results["data"]["validation_tokens"] == 2 * 256
    assert "yaad" in (finished / "report.html").read_text()


def test_what_is_trained_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(Job, "start", lambda *_: pytest.fail("a finished run was started"))
    before = (finished / "yaad" / "summary.json").read_bytes()
    demo.demo(finished, quick=True)
    assert (finished / "yaad" / "summary.json").read_bytes() == before


def test_another_run_in_the_folder_is_not_overwritten(finished, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", demo.Plan(3, (8,), 4, 2))
    with pytest.raises(MirasError, match="holds another run"):
        demo.demo(finished, quick=True)


def test_a_run_that_fails_says_its_last_words(tmp_path):
    job = Job("broken", tmp_path / "broken", 1, ("train", "yaat"))
    with pytest.raises(MirasError, match=r"broken ended with exit code 2: .*Did you mean 'yaad'"):
        train_many([job], at_once=1)


def test_runs_side_by_side_share_the_threads_of_the_process(tmp_path, monkeypatch):
    given = []

    def start(self, threads):
        given.append(threads)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(Job, "start", start)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    train_many([Job(name, tmp_path / name, 1, ()) for name in "abc"], at_once=2)
    assert given == [2, 2, 2]
