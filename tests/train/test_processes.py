"""Several processes of torchrun do the run of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import small, write_text

from miras.errors import UsageError
from miras.train import train
from miras.train.files import read_metrics
from miras.train.summary import Summary


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    config = small(write_text(tmp_path), tmp_path, steps=6, save_every=3)
    alone = train(config)
    shape = {"dim": 16, "layers": 2, "heads": 2, "context": 32, "batch": 128, "steps": 6, "save-every": 3}
    words = [f"--{name}={value}" for name, value in shape.items()]
    words += [f"--data={config.data}", f"--cache={config.cache}", f"--out={tmp_path / 'two'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "miras", "train", "yaad"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [
        torch.tensor([line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line])
        for out in (Path(config.out), tmp_path / "two")
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    together = Summary.read(tmp_path / "two" / "summary.json")
    assert abs(together.val_loss - alone.val_loss) < 1e-4 * alone.val_loss
    assert done.stderr.count("validation ") == 1 + done.stderr.count("/6  validation")


def test_a_batch_has_a_part_for_each_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes"):
        small("words.txt", tmp_path)
    assert small("words.txt", tmp_path, batch=96 * 2).sequences == 2
