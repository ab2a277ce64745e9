"""Experiments at the smallest scale there is: searched, repeated, resumed, tabulated."""

import json
from dataclasses import replace
from functools import reduce

import pytest
from small_run import write_text
from typer.testing import CliRunner

from miras import variants
from miras.cli import main
from miras.errors import Diverged, MirasError, UsageError
from miras.evaluate.scratch import ScratchConfig
from miras.evaluate.tasks import MQAR, NoisyRecall, Positions, Regression, SyntheticTask
from miras.experiments import EXPERIMENTS, SCALES, experiment
from miras.experiments.command import conduct
from miras.experiments.plan import TaskExperiment, TextExperiment, model, models
from miras.experiments.run import _differences, _search, _side_by_side, _unless_lost
from miras.train.parameters import equal_hidden, parameters


@pytest.fixture(scope="module")
def on_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    training = {"dim": 16, "layers": 1, "heads": 2, "context": 32, "batch": 64, "steps": 3, "data": write_text(folder)}
    training |= {"eval_windows": 2}
    rule = replace(variants.yaad(), first_order=True)
    compared = {"first order": model(rule, conv=0), **models("deltanet")}
    tasks = {"positions": Positions(data=training["data"], length=64, windows=2)}
    # The model that is not there is one that was not asked for (--only).
    sweeps = {"order": {"yaad": {1.0: "first order", 2.0: "deltanet", 3.0: "third order"}, "none": {1.0: "deltanet"}}}
    plan = TextExperiment("Small", "Nothing.", compared, training, (1e-3, 1e-2), 2, "deltanet", tasks, sweeps)
    tables = list(conduct("small", "laptop", plan, folder / "out", 2, folder / "results"))
    return plan, folder, tables


def test_a_search_a_repetition_and_a_page(on_text):
    plan, folder, tables = on_text
    found = json.loads((folder / "results" / "small-laptop.json").read_text())
    assert found == json.loads((folder / "out" / "results.json").read_text())
    sections = {(s["kind"], s["title"]): s for s in found["sections"]}
    results = sections["table", "Results"]["rows"]
    assert [row["name"] for row in results] == [name for name in plan.models for _ in range(2)]
    rates = sections["table", "Learning rates"]
    assert [column["name"] for column in rates["columns"]] == ["0.001", "0.01"]
    best = {row["name"]: min(row["values"], key=row["values"].get) for row in rates["rows"]}
    runs = {path.name for path in (folder / "runs").iterdir() if (path / "summary.json").exists()}
    for name, rate in best.items():
        assert sum(run.startswith(name.replace(" ", "-")) and run.endswith(f"-{rate}-1") for run in runs) == 1
    assert len(runs) == 2 * 2 + 2
    curves = sections["curves", "By order"]["series"]
    assert [(curve["name"], curve["x"]) for curve in curves] == [("yaad", [1.0, 2.0])] * 2
    reached = [row["values"]["Validation"] for row in results]
    assert [y for curve in curves for y in curve["y"]] == [reached[i] for i in (0, 2, 1, 3)]
    differences = sections["table", "Against deltanet"]["rows"]
    assert [row["name"] for row in differences] == ["first order"]
    bits = {name: [r["values"]["Validation"] for r in results if r["name"] == name] for name in plan.models}
    mean = sum(a - b for a, b in zip(bits["first order"], bits["deltanet"], strict=True)) / 2
    assert differences[0]["values"]["difference"] == f"{mean:+.3f}"
    drawn = sections["curves", "positions"]["series"]
    assert [curve["name"] for curve in drawn] == [name for name in plan.models for _ in range(2)]
    (far,) = sections["table", "positions, against deltanet"]["rows"]
    assert list(far["values"]) == ["1", "2", "4", "8", "16", "32"] and far["name"] == "first order"
    mean = sum(a["y"][3] - b["y"][3] for a, b in zip(drawn[:2], drawn[2:], strict=True)) / 2
    assert far["values"]["8"].startswith(f"{mean:+.3f} ± ")
    assert "Small" in (folder / "out" / "report.html").read_text() and len(tables) == 5


def test_what_is_there_is_not_done_again(on_text, monkeypatch):
    plan, folder, _ = on_text
    monkeypatch.setattr("miras.train.many.Job.start", lambda *given: pytest.fail("trained again"))
    assert len(list(conduct("small", "laptop", plan, folder / "out", 1, None))) == 5


def test_seeds_that_diverged_are_said_beneath_the_differences(monkeypatch):
    plan = TextExperiment("", "", models("yaad", "moneta", "memora"), {}, (1.0,), 3, "yaad")
    reached = {"yaad": [2.0, 2.5, None], "moneta": [2.1, None, 2.0], "memora": [None] * 3}
    monkeypatch.setattr("miras.experiments.run._bits", lambda bits: bits)
    table = _differences(plan, reached)
    assert [(row.name, row.values["difference"]) for row in table.rows] == [("moneta", "+0.100")]
    said = (" yaad: 1 of its seeds diverged.", " moneta: 1 of its seeds diverged.", " memora: 3 of its seeds diverged.")
    assert table.note.endswith("better." + "".join(said))


def test_a_synthetic_task(tmp_path):
    asked = MQAR(vocabulary=64, train=((16, 2),), test=((16, 2), (16, 4)), examples=8)
    compared = {"yaad": model("yaad"), "deltanet": model("deltanet", heads=1)}
    training = ScratchConfig(dim=16, layers=1, steps=10, batch=64)
    plan = TaskExperiment("Small", "Nothing.", compared, "mqar", asked, training, (1e-3, 1e-2), 2)
    shown = list(conduct("recall", "laptop", plan, tmp_path, 1, None))
    found = json.loads((tmp_path / "results.json").read_text())
    accuracy, about, rates = (s for s in found["sections"] if s["kind"] == "table")
    assert [row["name"] for row in accuracy["rows"]] == ["yaad"] * 2 + ["deltanet"] * 2 and len(shown) == 3
    assert all(0 <= x <= 1 for row in accuracy["rows"] for x in row["values"].values())
    assert about["rows"][1]["values"]["state"] == 16 * 16 * 4
    assert "2 models, 2 seeds. 1 layer of 16 channels, 10 steps of 64 tokens." in (tmp_path / "report.html").read_text()
    for row, chosen in zip(rates["rows"], about["rows"], strict=True):
        assert chosen["values"]["learning rate"] == float(min(row["values"], key=row["values"].get))


def test_a_synthetic_task_that_counts_errors(tmp_path):
    asked = Regression(states=2, readings=1, span=8, test=(0.0, 0.4), examples=8)
    training = ScratchConfig(dim=16, layers=2, heads=1, steps=10, batch=64)
    plan = TaskExperiment("Small", "Nothing.", models("deltanet"), "regression", asked, training, (1e-4, 1e-1), 1)
    shown = [table.title for table in conduct("regression", "laptop", plan, tmp_path, 1, None)]
    assert shown == ["regression", "Models", "Learning rates"]
    found = json.loads((tmp_path / "results.json").read_text())
    error, about, rates = (s for s in found["sections"] if s["kind"] == "table")
    assert rates["note"].startswith("Error of the first seed")
    (tried,) = (row["values"] for row in rates["rows"])
    assert about["rows"][0]["values"]["learning rate"] == float(min(tried, key=tried.get))
    mean = sum(error["rows"][0]["values"].values()) / 2
    assert min(tried.values()) == pytest.approx(mean, rel=1e-4)


def test_tasks_side_by_side():
    with _side_by_side(2) as each:
        assert each(divmod, [(7, 2), (9, 4), (5, 3)]) == [(3, 1), (2, 1), (1, 2)]
        assert each(divmod, []) == []


def test_a_rate_is_raised_as_long_as_it_helps():
    plan = TaskExperiment("", "", models("yaad", "moneta", "memora"), "", MQAR(), ScratchConfig(), (4.0, 1.0, 2.0), 1)
    reaches = {
        "yaad": {1.0: 0.3, 2.0: 0.2, 4.0: None},
        "moneta": {1.0: 0.3, 2.0: 0.2, 4.0: 0.1},
        "memora": {1.0: 0.3, 2.0: 0.3},
    }
    assert _search(plan, lambda names, rate: [reaches[name][rate] for name in names]) == reaches
    with pytest.raises(MirasError, match=r"yaad diverged at every learning rate: 1\."):
        _search(plan, lambda names, rate: [None] * len(names))


def test_a_lost_training_is_a_rate_that_is_not_taken(monkeypatch, capsys):
    def compared(*given):
        raise Diverged("yaad was lost at step 3.")

    monkeypatch.setattr("miras.experiments.run.compare", compared)
    assert _unless_lost("mqar") is None and "step 3" in capsys.readouterr().err


def test_a_table_for_each_kind_of_noise(tmp_path):
    levels = tuple((noise, rate) for noise in ("heavy", "inside", "value") for rate in (0.0, 0.5))
    asked = NoisyRecall(16, pairs=2, repeats=2, train=(("value", 0.0),), test=levels, examples=8)
    training = ScratchConfig(dim=16, layers=1, steps=10, batch=64)
    plan = TaskExperiment("Small", "Nothing.", models("deltanet"), "noisy_recall", asked, training, (1e-2,), 2)
    assert len(list(conduct("robustness", "laptop", plan, tmp_path, 1, None))) == 4
    found = json.loads((tmp_path / "results.json").read_text())["sections"]
    for kind in ("heavy", "inside", "value"):
        table, curves = (s for s in found if s["title"] == f"noisy recall, {kind}")
        assert [column["name"] for column in table["columns"]] == ["0", "0.5"] and len(table["rows"]) == 2
        assert [series["x"] for series in curves["series"]] == [[0.0, 0.5]] * 2


@pytest.mark.parametrize("scale", [pytest.param(s, marks=[pytest.mark.slow] * (s != "laptop")) for s in SCALES])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_of_models_of_equal_size(name, scale):
    plan = experiment(name, scale)
    if isinstance(plan, TaskExperiment):
        assert isinstance(plan.asked, SyntheticTask)
        return
    assert plan.baseline in plan.models
    configs = {n: m.config(n, **plan.training) for n, m in plan.models.items()}
    hidden = equal_hidden(configs, **plan.training)
    counts = [parameters(configs[n], width) for n, width in hidden.items()]
    assert max(counts) < 1.03 * min(counts)


@pytest.mark.parametrize("name", ["exponents", "threshold", "chunk", "eps", "context"])
def test_what_models_are_drawn_against_is_what_they_differ_in(name):
    plan = experiment(name, "laptop")
    drawn = {model for curves in plan.sweeps.values() for models in curves.values() for model in models.values()}
    assert drawn == plan.models.keys()
    for number, curves in plan.sweeps.items():
        for along in curves.values():
            found = [plan.models[n].fields.get("context") or plan.models[n].mixers[0] for n in along.values()]
            where = {"p": ("bias", "p"), "q": ("retention", "q"), "delta": ("bias", "delta"), "chunk": ("chunk",)}
            assert [reduce(getattr, where.get(number, ()), x) for x in found] == list(along)


@pytest.mark.parametrize("scale", SCALES)
def test_recall_is_at_equal_bytes_of_state(scale):
    plan = experiment("recall", scale)
    states = set()
    for compared in plan.models.values():
        heads = compared.fields.get("heads", plan.training.heads)
        head = plan.training.dim // heads
        states.add(compared.mixers[0].state_bytes(heads, head, head, 1))
    assert len(states) == 1


def test_rules_that_experiments_have_in_common_have_one_name_and_are_trained_once():
    space, parts, presets = (experiment(n, "laptop").models for n in ("space", "parts", "language_modelling"))
    assert experiment("threshold", "laptop").models["yaad"] == parts["yaad"]
    assert all(space[name] == parts[name] for name in ("yaad", "l_2 bias", "momentum"))
    assert all(space[name] == presets[name] for name in ("moneta", "yaad", "memora", "titans"))
    assert len(space) == 18


def test_only_some_models():
    assert list(experiment("parts", "laptop", 1, ["momentum"]).models) == ["yaad", "momentum"]
    assert list(experiment("recall", "laptop", only=["yaad"]).models) == ["yaad"]
    with pytest.raises(UsageError, match="Did you mean 'momentum'"):
        experiment("parts", "laptop", only=["momentun"])


def test_the_command():
    run = CliRunner().invoke
    assert all(name in run(main, ["experiment"]).output for name in (*EXPERIMENTS, *SCALES))
    paper = run(main, ["experiment", "needle", "--scale", "paper"]).output
    assert "torchrun --nproc_per_node=8 -m miras train yaad --size=340m" in paper and "GPU hours" in paper
    assert "one size" in run(main, ["experiment", "recall", "--scale", "paper"]).output
    wrong = run(main, ["experiment", "nedle"])
    assert wrong.exit_code == 2 and "Did you mean 'needle'" in wrong.output
    with pytest.raises(UsageError, match="laptop"):
        experiment("needle", "laptp")
