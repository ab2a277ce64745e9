"""Several `miras train` side by side, each in a process of its own, with one view of all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from miras.errors import MirasError
from miras.train.files import read_metrics
from miras.train.progress import DIVERGED

POLL = 0.5
PLAIN_EVERY = 20.0  # seconds between lines where there is no terminal


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: what to call it.
        out: its run folder; a run that is finished there is left alone, one that was begun goes on.
        steps: how many it takes.
        command: words of `miras train`, without --out, --threads and --resume.
    """

    name: str
    out: Path
    steps: int
    command: Sequence[str]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.out / "summary.json").exists()

    def start(self, threads: int) -> subprocess.Popen[bytes]:
        """Start the process; what it says goes to `log`."""
        words = [*self.command, f"--out={self.out}", f"--threads={threads}"]
        words += ["--resume"] if (self.out / "config.yaml").exists() else []
        # The environment too: threads that PyTorch starts before it is told otherwise would be in each other's way.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "miras", *words], stderr=log, stdout=log, env=environment)

    @property
    def diverged(self) -> bool:
        """Whether it ended because the loss was no longer finite."""
        return (self.out / DIVERGED).exists() and not self.finished

    @property
    def log(self) -> Path:
        """What the process said, a file beside the run folder."""
        return self.out.with_name(self.out.name + ".log")

    def progress(self) -> tuple[int, str]:
        """Steps taken and the last bits per byte."""
        metrics = self.out / "metrics.jsonl"
        lines = [x for x in (read_metrics(metrics) if metrics.exists() else []) if "bits_per_byte" in x]
        return (lines[-1]["step"], f"{lines[-1]['bits_per_byte']:.2f} bits/byte") if lines else (0, "")


def train_many(jobs: Sequence[Job], at_once: int, may_diverge: bool = False) -> None:
    """Run jobs in their order, `at_once` of them side by side, this process' threads shared out evenly.

    Args:
        jobs: what to run.
        at_once: how many side by side.
        may_diverge: a loss that is no longer finite is a result, not a failure; the run is not tried again.

    Raises:
        MirasError: a run failed; its last words are in the message, and the same call goes on from there.
    """
    waiting = [job for job in jobs if not job.finished and not (may_diverge and job.diverged)]
    at_once = max(1, min(at_once, len(waiting)))
    threads = max(1, torch.get_num_threads() // at_once)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    with _View(jobs) as view:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running[waiting[0]] = waiting[0].start(threads)
                    waiting.pop(0)
                time.sleep(POLL)
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    code = running.pop(job).returncode
                    _check(job, 0 if may_diverge and job.diverged else code)
                view.show(running)
        finally:
            for process in running.values():
                process.terminate()


def _check(job: Job, code: int) -> None:
    if code:
        last = job.log.read_text(errors="replace").strip().splitlines()[-3:]
        raise MirasError(f"{job.name} ended with exit code {code}: {' '.join(last)} Call again to go on from there.")


class _View:
    """Progress bars on a terminal, a line every now and then elsewhere."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.last = jobs, time.monotonic()
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:>16}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[Job, TaskID] = {}

    def __enter__(self) -> _View:
        self.bars.start()
        for job in self.jobs:
            self.tasks[job] = self.bars.add_task(job.name, start=False, total=job.steps, said="")
        return self

    def __exit__(self, *_: object) -> None:
        for job, task in self.tasks.items():
            self.bars.update(task, completed=job.progress()[0])
        self.bars.stop()

    def show(self, running: dict[Job, subprocess.Popen[bytes]]) -> None:
        """Show where the running ones are."""
        for job in running:
            step, said = job.progress()
            self.bars.start_task(self.tasks[job])
            self.bars.update(self.tasks[job], completed=step, said=said)
        if not self.console.is_terminal and time.monotonic() - self.last > PLAIN_EVERY:
            self.last = time.monotonic()
            now = [f"{job.name} {job.progress()[0]}/{job.steps} {job.progress()[1]}" for job in running]
            print(" | ".join(now), file=sys.stderr, flush=True)
