"""The examples run and say what they are meant to show."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case
from contract import check

from miras import algorithm, memory
from miras.bias import Bias
from miras.retention import Retention
from miras.rule import Rule

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *words):
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_axes.py", "own_rule.py", "sensors.py", "stream.py"}


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


def test_a_layer_that_learned_from_clean_readings_bears_wrong_ones_by_huber():
    said = run("sensors.py", "--steps", "100")
    pattern = r"^  (\S+) +clean (\S+) +corrupted (\S+)$"
    lost = {name: float(y) - float(x) for name, x, y in re.findall(pattern, said, flags=re.MULTILINE)}
    assert 0 < lost["Huber"] < lost["l_2"] / 2


def test_a_bias_and_a_gate_of_ones_own_keep_the_contract():
    path = EXAMPLES / "own_axes.py"
    assert len(path.read_text().splitlines()) <= 40
    # The registry is global; it is left as it was for the tests that enumerate it.
    known = dict(Bias.members), dict(Retention.members)
    try:
        spec = importlib.util.spec_from_file_location("own_axes", path)
        own = sys.modules["own_axes"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        for mem in (memory.MLP(), memory.SwiGLU(), memory.Linear(start="learned")):
            for to, learner in (("initial", algorithm.GradientDescent("input")), ("zero", algorithm.Momentum("input"))):
                for chunk in (1, 4):
                    check(Case(Rule(mem, own.Cauchy(), own.Bounded(to=to), learner, chunk), channels=to == "zero"))
    finally:
        Bias.members, Retention.members = known
        sys.modules.pop("own_axes", None)
