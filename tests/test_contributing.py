"""The text of CONTRIBUTING.md and README.md is run, so that it stays true."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import miras
from miras.mixer import mixer_from_config
from miras.registry import choices
from miras.retention import Retention
from miras.train.config import load_config

ROOT = Path(__file__).parents[1]


def _written(document: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_the_gate_of_contributing_keeps_the_contract():
    (source,) = _written("CONTRIBUTING.md")
    before = choices(Retention)
    try:
        names: dict = {"__name__": "contributing"}
        exec(compile(source, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
        gate = names["SoftThreshold"]()
        rule = miras.Rule(miras.memory.MLP(), miras.bias.L2(), gate, miras.algorithm.GradientDescent("input"), chunk=4)
        assert mixer_from_config(rule.to_config()) == rule
        q, k, v = (torch.randn(2, 13, 2, 8, dtype=torch.float64) for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        gates = {"log_alpha": -torch.rand(2, 13, 2, 1).double() / 10, "eta": torch.rand(2, 13, 2, 1).double()}
        weights = {n: w.double().requires_grad_() for n, w in rule.initial(2, 8, 8).items()}
        outputs = []
        for engine in ("chunk", "recurrence"):
            y, _ = miras.run(rule, q, k, v, gates, state=rule.init(weights, batch=2), engine=engine)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), list(weights.values()))))
        for fast, defined in zip(*outputs, strict=True):
            torch.testing.assert_close(fast, defined, rtol=1e-9, atol=1e-9)
    finally:
        # The registry is global; leave it as it was for the tests that enumerate it.
        Retention.members = before


def test_the_example_of_the_readme_runs_and_is_the_rule_of_its_file(tmp_path):
    (source,), (content,) = _written("README.md"), _written("README.md", "yaml")
    names: dict = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec", dont_inherit=True), names)
    (tmp_path / "mine.yaml").write_text(content)
    assert set(load_config(str(tmp_path / "mine.yaml"), {}).mixers) == {names["rule"]}
