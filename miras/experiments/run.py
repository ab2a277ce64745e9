"""Doing an experiment: a folder for each run and a file for each result, so that what is there is not done again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from miras.data import load_corpus, load_tokenizer, pack
from miras.errors import Diverged, MirasError
from miras.evaluate.compare import compare, mean_of
from miras.evaluate.scratch import ScratchConfig
from miras.evaluate.tasks import Positions, SyntheticTask
from miras.experiments.plan import Experiment, Model, TaskExperiment, TextExperiment
from miras.process import set_threads
from miras.report.figures import Curves, Series
from miras.report.results import diverged, task_sections
from miras.report.runs import report
from miras.report.sections import Section, plain
from miras.report.table import Column, Row, Table
from miras.report.words import Notes
from miras.train.config import TrainConfig
from miras.train.files import write_text
from miras.train.many import Job, train_many
from miras.train.parameters import equal_hidden
from miras.train.progress import say
from miras.train.summary import Summary

CHOSEN, DIFFERENCES = "Learning rates", "Against {}"

FAR = 6
"""Positions of a table: as many octaves as reach from half the training length of small models to 32 times it."""


def run(plan: Experiment, out: Path, jobs: int) -> list[Section]:
    """Do what is not done yet.

    Args:
        plan: the experiment.
        out: its folder; trained models stand beside it, in `runs`, where other experiments find them.
        jobs: training runs side by side.

    Returns:
        The sections of its page: what the paper says, tables, curves, how to do it again.

    Raises:
        MirasError: a training run failed; or a model diverged at every learning rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = _on_text(plan, out, jobs) if isinstance(plan, TextExperiment) else _on_task(plan, out, jobs)
    return [Notes((("The paper.", plan.claim),)), *sections]


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


# -- language models --------------------------------------------------------------------------------------------------


def _on_text(plan: TextExperiment, out: Path, jobs: int) -> list[Section]:
    configs = {name: model.config(name, **plan.training) for name, model in plan.models.items()}
    shared = out.parent
    files = _files(plan.models, equal_hidden(configs, **plan.training), shared, **plan.training)
    cache = shared / "data"
    _tokenise(configs, cache)

    def job(name: str, rate: float, seed: int) -> Job:
        folder = shared / "runs" / f"{files[name].stem}-{rate:g}-{seed}"
        words = ("train", str(files[name]), f"--learning-rate={rate}", f"--seed={seed}", f"--cache={cache}")
        return Job(f"{name}, {rate:g}, seed {seed}", folder, configs[name].steps, words)

    def bits(names: Sequence[str], rate: float) -> list[float | None]:
        first = [job(name, rate, 0) for name in names]
        train_many(first, jobs, may_diverge=True)
        return [_bits(made) for made in first]

    tried = _search(plan, bits)
    best = {name: _best(found, name) for name, found in tried.items()}
    rest = [job(name, best[name], seed) for seed in range(1, plan.seeds) for name in plan.models]
    train_many(rest, jobs, may_diverge=True)
    runs = {name: [job(name, best[name], seed) for seed in range(plan.seeds)] for name in plan.models}
    done = {name: [j.out for j in found if j.finished] for name, found in runs.items()}
    sections: list[Section] = [_differences(plan, runs)] if len(runs) > 1 else []
    sections += _against_numbers(plan, runs)
    if len(plan.rates) > 1:
        sections.append(_sweep(tried, "Validation bits per byte"))
    names = {str(folder): name for name, folders in done.items() for folder in folders}
    for task, asked in plan.tasks.items():
        found = compare(task, asked, None, list(names), 1, out / "results")
        sections += task_sections(found, names)
        if isinstance(asked, Positions):
            sections.append(_by_position(plan, runs, found["models"]))
    page = report([str(folder) for folders in done.values() for folder in folders])
    return [*page.sections, *sections]


def _files(models: Mapping[str, Model], hidden: Mapping[str, int], out: Path, **shared: Any) -> dict[str, Path]:
    """A configuration file for each model, named by what it says: experiments that have a model in common share it."""
    files = {}
    for name, model in models.items():
        config = dataclasses.asdict(model.config(name, **shared))
        given = {n: config[n] for n in ("model", "mixer", *shared, *model.fields)} | {"hidden": hidden.get(name)}
        text = yaml.safe_dump(given, sort_keys=False)
        files[name] = out / "models" / f"{slug(name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        write_text(files[name], text)
    return files


def _tokenise(configs: Mapping[str, TrainConfig], cache: Path) -> None:
    """Once, before runs side by side look for it."""
    config = next(iter(configs.values()))
    corpus = load_corpus(config.data)
    if corpus.hash is not None:
        pack(corpus, load_tokenizer(config.tokenizer, corpus), config.context, cache)


def _bits(job: Job) -> float | None:
    return Summary.read(job.out / "summary.json").val_bits_per_byte if job.finished else None


def _differences(plan: TextExperiment, runs: Mapping[str, list[Job]]) -> Table:
    """Of validation bits per byte, seed by seed."""
    reached = {name: [_bits(job) for job in found] for name, found in runs.items()}
    base, rows = reached[plan.baseline], []
    for name, found in reached.items():
        values = [x - b for x, b in zip(found, base, strict=True) if x is not None and b is not None]
        if values and name != plan.baseline:
            mean, interval, _ = mean_of(values)
            said = {"difference": f"{mean:+.3f}", "95 % interval": "" if interval is None else f"± {interval:.3f}"}
            rows.append(Row(name, said))
    columns = (Column("difference", "bits per byte"), Column("95 % interval"))
    note = "Differences of runs with the same seed; below zero is better."
    note += diverged({name: found.count(None) for name, found in reached.items()})
    return Table(columns, tuple(rows), DIFFERENCES.format(plan.baseline), note)


def _by_position(plan: TextExperiment, runs: Mapping[str, list[Job]], found: Mapping[str, Any]) -> Table:
    """The same at the last positions of `Positions`: what the text does to all models alike is gone."""

    def bits(job: Job) -> dict[str, float]:
        return {f"{row['position']:,}": row["bits_per_byte"]["mean"] for row in found[str(job.out)]["rows"]}

    columns: dict[str, Column] = {}
    rows = []
    for name, jobs in runs.items():
        done = [(a, b) for a, b in zip(jobs, runs[plan.baseline], strict=True) if a.finished and b.finished]
        if name == plan.baseline or not done:
            continue
        pairs = [(bits(ours), bits(theirs)) for ours, theirs in done]
        last = list(pairs[0][0])[-FAR:]
        columns |= {position: Column(position, form="fixed") for position in last}
        rows.append(Row(name, {at: _signed([ours[at] - theirs[at] for ours, theirs in pairs]) for at in last}))
    title = f"positions, {DIFFERENCES.format(plan.baseline).lower()}"
    note = "Bits per byte from each position to the next, differences of runs with the same seed; below zero is better."
    return Table(tuple(columns.values()), tuple(rows), title, note)


def _signed(values: Sequence[float]) -> str:
    """The mean of some differences and its interval."""
    mean, interval, _ = mean_of(values)
    return f"{mean:+.3f}" if interval is None else f"{mean:+.3f} ± {interval:.3f}"


def _against_numbers(plan: TextExperiment, runs: Mapping[str, list[Job]]) -> list[Curves]:
    """Validation bits per byte against numbers that models differ in."""
    sections = []
    for number, curves in plan.sweeps.items():
        series = []
        for name, models in curves.items():
            for seed in range(plan.seeds):
                reached = {x: _bits(runs[model][seed]) for x, model in models.items() if model in runs}
                points = {x: bits for x, bits in reached.items() if bits is not None}
                if len(points) > 1:
                    series.append(Series(name, tuple(points), tuple(points.values())))
        if series:
            places = [x for curve in series for x in curve.x]
            log = "x" if max(places) > 8 * min(places) else ""
            sections.append(Curves(number, "bits per byte", tuple(series), f"By {number}", log=log))
    return sections


# -- synthetic tasks --------------------------------------------------------------------------------------------------


def _on_task(plan: TaskExperiment, out: Path, jobs: int) -> list[Section]:
    fields = [field.name for field in dataclasses.fields(ScratchConfig)]
    own = {n: {f: x for f, x in m.fields.items() if f in fields} for n, m in plan.models.items()}
    shape = {name: getattr(plan.training, name) for name in ("dim", "layers", "heads")}
    hidden = equal_hidden({name: model.config(name, **shape) for name, model in plan.models.items()}, **shape)
    files = _files(plan.models, hidden, out.parent)

    def call(name: str, rate: float, seeds: int) -> tuple[Any, ...]:
        training = dataclasses.replace(plan.training, **own[name] | {"learning_rate": rate})
        return plan.task, plan.asked, training, [str(files[name])], seeds, out / "results"

    with _side_by_side(min(jobs, len(plan.models))) as each:

        def wrong(names: Sequence[str], rate: float) -> list[float | None]:
            found = each(_unless_lost, [call(name, rate, 1) for name in names])
            return [None if result is None else _missed(plan.asked, result["rows"]) for result in found]

        tried = _search(plan, wrong)
        best = {name: _best(found, name) for name, found in tried.items()}
        models = dict(zip(best, each(_learned, [call(*chosen, plan.seeds) for chosen in best.items()]), strict=True))
    columns = (
        Column("parameters", form="integer"),
        Column("state", form="bytes"),
        Column("learning rate"),
        Column("seconds", "a seed", form="integer"),
    )
    rows = []
    for name, found in models.items():
        about = {"parameters": found["parameters"], "state": found["state_bytes"], "learning rate": best[name]}
        rows.append(Row(name, about | {"seconds": found["seconds"] / plan.seeds}))
    sections = [*task_sections({"task": plan.task, "models": models}), Table(columns, tuple(rows), "Models")]
    measure = "Error" if plan.asked.less else "Share of wrong answers"
    return [*sections, _sweep(tried, measure)] if len(plan.rates) > 1 else sections


def _learned(*given: Any) -> dict[str, Any]:
    """What `compare` finds of its one model."""
    (found,) = compare(*given)["models"].values()
    return found


def _unless_lost(*given: Any) -> dict[str, Any] | None:
    try:
        return _learned(*given)
    except Diverged as lost:  # at this learning rate, which is all that was asked
        say(str(lost))
        return None


def _missed(task: SyntheticTask, rows: Sequence[Mapping[str, Any]]) -> float:
    """The less the better, a mean over levels."""
    (measure,) = task.measures
    mean = statistics.fmean(row[measure]["mean"] for row in rows)
    return mean if measure in task.less else 1 - mean


Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]


@contextmanager
def _side_by_side(jobs: int) -> Iterator[Each]:
    """Calls a function with each of some arguments, `jobs` at once in processes that share out this one's threads."""
    if jobs <= 1:
        yield lambda call, arguments: [call(*given) for given in arguments]
        return
    start = partial(_start, max(1, torch.get_num_threads() // jobs))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start) as pool:
        yield lambda call, arguments: list(pool.map(call, *zip(*arguments, strict=True)))


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a stopped command ends in the words of one process
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of several processes would draw over each other: rich writes lines
    set_threads(threads)


# -- both -------------------------------------------------------------------------------------------------------------

Tried = Mapping[str, dict[float, float | None]]
"""Of each model, what the first seed reached at each learning rate that it was given; None where it was lost."""


def _search(plan: Experiment, reached: Callable[[Sequence[str], float], list[float | None]]) -> Tried:
    """Try learning rates; what is reached is the better the less it is."""
    tried: Tried = {name: {} for name in plan.models}
    climbing = list(plan.models)
    for rate in sorted(plan.rates):
        for name, value in zip(climbing, reached(climbing, rate), strict=True):
            tried[name][rate] = value
        # A model that has become worse with the rate gets no higher one.
        climbing = [name for name in climbing if _best(tried[name], name) == rate]
    return tried


def _best(reached: Mapping[float, float | None], name: str) -> float:
    left = {rate: value for rate, value in reached.items() if value is not None}
    if not left:
        raise MirasError(f"{name} diverged at every learning rate: {', '.join(f'{rate:g}' for rate in reached)}.")
    return min(left, key=left.__getitem__)


def _sweep(tried: Tried, measure: str) -> Table:
    rates = sorted({rate for found in tried.values() for rate in found})
    columns = tuple(Column(f"{rate:g}", "", "low", "fixed") for rate in rates)
    rows = [Row(n, {f"{r:g}": x for r, x in found.items()}, f"took {_best(found, n):g}") for n, found in tried.items()]
    note = f"{measure} of the first seed; a higher rate is tried as long as the last one was better."
    return Table(columns, tuple(rows), CHOSEN, note)


def as_json(sections: list[Section], about: Mapping[str, Any]) -> str:
    """What `miras report` reads, with what it is about; kept small: a section a line, six digits a number."""
    content = {**about, "sections": [plain(section) for section in sections]}
    short = json.loads(json.dumps(content), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    lines = ",\n".join(json.dumps(section) for section in short.pop("sections"))
    return f'{json.dumps(short)[:-1]}, "sections": [\n{lines}\n]}}\n'
