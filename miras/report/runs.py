"""From run folders and result files to the sections of a page: `miras report`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miras.errors import UsageError
from miras.report.figures import Curves, Grid, HeatMap, Series, Style
from miras.report.page import Page
from miras.report.results import task_sections
from miras.report.sections import Section, built
from miras.report.table import Column, Row, Table
from miras.report.text import counted, listed
from miras.report.words import Facts, Notes, Sample, Samples
from miras.train.config import TrainConfig, read_config
from miras.train.files import read_metrics
from miras.train.folder import FREE
from miras.train.summary import Summary

KINDS: Mapping[str, type[Section]] = {cls.kind: cls for cls in (Table, Curves, HeatMap, Samples, Notes, Facts)}
PARTS: Mapping[str, type] = {"columns": Column, "rows": Row, "series": Series, "grids": Grid, "samples": Sample}

POINTS = 100  # of a smoothed curve: more would say nothing more
RESULTS, LEARNING, AGAIN = "Results", "Learning", "How to reproduce it"


def report(paths: Sequence[str], title: str = "") -> Page:
    """A page of any set of runs and results.

    Args:
        paths: run folders of `miras train`, folders of them, and JSON files: `{"sections": [...]}` as
            `miras.report.sections` says, or what `miras eval --json` prints.
        title: of the page; empty: one that names the models.

    Raises:
        UsageError: a path that is none of these, or a file that cannot be used, with the place in it.
    """
    runs = [run for path in paths for run in _runs(Path(path))]
    names = _names(runs)
    sections = [s for run, name in zip(runs, names, strict=True) for s in _run_sections(run, name)]
    files = [Path(path) for path in paths if not Path(path).is_dir()]
    sections += [section for path in files for section in file_sections(path)]
    # What one needs to do it again comes last, whatever file it is from.
    sections.sort(key=lambda section: isinstance(section, Facts))
    models = list(dict.fromkeys(names))
    what = listed(models) or listed([path.stem for path in files])
    return Page(title or f"Report on {what}", _lead(runs, models, files), sections, _warnings(runs, names))


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration, data, what was measured on the way and, once it is finished, its summary."""

    folder: Path
    config: TrainConfig
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    summary: Summary | None


def _runs(path: Path) -> list[Run]:
    if not path.exists():
        raise UsageError(f"{path}: there is no such run folder or result file.")
    if path.is_file():
        return []
    folders = [path] if (path / "config.yaml").is_file() else sorted(f.parent for f in path.glob("*/config.yaml"))
    if not folders:
        raise UsageError(
            f"{path}: expected a run folder of `miras train`, or a folder of them, got one without config.yaml."
        )
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Run:
    summary = folder / "summary.json"
    return Run(
        folder,
        TrainConfig(**read_config(folder / "config.yaml")),
        _json(folder / "run.json"),
        read_metrics(folder / "metrics.jsonl"),
        Summary.read(summary) if summary.is_file() else None,
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """What to call each run: the model, and what tells its configuration from others of that model but the seed."""
    configs = [{n: x for n, x in asdict(run.config).items() if n not in (*FREE, "seed")} for run in runs]
    names = []
    for config in configs:
        others = [other for other in configs if other["model"] == config["model"]]
        differ = [n for n in config if any(other[n] != config[n] for other in others)]
        said = [f"{n.replace('_', ' ')} {config[n]}" for n in differ if not isinstance(config[n], dict | list)]
        names.append(", ".join([config["model"], *said]))
    return names


def _run_sections(run: Run, name: str) -> list[Section]:
    train = [line for line in run.metrics if "bits_per_byte" in line]
    held_out = [line for line in run.metrics if "val_bits_per_byte" in line]
    curve = {"step": [x["step"] for x in train], "bits_per_byte": [x["bits_per_byte"] for x in train]}
    marks = {"step": [x["step"] for x in held_out], "bits_per_byte": [x["val_bits_per_byte"] for x in held_out]}
    return [_row(run, name), *loss_curves(name, curve, marks), _facts(run)]


def _row(run: Run, name: str) -> Table:
    columns = (
        Column("Parameters", form="integer"),
        Column("Steps", form="integer"),
        Column("Validation", "bits per byte", "low", "fixed"),
        Column("Training", "tokens/s", "high", "integer"),
        Column("Peak memory", "", "low", "bytes"),
    )
    summary = run.summary
    if summary is None:
        done = max((line["step"] for line in run.metrics), default=0)
        return Table(columns, (Row(name, {"Steps": done}, "not finished"),), RESULTS)
    values = (
        summary.parameters,
        summary.steps,
        summary.val_bits_per_byte,
        summary.tokens_per_second,
        summary.peak_memory_bytes,
    )
    row = Row(name, {c.name: value for c, value in zip(columns, values, strict=True)}, summary.mixer)
    return Table(columns, (row,), RESULTS)


def loss_curves(name: str, curve: Mapping[str, Sequence[Any]], marks: Mapping[str, Sequence[Any]]) -> list[Curves]:
    """The loss of one run: all of it, and its second half, where models can be told apart.

    Args:
        name: of the run.
        curve: "step" and "bits_per_byte" in training.
        marks: the same of the validations.
    """
    stride = max(1, len(curve["step"]) // POINTS)
    steps, values = list(curve["step"])[::stride], _smooth(curve["bits_per_byte"])[::stride]
    half = max([*steps, *marks["step"]], default=0) / 2
    whole = "Lines: training, each point the mean of a twenty-fifth of the run. Marks: validation."
    found = []
    for first, note in ((0, whole), (half, "The second half of the run, with an axis of its own.")):
        lines = [(x, y) for x, y in zip(steps, values) if x >= first]  # noqa: B905 (the smoothed curve is shorter)
        points = [(x, y) for x, y in zip(marks["step"], marks["bits_per_byte"], strict=True) if x >= first]
        series = _series(name, lines, "line"), _series(name, points, "points")
        found.append(Curves("training step", "bits per byte", series, LEARNING, note))
    return found


def _series(name: str, points: Sequence[tuple[float, float]], style: Style) -> Series:
    return Series(name, tuple(x for x, _ in points), tuple(y for _, y in points), style)


def _smooth(values: Sequence[float]) -> list[float]:
    """Average each value with as many neighbours before as after it, so that nothing is delayed.

    At the start, where the loss falls steeply, the windows are shorter. At the end they would only make the last points
    noisy, which reads as a trend: the curve stops at the last full window.
    """
    reach = len(values) // 50
    windows = (values[i - min(i, reach) : i + min(i, reach) + 1] for i in range(len(values) - reach))
    return [sum(window) / len(window) for window in windows]


def _facts(run: Run) -> Facts:
    config, data = run.config, run.about["data"]
    facts = {
        "Data": f"{data['name']}, {counted(data['train_tokens'], 'token')} for training, hash {data['hash']}",
        "Training": f"{counted(config.steps, 'step')} of {counted(config.batch, 'token')}, context {config.context:,}, "
        f"learning rate {config.learning_rate:g}",
        "Seeds": str(config.seed),
    }
    if run.summary is not None:
        facts["Versions"] = ", ".join(f"{package} {version}" for package, version in run.summary.versions.items())
        facts["Threads"] = str(run.summary.threads)
    return Facts((run.about["command"],), facts, AGAIN)


# -- files ------------------------------------------------------------------------------------------------------------


def read_sections(content: Any, where: str) -> list[Section]:
    """The sections of a JSON object `{"sections": [...]}`.

    Raises:
        UsageError: it is none, with the place.
    """
    listed_ = content.get("sections") if isinstance(content, dict) else None
    if not isinstance(listed_, list):
        raise UsageError(
            f'{where}: expected {{"sections": [...]}} as the head of miras/report/sections.py shows it, or what '
            "`miras eval --json` prints."
        )
    return [_section(part, f"{where}, section {i}") for i, part in enumerate(listed_)]


def _section(content: Any, where: str) -> Section:
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"{where}: expected a kind, one of {', '.join(KINDS)}, got {kind!r}.")
    # The columns and rows of a heat map are only labels.
    parts = PARTS if kind != HeatMap.kind else {"grids": Grid}
    return built(KINDS[kind], {n: x for n, x in content.items() if n != "kind"}, where, parts)


def file_sections(path: Path) -> list[Section]:
    """The sections of a file of results.

    Raises:
        UsageError: it is none, with the place.
    """
    content = _json(path)
    if isinstance(content, dict) and {"task", "models"} <= content.keys():
        return task_sections(content)
    return read_sections(content, str(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected JSON, and it cannot be read as that ({error}).") from error


# -- words ------------------------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Run], models: Sequence[str], files: Sequence[Path]) -> str:
    parts = []
    if runs:
        data = listed(list(dict.fromkeys(run.about["data"]["name"] for run in runs)))
        parts.append(f"{counted(len(runs), 'training run')} of {counted(len(models), 'model')} on {data}")
    if files:
        parts.append(counted(len(files), "file") + " of results")
    return " and ".join(parts) + "."


def _warnings(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """What makes the runs no fair race."""
    found = []
    if len({(run.about["data"]["hash"], run.about["data"]["tokenizer"]) for run in runs}) > 1:
        found.append(("Unequal data.", "The runs learned from different data; their losses do not compare."))
    tokens = {name: run.config.steps * run.config.batch for run, name in zip(runs, names, strict=True)}
    if len(set(tokens.values())) > 1:
        taken = listed([f"{name} {count:,}" for name, count in tokens.items()])
        found.append(("Unequal training.", f"Tokens trained on: {taken}."))
    sizes = [run.summary.parameters for run in runs if run.summary]
    if sizes and max(sizes) > 1.03 * min(sizes):
        found.append(
            ("Unequal models.", f"The largest has {max(sizes) / min(sizes) - 1:.0%} more parameters than the smallest.")
        )
    if unfinished := [str(run.folder) for run in runs if run.summary is None]:
        found.append(("Not finished:", f"{', '.join(unfinished)}. Go on with miras train --resume --out FOLDER."))
    return found
