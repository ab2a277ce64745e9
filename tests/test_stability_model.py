"""The presets train stably on real text with their defaults: outer gradients stay small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "stability.py"
spec = importlib.util.spec_from_file_location("stability", SCRIPT)
assert spec is not None and spec.loader is not None
stability = sys.modules["stability"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stability)

LIMIT = 10.0
PRESETS = ("moneta", "yaad", "memora", "mneme")


def first_step(cell) -> tuple[float, float]:
    """Bits per byte and gradient norm of a fresh model on the first batch."""
    return stability.backward(stability.make(cell), next(stability.batches(cell.length)), cell.dtype)


@pytest.mark.parametrize(("name", "chunk"), [*((name, 16) for name in PRESETS), ("mneme", 1)])
def test_outer_gradients_are_small_at_the_start_and_after_30_steps(name, chunk):
    outcome = stability.train(stability.Cell(name, chunk, length=256), steps=31, tokens=1024)
    assert torch.isfinite(torch.tensor(outcome.norms + outcome.bits)).all()
    assert 0 < outcome.norms[0] < LIMIT
    assert 0 < outcome.norms[30] < LIMIT
    assert outcome.bits[30] < outcome.bits[0] - 2, "30 steps learn which bytes are frequent"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length, gates", [(256, "channel"), (2048, "head"), (2048, "channel"), (8192, "head")])
def test_outer_gradients_are_small_at_the_start_over_long_sequences(name, length, gates):
    bits, norm = first_step(stability.Cell(name, chunk=16, length=length, gates=gates))
    assert 7 < bits < 9, "a fresh model knows nothing of bytes"
    assert 0 < norm < LIMIT


@pytest.mark.parametrize("name", ["moneta", "memora"])
def test_outer_gradients_stay_small_over_long_sequences_as_a_model_learns(name):
    """Memora with LN's usual eps of 1e-5 and a W1 of 0.5 had 2e5 at step 51, when hidden units fell silent."""
    outcome = stability.train(stability.Cell(name, chunk=64, length=2048), steps=60)
    assert max(outcome.norms) < LIMIT and outcome.bits[59] < 5


def test_a_norm_that_is_not_a_number_is_not_stable():
    outcome = stability.Outcome(stability.Cell("yaad", 16, 256), (1.0, float("nan"), 1.0), (1.0, 1.0, 1.0), 0.0)
    assert not outcome.stable
    assert "| nan |" in stability.table([outcome]) and "| NO |" in stability.table([outcome])


@pytest.mark.slow
def test_the_whole_grid_stays_finite_and_small_where_it_is_asked_for(tmp_path):
    """200 steps a cell, half an hour and more; the page it writes is benchmarks/results/stability.md."""
    outcomes = stability.main(["--out", str(tmp_path / "stability.md")])
    assert len(outcomes) == 24 and all(len(outcome.norms) == stability.STEPS for outcome in outcomes)
    for outcome in outcomes:
        assert torch.isfinite(torch.tensor(outcome.norms + outcome.bits)).all(), outcome.cell
        assert max(outcome.norms[0], outcome.norms[30]) < LIMIT, outcome.cell
    assert sum(outcome.stable for outcome in outcomes) >= 22, "single steps above the limit are rare"
