"""Every preset against somebody else's implementation: outputs, final memory, gradients of all inputs, in float64."""

import json

import pytest
import torch
from oracles.presets import TOLERANCE, measure, preset
from oracles.table import ORACLES

import miras
from miras.evaluate import describe
from miras.rule import Rule
from miras.variants import VARIANTS


def test_every_variant_has_an_oracle():
    assert set(ORACLES) == set(VARIANTS)


def engines(name):
    mixer = preset(name)
    if not isinstance(mixer, Rule):
        return ["auto"]
    able = [n for n, said in miras.explain(mixer).items() if said in ("chosen", "possible")]
    # Oracles have gates per channel, and momentum then has no native kernel.
    return [n for n in able if not (n == "native" and mixer.algorithm.slots)]


@pytest.mark.parametrize(("name", "engine"), [(n, e) for n in VARIANTS for e in engines(n)])
def test_preset_is_its_oracle(name, engine):
    errors = measure(name, engine)
    limit = TOLERANCE.get(name, 1e-10)
    worst = {n: e for n, e in errors.items() if not e <= limit}
    assert not worst
    assert torch.tensor(list(errors.values())).isfinite().all()


def test_the_numbers_that_miras_list_shows_are_these():
    shown = json.loads(describe.ORACLES.read_text(encoding="utf-8"))
    assert {n: row["oracle"] for n, row in shown.items()} == {n: ORACLES[n].by for n in VARIANTS}, (
        "run python tests/oracles/measure.py"
    )
    for name, row in shown.items():
        assert 0 <= row["error"] <= TOLERANCE.get(name, 1e-10)
