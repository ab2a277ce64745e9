"""Where a long measurement stands, by counting its calls."""

from __future__ import annotations

from dataclasses import dataclass

from miras.train.bar import Bar


@dataclass
class Steps:
    """Told of each call as it begins.

    Args:
        bar: shows it.
        total: how many calls there will be.
    """

    bar: Bar
    total: int
    done: int = 0

    def __call__(self, doing: str) -> None:
        """Say what begins; what began before it is done."""
        self.bar(self.done, self.total, doing)
        self.done += 1

    def skip(self, count: int) -> None:
        """So many will not be done."""
        self.total -= count
