"""The run folder: whose it is, and whether a run may go on in it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miras.errors import UsageError
from miras.train import processes
from miras.train.checkpoints import newest, remove_incomplete, step_of
from miras.train.config import TrainConfig, flag, given_by, load_config, read_config
from miras.train.files import write_json, write_text
from miras.train.progress import say

FREE = ("out", "cache", "threads", "keep", "eval_every", "save_every", "tensorboard")
"""Fields that a resumed run may change: they do not touch what is learned."""


def resumed_config(model: str | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The configuration to resume with: the run folder's, and what the command line says besides.

    Args:
        model: as for `load_config`; None: the run's.
        flags: fields that were given; `out`, or the model's default, says which run.

    Raises:
        UsageError: there is no run to resume.
    """
    out = flags.get("out") or (TrainConfig() if model is None else load_config(model, flags)).out
    path = Path(out) / "config.yaml"
    if not path.exists():
        raise UsageError(f"--resume: there is no run in {out}. Leave out --resume to begin one, or say --out.")
    return TrainConfig(**{**read_config(path), **given_by(model), **flags})


def check(config: TrainConfig, resume: bool) -> None:
    """Refuse to begin where a run is, and to resume where none or another is.

    Raises:
        UsageError: with the difference.
    """
    path = Path(config.out) / "config.yaml"
    if not resume and path.exists():
        raise UsageError(
            f"{config.out} already holds a run. Write --resume --out {config.out} to go on with it, or another --out."
        )
    if resume and not path.exists():
        raise UsageError(f"--resume: there is no run in {config.out}. Leave out --resume to begin one.")
    if resume:
        _refuse_other(config, TrainConfig(**read_config(path)))


def check_data(out: Path, data: Mapping[str, Any]) -> None:
    """Refuse to resume with other data than the run began with, which may lie under the same name.

    Raises:
        UsageError: with the difference.
    """
    before = json.loads((out / "run.json").read_text())["data"]
    for name, value in data.items():
        if before[name] != value:
            raise UsageError(
                f"--resume: the data are not those that the run in {out} began with: {name} was {before[name]}, is "
                f"{value}. Restore them, or begin another run with another --out."
            )


def begin(config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Write what the run is, the configuration last: where it is, there is a run."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "run.json", {"data": data, "command": command(config)})
    write_text(out / "config.yaml", config.to_yaml())


def resume_point(out: Path) -> Path | None:
    """The newest complete checkpoint, after the incomplete ones were removed, which is said."""
    for path in remove_incomplete(out / "checkpoints") if processes.is_main() else ():
        say(f"Removed {path}, which was not written to its end.")
    last = newest(out / "checkpoints")
    say("Begins again: there is no complete checkpoint." if last is None else f"Goes on after step {step_of(last)}.")
    return last


def command(config: TrainConfig) -> str:
    """A command that does the same run again, by the fields that differ from what would be filled in."""
    # A rule written out does not fit on a command line; the run folder's copy of the configuration holds it.
    words = ["miras", "train", config.model if config.mixer is None else str(Path(config.out) / "config.yaml")]
    plain = TrainConfig(model=config.model, mixer=config.mixer, size=config.size, steps=config.steps)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        required = field.name == "steps" or (field.name == "size" and value != "tiny")
        if field.name in ("model", "mixer", "cache") or not (required or value != getattr(plain, field.name)):
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else flag(field.name).replace("--", "--no-", 1))
        else:
            words += [flag(field.name), str(value)]
    return shlex.join(words)


def _refuse_other(config: TrainConfig, before: TrainConfig) -> None:
    now, then = dataclasses.asdict(config), dataclasses.asdict(before)
    other = [name for name in now if name not in FREE and now[name] != then[name]]
    if other:
        said = "; ".join(f"{flag(name)} was {then[name]}, is {now[name]}" for name in other)
        raise UsageError(
            f"--resume: the run in {config.out} has another configuration: {said}. Leave these out to go on with it as "
            "it is, or begin another run with another --out."
        )
