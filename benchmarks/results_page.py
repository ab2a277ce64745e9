"""What pages of results have in common: targets, tables and how they were made."""

from collections.abc import Sequence
from dataclasses import dataclass

from miras.train.provenance import commit, versions


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        what: in words.
        measured: the number, or None where it could not be measured.
        bound: what it has to reach; None: it is only stated.
        least: whether the bound is the least it may be, or the most.
        unit: of the number.
        note: what else there is to say.
    """

    what: str
    measured: float | None
    bound: float | None = None
    least: bool = True
    unit: str = "x"
    note: str = ""

    def row(self) -> tuple[str, str, str, str, str]:
        """Cells of the table."""
        wanted = "" if self.bound is None else f"at {'least' if self.least else 'most'} {self._said(self.bound)}"
        if self.measured is None:
            return self.what, wanted, "-", "not measured" if self.bound else "", self.note
        met = self.bound is not None and (self.measured >= self.bound) == self.least
        verdict = "" if self.bound is None else "met" if met else "**not met**"
        return self.what, wanted, self._said(self.measured), verdict, self.note

    def _said(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.2f} {self.unit}"


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_by(command: str, *machine: str) -> str:
    """The last line of a page: how to make it again, of what, where, with what."""
    libraries = [f"{name} {version}" for name, version in versions().items()]
    return ", ".join([f"`{command}`", f"commit {commit() or 'not known'}", *machine, *libraries])
