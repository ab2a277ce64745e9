"""Models on a task over several seeds: every result is a file, and a table of means is made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miras.data import load_corpus
from miras.errors import Diverged, UsageError, near
from miras.evaluate.intervals import interval
from miras.evaluate.loading import load_model, model_folder
from miras.evaluate.scratch import ScratchConfig, learn
from miras.evaluate.tasks import LanguageTask, SyntheticTask, Task
from miras.evaluate.tasks.base import Report, Row
from miras.evaluate.tasks.settings import changed, shown
from miras.registry import to_config
from miras.train.bar import Bar
from miras.train.files import write_json
from miras.train.progress import say
from miras.train.provenance import versions


class Mean(NamedTuple):
    """Of one number over seeds.

    Attributes:
        mean: their mean.
        interval: half the width of its 95 % confidence interval by Student's t; None of a single seed.
        values: by seed.
    """

    mean: float
    interval: float | None
    values: list[float]


def settle(task: Task, settings: Mapping[str, str]) -> tuple[Task, ScratchConfig | None]:
    """A task, and for a synthetic one the training, with what was set on a command line.

    Args:
        task: the task as it stands in `TASKS`.
        settings: see `changed`; fields of the task, or of `ScratchConfig` but for its model and seed.

    Raises:
        UsageError: an unknown name, said with the near ones, or a value that it cannot have.
    """
    of_task = [field.name for field in dataclasses.fields(task)]  # type: ignore[arg-type]
    of_training = list(training_settings()) if isinstance(task, SyntheticTask) else []
    for name in settings:
        if name not in of_task + of_training:
            raise UsageError(f"--set {name}: the task has no such setting." + near(name, of_task + of_training))
    task = changed(task, {n: v for n, v in settings.items() if n in of_task})
    if not isinstance(task, SyntheticTask):
        return task, None
    return task, changed(ScratchConfig(), {n: v for n, v in settings.items() if n in of_training})


def training_settings() -> dict[str, str]:
    """The settings that every synthetic task has besides its own, with their defaults as one writes them."""
    fields = dataclasses.fields(ScratchConfig)
    return {f.name: shown(f.default) for f in fields if f.name not in ("model", "seed")}


def compare(
    name: str,
    task: Task,
    training: ScratchConfig | None,
    models: Sequence[str],
    seeds: int,
    out: Path,
    again: bool = False,
) -> dict[str, Any]:
    """Every model on the task, one after the other.

    A result is written to `out` as soon as it is there, and one that is there is not measured again, as long as the
    task, the model and its weights, the text and the libraries are the same. That a training diverged is a result, too.

    Args:
        name: of the task.
        task: what is asked.
        training: how a synthetic task is learned; its model and seed are not looked at.
        models: variants or rule files for a synthetic task, folders for a `LanguageTask`.
        seeds: how many, from 0 on. A task without randomness is measured once.
        out: folder of the results.
        again: measure what is there, too.

    Returns:
        Plain values: task, settings, training, and models: {model: {..., diverged, rows}}, each measure of a row a
        `Mean` over the seeds that are left, and of each that diverged what there is to say.

    Raises:
        UsageError: no such model, or one that the task cannot be asked of.
        Diverged: all seeds of a model did.
    """
    seeds = seeds if isinstance(task, SyntheticTask) or (isinstance(task, LanguageTask) and task.seeded) else 1
    about = {model: _about(name, task, training, model) for model in models}  # what is wrong shows before the work
    table: dict[str, Any] = {}
    for model in models:
        found = [_result(task, about[model], seed, out, again) for seed in range(seeds)]
        left = [result for result in found if "diverged" not in result]
        diverged = [result["diverged"] for result in found if "diverged" in result]
        if not left:
            raise Diverged(diverged[0])
        for words in diverged:
            say(words)
        rows = [_mean_row(task, lines) for lines in zip(*(result["rows"] for result in left), strict=True)]
        seconds = sum(result["seconds"] for result in found)
        table[model] = {**left[0]["model"], "seconds": seconds, "diverged": diverged, "rows": rows}
    return {
        "task": name,
        "settings": to_config(task),
        "training": about[models[0]]["training"],
        "seeds": seeds,
        "models": table,
    }


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval."""
    values = list(values)
    if len(values) == 1:
        return Mean(values[0], None, values)
    return Mean(statistics.fmean(values), interval(values), values)


def _mean_row(task: Task, lines: Sequence[Row]) -> Row:
    first = lines[0]
    return {n: first[n] if n in task.level else mean_of([line[n] for line in lines])._asdict() for n in first}


def _about(name: str, task: Task, training: ScratchConfig | None, model: str) -> dict[str, Any]:
    """All that a result depends on but the seed."""
    about: dict[str, Any] = {"task": name, "settings": to_config(task), "training": None, "versions": versions()}
    if task.data is not None:
        about["data"] = load_corpus(task.data).hash
    if training is not None:
        config = dataclasses.replace(training, model=model)
        fields = dataclasses.asdict(config)
        about["training"] = {n: v for n, v in fields.items() if n not in ("model", "seed")}
        # What stands in a file, since it may change.
        base = config.base
        made = {"hidden": base.hidden, "gates": base.gates, "rope": base.rope}
        return {**about, "model": {"name": model, **made, "mixers": [to_config(mixer) for mixer in base.mixers]}}
    return {**about, "model": {"name": model, "hash": _digest(model)}}


def _digest(model: str) -> str:
    """Of a model's configuration, weights and tokenizer."""
    digest, folder = hashlib.sha256(), model_folder(Path(model))
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]


def _result(task: Task, about: dict[str, Any], seed: int, out: Path, again: bool) -> dict[str, Any]:
    """One model and seed, from its file or measured and written there."""
    about = {**about, "seed": seed}
    model, key = about["model"]["name"], hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    label = f"{about['task']} {model} seed {seed}"
    short = " ".join([about["task"], *Path(model).parts[-2:], str(seed)])  # the key tells them apart
    path = out / f"{re.sub(r'[^A-Za-z0-9.]+', '-', short)}-{key}.json"
    if path.exists() and not again:
        say(f"{label}: from {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.perf_counter()
    try:
        with Bar(label) as bar:
            rows, size = _measure(task, about, bar)
        measured = {"model": {**about["model"], **size}, "rows": rows}
    except Diverged as lost:
        measured = {"diverged": str(lost)}
    result = {**about, "seconds": time.perf_counter() - start, **measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def _measure(task: Task, about: dict[str, Any], report: Report) -> tuple[list[Row], dict[str, int]]:
    name, seed = about["model"]["name"], about["seed"]
    if isinstance(task, SyntheticTask):
        config = ScratchConfig(model=name, seed=seed, **about["training"])
        model, rows = learn(task, config, report)
        longest = max(map(task.length, task.test))
    else:
        assert isinstance(task, LanguageTask)
        model, tokenizer = load_model(name)
        rows, longest = task.measure(model, tokenizer, seed, report), model.config.context_length
    heads, head_dim = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    state = sum(mixer.state_bytes(heads, head_dim, head_dim, longest) for mixer in model.config.mixers())
    return rows, {"parameters": sum(p.numel() for p in model.parameters()), "state_bytes": state}
