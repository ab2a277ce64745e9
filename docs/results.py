"""Write the tables and figures of docs/results.md and README.md from what experiments found (experiments/results/).

    python docs/results.py            # write both, and the drawings, docs/results/*.svg
    python docs/results.py --check    # write nothing; exit with 1 if something is out of date

`<!-- results FILE: TITLE -->` begins what this script writes of the sections with that title, `<!-- results FILE -->`
the experiment's claim and command. What stands between is written by hand: read it again when the numbers change.
"""

from __future__ import annotations

import argparse
import re
from functools import cache
from pathlib import Path

from miras.experiments.run import slug
from miras.report.figures import Curves, looks_of
from miras.report.plots import standalone
from miras.report.runs import file_sections
from miras.report.sections import Looks, Section, merged
from miras.report.table import Table, words
from miras.report.words import Facts, Notes
from miras.train.files import write_text

DRAWN = Path(__file__).with_suffix("")
ROOT = DRAWN.parents[1]
PAGES = DRAWN.with_suffix(".md"), ROOT / "README.md"
FOUND = ROOT / "experiments" / "results"
WIDEST = 9  # columns of a table that can be read; of wider ones the page shows the curves
BLOCK = re.compile(r"(<!-- results (?P<file>[\w-]+)(?:: (?P<title>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Write or check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only say whether it is out of date")
    if parser.parse_args().check:
        stale = out_of_date()
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date. Run: python docs/results.py (or: make docs)")
        return min(len(stale), 1)
    DRAWN.mkdir(exist_ok=True)
    for path in PAGES:
        write_text(path, page(path))
    for path in DRAWN.glob("*.svg"):
        path.unlink()
    for path, curves in drawings().items():
        write_text(path, standalone(curves.svg(path.stem, _looks(path.stem.partition(".")[0]))))
    return 0


def out_of_date() -> list[Path]:
    """Pages that say something else than the files, and drawings that are missing."""
    stale = [path for path in PAGES if path.read_text(encoding="utf-8") != page(path)]
    return stale + [path for path in drawings() if not path.is_file()]


def page(path: Path) -> str:
    """A page with its tables as they are now."""
    text = path.read_text(encoding="utf-8")
    return BLOCK.sub(lambda m: m[1] + _block(m["file"], m["title"], path.parent) + m[4], text)


def drawings() -> dict[Path, Curves]:
    """The figures that the pages show."""
    blocks = (match for path in PAGES for match in BLOCK.finditer(path.read_text(encoding="utf-8")))
    figures = (_figures(m["file"], m["title"]) for m in blocks if m["title"])
    return {path: curves for found in figures for path, curves in found.items()}


@cache
def _sections(file: str) -> list[Section]:
    return merged(file_sections(FOUND / f"{file}.json"))


@cache
def _looks(file: str) -> Looks:
    return looks_of(_sections(file))


def _figures(file: str, title: str) -> dict[Path, Curves]:
    own = [s for s in _sections(file) if isinstance(s, Curves) and s.title == title]
    name = f"{file}.{slug(title)}"
    return {DRAWN / f"{name}{i or ''}.svg": curves for i, curves in enumerate(own)}


def _block(file: str, title: str | None, at: Path) -> str:
    if title is None:
        return _about(file)
    parts = [
        _table(s) for s in _sections(file) if isinstance(s, Table) and s.title == title and len(s.columns) <= WIDEST
    ]
    parts += [
        f"![{curves.y} by {curves.x}]({path.relative_to(at)})\n" for path, curves in _figures(file, title).items()
    ]
    if not parts:
        raise SystemExit(f"{file}.json has no table and no curves with the title {title!r}.")
    return "\n".join(parts)


def _about(file: str) -> str:
    claims = [rest for s in _sections(file) if isinstance(s, Notes) for _, rest in s.items]
    again = [s for s in _sections(file) if isinstance(s, Facts)]
    command = next(c for s in again for c in s.commands if c.startswith("miras experiment"))
    facts = {
        name: ", ".join([value] if isinstance(value, str) else value) for s in again for name, value in s.facts.items()
    }
    said = "; ".join(facts[name] for name in ("Scale", "Processor", "Versions") if name in facts)
    return f"> The paper: {' '.join(claims)}\n\n`{command}`: {said}; commit {facts['Commit']}.\n"


def _table(table: Table) -> str:
    head = ["", *(f"{column.name}, {column.unit}" if column.unit else column.name for column in table.columns)]
    lines = [head, ["---"] * len(head), *words(table, "**{}**")[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + (
        f"\n\n{table.note}\n" if table.note else "\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
