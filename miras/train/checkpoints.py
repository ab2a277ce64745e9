"""Checkpoints that are complete or do not count.

A checkpoint is a folder that transformers' Trainer writes, file by file. It counts once a marker was written after all
of it had reached the disk; only then is an older one deleted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from miras.errors import MirasError
from miras.train.files import write_json

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, complete or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [path for path in checkpoints(folder) if (path / MARKER).exists()]
    return complete[-1] if complete else None


def finish(checkpoint: Path, keep: int) -> None:
    """Make a checkpoint count, then delete the oldest complete ones beyond `keep`."""
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            _to_disk(file)
    write_json(checkpoint / MARKER, {"step": step_of(checkpoint)})
    _to_disk(checkpoint)
    complete = [path for path in checkpoints(checkpoint.parent) if (path / MARKER).exists()]
    for old in complete[:-keep]:
        remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, the marker first: what is half deleted does not count."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete the checkpoints that do not count, and say which they were."""
    incomplete = [path for path in checkpoints(folder) if not (path / MARKER).exists()]
    for path in incomplete:
        remove(path)
    return incomplete


def how_to_resume(out: Path) -> str:
    """Where a run stands that stopped midway, and the command that goes on with it."""
    command = f"miras train --resume --out {out}"
    if not (out / "config.yaml").exists():
        return "Nothing was trained yet; give the same command again."
    last = newest(out / "checkpoints")
    if last is None:
        return f"There is no complete checkpoint yet. Begin again with: {command}"
    return f"The last complete checkpoint is that of step {step_of(last)}. Go on with: {command}"


@contextmanager
def saving(what: str, out: Path) -> Iterator[None]:
    """Turn a failure to write into a message that says what is left.

    Raises:
        MirasError: the block could not write: a full disk, a folder that may not be written to.
    """
    try:
        yield
    # torch says a full disk with a RuntimeError, safetensors with its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MirasError(
            f"{what} could not be written to {out} ({type(error).__name__}: {reason}). Nothing that was complete is "
            f"lost. If the disk is full ({_free(out)} are free), make room first. {how_to_resume(out)}"
        ) from error


def _free(folder: Path) -> str:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e6:,.0f} MB"


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
