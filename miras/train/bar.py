"""Where long work stands."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from miras.train.progress import say

PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Bar:
    """A context that is told how far work has come: a bar on a terminal, now and then a line elsewhere.

    Args:
        label: what is done.
    """

    def __init__(self, label: str) -> None:
        self.label, self.said = label, time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[said]}"))
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(label, said="")

    def __enter__(self) -> Bar:
        """Show the bar, on a terminal."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away, whatever happened."""
        self.bar.stop()

    def __call__(self, done: int, of: int, said: str) -> None:
        """So much is done, and what is being done."""
        self.bar.update(self.task, completed=done, total=of, said=f"{done}/{of} {said}")
        if self.bar.disable and time.monotonic() - self.said > PLAIN_EVERY:
            self.said = time.monotonic()
            say(f"{self.label}: {done}/{of} {said}")
