"""The examples run and say what they are meant to show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *words):
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_axes.py", "own_rule.py", "stream.py"}


def test_a_rule_of_ones_own_learns_and_writes():
    said = run("own_rule.py", "--steps", "6")
    losses = [float(x) for x in re.findall(r"loss (\S+)", said)]
    assert "engine: chunk" in said
    assert losses[-1] < losses[0]
    assert "def add_argument(" in said


@pytest.mark.parametrize("corrupted", ["0", "0.2"])
def test_huber_is_robust_where_least_squares_is_not(corrupted):
    said = run("stream.py", "--corrupted", corrupted)
    error = {name.strip(): float(x) for name, x in re.findall(r"^  (.{14}) (\S+)$", said, flags=re.MULTILINE)}
    assert error["Huber"] < 0.1
    assert (error["l_2"] > 1) == (corrupted != "0")
