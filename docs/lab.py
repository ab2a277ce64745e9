"""Draw and tabulate every scenario of `miras lab`: docs/lab/*.svg, and the tables of docs/lab.md. Takes minutes.

    python docs/lab.py

What stands between the tables is written by hand: read it again when they change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miras.lab import SCENARIOS, compare
from miras.lab.show import columns, plot, rows
from miras.train.files import write_text

PAGE = Path(__file__).with_suffix(".md")
END = "<!-- end -->"


def main() -> None:
    """Measure, draw, and write the tables into the page."""
    for name, cls in SCENARIOS.items():
        results = compare(cls())
        plot(results, PAGE.with_suffix("") / f"{name}.svg")
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin(name))
        write_text(PAGE, head + section(results) + rest.partition(END)[2])


def begin(name: str) -> str:
    """Where the part of a scenario that this script writes begins."""
    return f"<!-- lab {name} -->\n"


def section(results: dict[str, Any]) -> str:
    """That part: setting, picture and table."""
    name = results["scenario"]
    settings = ", ".join(f"{n} {x:g}" for n, x in results["settings"].items() if n != "tokens")
    said = f"`miras lab {name}`: {results['tokens']:,} tokens, {len(results['seeds'])} seeds, {settings}."
    table = [columns(results), ["---"] * len(columns(results)), *rows(results)]
    lines = [said, "", f"![{name}](lab/{name}.svg)", "", *("| " + " | ".join(row) + " |" for row in table)]
    return begin(name) + "\n".join(lines) + "\n" + END


if __name__ == "__main__":
    main()
