import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small
from transformers import Trainer

from miras.errors import MirasError, UsageError
from miras.train import checkpoints, train
from miras.train.checkpoints import MARKER, newest
from miras.train.files import read_metrics
from miras.train.folder import resumed_config

STEPS = {"steps": 8, "save_every": 3, "eval_every": 4}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run that was never stopped."""
    made = small(text, tmp_path_factory.mktemp("straight"), **STEPS)
    train(made)
    return made


@pytest.fixture
def stop_after(monkeypatch):
    """Makes a run fall over after so many steps, as a power failure would."""

    def install(step: int, error: type[BaseException] = Stop):
        plain = Trainer.training_step

        def broken(self, *args, **kwargs):
            if self.state.global_step == step:
                raise error
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", broken)
        return lambda: monkeypatch.setattr(Trainer, "training_step", plain)

    return install


def same_run(a, b):
    time = ("seconds", "tokens_per_second")
    lines = [
        [{n: v for n, v in line.items() if n not in time} for line in read_metrics(Path(c.out) / "metrics.jsonl")]
        for c in (a, b)
    ]
    assert lines[0] == lines[1]
    first, second = (load_file(Path(c.out) / "model" / "model.safetensors") for c in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stopped_at", [2, 5, 7])
def test_a_resumed_run_is_bit_by_bit_the_same(config, straight, stop_after, stopped_at):
    again = stop_after(stopped_at)
    stopped = config(**STEPS)
    with pytest.raises(Stop):
        train(stopped)
    again()
    torch.manual_seed(123)
    train(stopped, resume=True)
    same_run(straight, stopped)


def test_only_complete_checkpoints_count_and_few_are_kept(config, straight, stop_after, capsys):
    assert [p.name for p in checkpoints.checkpoints(Path(straight.out) / "checkpoints")] == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    again = stop_after(7)
    stopped = config(**STEPS)
    with pytest.raises(Stop):
        train(stopped)
    again()
    last = Path(stopped.out) / "checkpoints" / "checkpoint-6"
    (last / MARKER).unlink()
    (last / "optimizer.pt").write_bytes(b"half")
    assert newest(last.parent).name == "checkpoint-3"
    train(stopped, resume=True)
    said = capsys.readouterr().err
    assert f"Removed {last}" in said and "Goes on after step 3" in said
    same_run(straight, stopped)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data.pkl")]
)
def test_a_full_disk_loses_nothing(config, straight, monkeypatch, error):
    plain = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-6"):
            raise error
        plain(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    stopped = config(**STEPS)
    with pytest.raises(MirasError) as said:
        train(stopped)
    message = str(said.value)
    assert said.value.exit_code == 1
    for part in ("checkpoint of step 6", "that of step 3", f"miras train --resume --out {stopped.out}"):
        assert part in message
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", plain)
    train(stopped, resume=True)
    same_run(straight, stopped)


def test_a_stop_in_the_middle_of_a_checkpoint_loses_nothing(config, straight, monkeypatch):
    plain = Trainer._save_rng_state

    def interrupted(self, folder):
        if folder.endswith("-6"):
            raise KeyboardInterrupt
        plain(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", interrupted)
    stopped = config(**STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert newest(Path(stopped.out) / "checkpoints").name == "checkpoint-3"
    monkeypatch.setattr(Trainer, "_save_rng_state", plain)
    train(stopped, resume=True)
    same_run(straight, stopped)


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(config, stop_after, capsys):
    stopped = config(**STEPS)
    again = stop_after(1)
    with pytest.raises(Stop):
        train(stopped)
    again()
    train(stopped, resume=True)
    assert "Begins again" in capsys.readouterr().err


@pytest.fixture
def stopped(config, stop_after):
    made = config(**STEPS)
    again = stop_after(4)
    with pytest.raises(Stop):
        train(made)
    again()
    return made


@pytest.mark.parametrize("change", [{"model": "memora"}, {"steps": 9}, {"learning_rate": 0.1}, {"data": "stdlib"}])
def test_another_configuration_is_refused_with_the_difference(stopped, change):
    (name, value), *_ = change.items()
    other = resumed_config(None, {"out": stopped.out, **change})
    with pytest.raises(UsageError, match="another configuration") as refused:
        train(other, resume=True)
    assert f"was {getattr(stopped, name)}, is {value}" in str(refused.value)


def test_other_data_under_the_same_name_are_refused(config, stopped, tmp_path, text):
    shutil.copy(text, tmp_path / "words.txt")
    Path(text).write_text(Path(text).read_text() + "\nand more")
    try:
        with pytest.raises(UsageError, match=r"the data are not those.*hash was"):
            train(stopped, resume=True)
    finally:
        shutil.copy(tmp_path / "words.txt", text)


def test_resuming_needs_no_more_than_the_folder(stopped):
    assert resumed_config(None, {"out": stopped.out}) == stopped
    assert resumed_config(None, {"out": stopped.out, "keep": 5}).keep == 5


def test_there_must_be_a_run_to_resume(config, tmp_path):
    with pytest.raises(UsageError, match="there is no run in"):
        train(config(), resume=True)
    with pytest.raises(UsageError, match="there is no run in"):
        resumed_config(None, {"out": str(tmp_path / "nothing")})
