"""Models learn small tasks from nothing, and what is measured of them is kept."""

import json
import math

import pytest
import torch

from miras.engines import run
from miras.errors import Diverged, UsageError
from miras.evaluate import scratch
from miras.evaluate.compare import compare, mean_of, settle
from miras.evaluate.scratch import ScratchConfig, learn
from miras.evaluate.tasks import TASKS, Memorisation, NoisyRecall, Regression
from miras.report.figures import Curves
from miras.report.results import task_sections
from miras.report.table import Table

SMALL = {"dim": 16, "layers": 1, "heads": 1, "steps": 60, "batch": 512, "learning_rate": 2e-2}
TASK = Memorisation(vocabulary=17, train=(16,), test=(16, 32), examples=16)


def quiet(*_):
    pass


@pytest.mark.parametrize("model", ["yaad", "gated_deltanet", "transformer"])
def test_a_small_task_is_learned(model):
    _, rows = learn(TASK, ScratchConfig(model, **SMALL), quiet)
    assert [row["length"] for row in rows] == [16, 32]
    assert all(row["accuracy"] > 0.9 for row in rows), rows


def test_the_seed_decides():
    config = {**SMALL, "steps": 10}
    told = [[], [], []]
    for seed, said in zip((0, 0, 1), told, strict=True):
        learn(TASK, ScratchConfig("yaad", **config, seed=seed), lambda *words, said=said: said.append(words))
    assert told[0] == told[1] != told[2]
    assert [words[:2] for words in told[0]] == [(step, 10) for step in range(1, 11)]


def test_logits_are_made_only_where_something_is_asked():
    model = ScratchConfig(**SMALL).build(TASK).eval()
    examples = TASK.build(0, 64).test[16]
    logits, targets = scratch._answers(model, examples)
    asked = examples.targets != -100
    torch.testing.assert_close(logits, model(examples.inputs).logits[asked])
    assert torch.equal(targets, examples.targets[asked])


def test_heavy_noise_reaches_the_embedding_where_it_is():
    asked = NoisyRecall(vocabulary=16, pairs=4, repeats=2, test=(("heavy", 0.4),), examples=8)
    model = ScratchConfig(**SMALL).build(asked).eval()
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    examples = asked.build(0).test["heavy", 0.4]
    scratch._answers(model, examples)
    moved = (seen[0] != model.get_input_embeddings()(examples.inputs)).any(-1)
    assert torch.equal(moved, examples.noise > 0)


@pytest.mark.parametrize("name", ["yaad", "delta_product", "atlas", "transformer"])
def test_noise_inside_reaches_the_values_of_every_layer_and_nothing_else(name, monkeypatch):
    asked = NoisyRecall(vocabulary=16, pairs=4, repeats=2, test=(("inside", 0.4),), examples=8)
    model = ScratchConfig(name, **SMALL | {"layers": 2}).build(asked).eval()
    examples = asked.build(0).test["inside", 0.4]
    calls: list[tuple[torch.Tensor, ...]] = []

    def watched(rule, q, k, v, *rest, **named):
        calls.append((q, k, v))
        return run(rule, q, k, v, *rest, **named)

    monkeypatch.setattr("miras.layer.run", watched)
    for part in (examples, examples._replace(noise=None)):
        scratch._answers(model, part)
    (q, k, v), second, *clean = calls
    assert torch.equal(q, clean[0][0]) and torch.equal(k, clean[0][1])
    steps = v.shape[1] // examples.inputs.shape[1]
    moved = (v - clean[0][2]).flatten(2).unflatten(1, (-1, steps)).flatten(2)
    assert torch.equal((moved != 0).all(-1), examples.noise > 0)
    assert torch.equal((moved != 0).any(-1), examples.noise > 0)
    size = clean[0][2].square().mean().sqrt()
    torch.testing.assert_close(moved.square().mean(-1).sqrt(), size * examples.noise, rtol=0.6, atol=0)
    # The largest noise stands out in the second layer as well, which no norm between the layers could let through.
    worst = int(examples.noise.argmax())
    loud = second[2].square().flatten(2).unflatten(1, (-1, steps)).flatten(2).mean(-1).sqrt().flatten()
    assert int(loud.argmax()) == worst and loud[worst] > 10 * loud.median()


@pytest.mark.parametrize("model", ["gated_deltanet", "transformer"])
def test_a_regression_is_learned(model):
    asked = Regression(states=2, readings=1, span=16, test=(0.0,), examples=64)
    (row,) = learn(asked, ScratchConfig(model, **SMALL | {"steps": 300}), quiet)[1]
    assert row["rate"] == 0 and row["error"] < (0.3 if model == "gated_deltanet" else 0.9)


def test_a_reading_reaches_the_memory_as_large_as_it_is(monkeypatch):
    model, values = ScratchConfig("gated_deltanet", **SMALL).build(Regression()), []

    def watched(rule, q, k, v, *rest, **named):
        values.append(v)
        return run(rule, q, k, v, *rest, **named)

    monkeypatch.setattr("miras.layer.run", watched)
    readings = torch.randn(2, 3, 20)
    for scale in (1.0, 1024.0):
        model(readings * scale)
    torch.testing.assert_close(values[1], values[0] * 1024, rtol=0, atol=0)


def test_a_lost_training_says_so(monkeypatch):
    monkeypatch.setattr(scratch, "_loss", lambda model, _: next(model.parameters()).sum() * math.nan)
    with pytest.raises(Diverged, match=r"yaad was lost at step 1: the loss is nan. Try --set learning_rate=7e-03"):
        learn(TASK, ScratchConfig("yaad", **SMALL), quiet)


def test_a_seed_that_diverged_is_a_result(tmp_path, monkeypatch, capsys):
    plain, calls = learn, []

    def lost_but_for_one(task, config, report):
        calls.append((config.model, config.seed))
        if config.model == "retnet" or config.seed == 1:
            raise Diverged(f"{config.model} was lost at step 3.")
        return plain(task, config, report)

    monkeypatch.setattr("miras.evaluate.compare.learn", lost_but_for_one)
    training = ScratchConfig(**SMALL | {"steps": 10})
    for _ in range(2):
        found = compare("memorisation", TASK, training, ["yaad"], 3, tmp_path)
        (result,) = found["models"].values()
        assert result["diverged"] == ["yaad was lost at step 3."]
        assert all(len(row["accuracy"]["values"]) == 2 for row in result["rows"])
        with pytest.raises(Diverged, match="retnet was lost at step 3"):
            compare("memorisation", TASK, training, ["retnet"], 1, tmp_path)
    assert len(calls) == 4, "what is lost is not tried again"
    assert capsys.readouterr().err.count("was lost at step 3") == 2
    (table,) = (section for section in task_sections(found) if isinstance(section, Table))
    assert table.note == "Accuracy by length. yaad: 1 of its seeds diverged."


@pytest.mark.parametrize(("highest", "log"), [(0.6, ""), (6.0, "y")])
def test_errors_that_differ_by_tens_have_a_logarithmic_axis(highest, log):
    rows = [{"rate": rate, "error": {"values": [value]}} for rate, value in ((0.0, 0.03), (0.2, highest))]
    _, curves = task_sections({"task": "regression", "models": {"yaad": {"rows": rows}}})
    assert isinstance(curves, Curves) and curves.log == log


def test_a_rule_from_a_file(tmp_path):
    rule = ScratchConfig("gated_deltanet", **SMALL).base.mixers[0]
    (tmp_path / "mine.json").write_text(json.dumps({"mixer": rule.to_config(), "dim": 999, "steps": 7}))
    config = ScratchConfig(str(tmp_path / "mine.json"), **SMALL)
    assert config.base.mixers == (rule,) and config.base.dim == 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "yad"}, "Did you mean 'yaad'"),
        ({"steps": 1}, "10 at least"),
        ({"dim": 30, "heads": 4}, "multiple of the 4 heads"),
        ({"learning_rate": -1.0}, "learning-rate"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        ScratchConfig(**settings)


def test_mean_and_interval():
    assert mean_of([0.5]) == (0.5, None, [0.5])
    mean, interval, values = mean_of([1.0, 2.0, 3.0])
    assert (mean, values) == (2.0, [1.0, 2.0, 3.0]) and interval == pytest.approx(4.303 / math.sqrt(3))
    assert mean_of([0.0, 1.0] * 50)[1] == pytest.approx(1.984 * 0.50252 / 10, rel=1e-3)


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    task, training = settle(
        TASKS["parity"], {"train": "8", "test": "8,16", "examples": "4", "steps": "10", "dim": "8", "batch": "32"}
    )
    plain, calls = learn, []

    def counted(task, config, report):
        calls.append((config.model, config.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(task, config, report)

    monkeypatch.setattr("miras.evaluate.compare.learn", counted)
    arguments = ("parity", task, training, ["yaad", "retnet"], 2, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(*arguments)
    assert len(list(tmp_path.glob("*.json"))) == 2
    results = compare(*arguments)
    assert calls == [("yaad", 0), ("yaad", 1), ("retnet", 0), ("retnet", 0), ("retnet", 1)]
    assert compare(*arguments) == results and len(calls) == 5
    compare(*arguments[:3], ["yaad"], 1, tmp_path, again=True)
    assert len(calls) == 6
    other, _ = settle(TASKS["parity"], {"train": "8", "test": "8", "examples": "4"})
    compare("parity", other, training, ["yaad"], 1, tmp_path)
    assert len(calls) == 7, "another task is another result"
    row = results["models"]["retnet"]["rows"][1]
    assert row["length"] == 16 and len(row["accuracy"]["values"]) == 2 and row["accuracy"]["interval"] >= 0
    assert results["models"]["yaad"]["parameters"] > 0 and results["models"]["yaad"]["state_bytes"] > 0
