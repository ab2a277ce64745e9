"""What `miras experiment` does: the list, an experiment and its page, or what the paper's scale would take."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table as RichTable

from miras.bench.flops import model_flops
from miras.bench.sizes import Sizes
from miras.experiments import EXPERIMENTS, SCALES
from miras.experiments.plan import Experiment, TaskExperiment
from miras.experiments.run import as_json, run
from miras.report.page import Page
from miras.report.sections import merged
from miras.report.table import Table, words
from miras.report.text import counted
from miras.report.words import Facts
from miras.train.config import TrainConfig
from miras.train.files import write_text
from miras.train.provenance import commit, cpu
from miras.train.run import model_config

GPUS, UTILISED, PEAK = 8, 0.35, 989e12
"""Of the estimate: an H200's bfloat16 products by its data sheet, and the share of it that a training may reach."""


WIDEST = 9
"""Columns of a table that a terminal has room for; the page has all."""


def listing() -> str:
    """The experiments and the scales, a line each."""
    lines = ["Experiments", *(f"  {name:<20} {_first(f.__doc__)}" for name, f in EXPERIMENTS.items())]
    return "\n".join([*lines, "", "Scales", *(f"  {name:<20} {scale.about}" for name, scale in SCALES.items())])


def conduct(
    name: str,
    scale: str,
    plan: Experiment,
    out: Path,
    jobs: int,
    results: Path | None,
    only: Sequence[str] = (),
) -> Iterator[RichTable]:
    """Do an experiment, write its page and numbers, and give its tables, but for very wide ones.

    Args:
        name: of the experiment.
        scale: of the experiment.
        plan: the experiment.
        out: its folder.
        jobs: training runs side by side.
        results: folder for a copy of the numbers.
        only: the models that were asked for, if not all.
    """
    kept = [f"--only={model}" for model in only]
    command = shlex.join(["miras", "experiment", name, f"--scale={scale}", f"--seeds={plan.seeds}", *kept])
    size = _size(plan, scale)
    facts = {"Scale": size, "Processor": cpu(), "Commit": commit() or "unknown"}
    sections = merged([*run(plan, out, jobs), Facts((command,), facts, "How to reproduce it")])
    lead = f"{counted(len(plan.models), 'model')}, {counted(plan.seeds, 'seed')}. {size[0].upper()}{size[1:]}."
    Page(plan.title, lead, sections).write(out / "report.html")
    text = as_json(sections, {"experiment": name, "scale": scale, "title": plan.title})
    for path in (out / "results.json", *([results / f"{name}-{scale}.json"] if results else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    for section in sections:
        if isinstance(section, Table) and len(section.columns) <= WIDEST:
            head, *rows = words(section)
            table = RichTable(*head, title=section.title, caption=section.note)
            for row in rows:
                table.add_row(*row)
            yield table


def _size(plan: Experiment, scale: str) -> str:
    """How large and how long, in words."""
    if not isinstance(plan, TaskExperiment):
        return SCALES[scale].about
    how = plan.training
    layers = "1 layer" if how.layers == 1 else f"{how.layers} layers"
    return f"{layers} of {how.dim} channels, {how.steps:,} steps of {how.batch:,} tokens"


def on_paper(name: str, plan: Experiment) -> str:
    """The commands of the paper's scale, for a machine with eight GPUs, and about what they cost."""
    if isinstance(plan, TaskExperiment):
        return f"{plan.title} is of one size: miras experiment {name} --scale gpu"
    lines, total = [f"{plan.title}: on a machine with {GPUS} GPUs, for each model", ""], 0.0
    for model, part in plan.models.items():
        config = part.config(model, **plan.training)
        hours = _hours(config)
        total += hours or 0.0
        said = "no estimate" if hours is None else f"about {hours:,.0f} GPU hours"
        lines += [f"# {model}: {config.steps * config.batch / 1e9:.0f} billion tokens, {said}", _command(config), ""]
    lines += [
        f"In all about {total:,.0f} GPU hours a seed and learning rate, if {UTILISED:.0%} of an H200's "
        f"{PEAK / 1e12:.0f} TFLOP/s are reached. Rules that are no variants need a file with their `mixer`; then",
        f"miras eval {' '.join(plan.tasks) or 'perplexity'} and miras report on the run folders.",
    ]
    return "\n".join(lines)


def _command(config: TrainConfig) -> str:
    words = ["torchrun", f"--nproc_per_node={GPUS}", "-m", "miras", "train", config.model, f"--size={config.size}"]
    return shlex.join([*words, f"--data={config.data}", f"--context={config.context}", f"--steps={config.steps}"])


def _hours(config: TrainConfig) -> float | None:
    """GPU hours of a run by the formula of `miras.bench.flops`."""
    shape = model_config(config)
    sizes = Sizes(batch=1, time=config.context, dim=config.dim, heads=config.heads, layers=config.layers, level="model")
    vocabulary = int(config.tokenizer.partition(":")[2] or 257)
    flops = model_flops(list(config.mixers), sizes, shape.intermediate_size, vocabulary)
    if flops is None:
        return None
    return flops * config.steps * config.batch / (UTILISED * PEAK) / 3600


def _first(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
