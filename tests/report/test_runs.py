"""Run folders as they are on the disk, without the training that fills them."""

import json

import pytest

from miras.errors import UsageError
from miras.report import report
from miras.report.sections import merged
from miras.train.config import TrainConfig
from miras.train.folder import begin
from miras.train.summary import Summary

ABOUT = {
    "name": "words",
    "hash": "9f2c",
    "train_tokens": 1000,
    "validation_tokens": 100,
    "bytes_per_token": 1.0,
    "tokenizer": "bytes",
}


@pytest.fixture
def run(tmp_path):
    def write(name, bits, finished=True, about=ABOUT, parameters=1000, **changes):
        config = TrainConfig(**{"model": "yaad", "out": str(tmp_path / name), "steps": 4, **changes})
        begin(config, about)
        lines = [{"step": s, "bits_per_byte": 8.0 / s, "loss": 1.0} for s in range(1, 5)]
        lines.append({"step": 4, "val_loss": 1.0, "val_bits_per_byte": bits})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = Summary(
            config.model, "MLP x Huber", parameters, 4, 4, 1.0, bits, 9.0, 1.0, 7, 1, about, {"torch": "2"},
            config.seed, f"miras train --seed {config.seed}",
        )  # fmt: skip
        if finished:
            summary.write(tmp_path / name / "summary.json")
        return str(tmp_path / name)

    return write


def table(page):
    return next(s for s in merged(page.sections) if s.kind == "table")


def test_seeds_become_a_mean_with_an_interval(run):
    html = report([run("a", 2.0), run("b", 2.2, seed=1), run("c", 2.3, model="titans")]).html()
    assert "<strong>2.100</strong> <small>± 1.271</small>" in html
    assert "<td>2.300</td>" in html
    assert "yaad <small>2 seeds</small>" in html
    assert "3 training runs of 2 models on words" in html
    for fact in ("miras train yaad --out", "--seed 1", "9f2c", "torch 2", "<td>0; 1</td>"):
        assert fact in html


def test_a_folder_of_runs_and_what_tells_runs_of_one_model_apart(run, tmp_path):
    run("a", 2.0)
    run("b", 2.2, learning_rate=1e-3)
    names = [row.name for row in table(report([str(tmp_path)])).rows]
    assert names == ["yaad, learning rate 0.002", "yaad, learning rate 0.001"]


def test_what_a_resumed_run_may_change_makes_no_other_model(run):
    rows = table(report([run("a", 2.0), run("b", 2.2, seed=1, eval_every=2, threads=1)])).rows
    assert {row.name for row in rows} == {"yaad"}


def test_loss_curves_of_training_and_validation(run):
    whole, half = (s for s in merged(report([run("a", 2.0)]).sections) if s.kind == "curves")
    assert [(s.style, s.x) for s in whole.series] == [("line", (1, 2, 3, 4)), ("points", (4,))]
    assert half.series[0].x == (2, 3, 4)


def test_an_unequal_race_is_said(run):
    other = {**ABOUT, "hash": "else"}
    page = report([run("a", 2.0), run("b", 2.0, model="titans", steps=8, about=other, parameters=2000)])
    assert [what for what, _ in page.warnings] == ["Unequal data.", "Unequal training.", "Unequal models."]


def test_a_run_that_is_not_finished_has_its_curve(run):
    page = report([run("a", 2.0), run("b", 2.0, seed=1, finished=False)])
    assert page.warnings[0][0] == "Not finished:" and "miras train --resume" in page.warnings[0][1]
    assert "<td>2.000</td>" in page.html()


def test_paths_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no such run folder or result file"):
        report([str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match=r"got one without config\.yaml"):
        report([str(tmp_path)])


def test_a_damaged_summary_is_no_traceback(run):
    folder = run("a", 2.0)
    with pytest.raises(UsageError, match="cannot be read"):
        open(folder + "/run.json", "w").close()
        report([folder])
