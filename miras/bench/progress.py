"""Where a long measurement stands: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from miras.train.progress import say

PLAIN_EVERY = 10.0
"""Seconds between plain lines."""


class Steps:
    """A context that counts calls. On leaving the bar is gone.

    Args:
        total: how many there will be.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self._last = total, 0, time.monotonic()
        console = Console(stderr=True)
        columns = (BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("", total=total) if self._bar else None

    def __enter__(self) -> Steps:
        """Show the bar, on a terminal."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away, whatever happened."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, doing: str) -> None:
        """Say what begins; what began before it is done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, description=doing)
        elif time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            say(f"{self.done}/{self.total}  {doing}")
        self.done += 1

    def skip(self, count: int) -> None:
        """So many will not be done."""
        self.total -= count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.total)
