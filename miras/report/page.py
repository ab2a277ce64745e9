"""The page of a report: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from miras.report.figures import looks_of
from miras.report.sections import Section, merged
from miras.report.text import shown
from miras.train.files import write_text

_CSS = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b626b; --rule: #d9dce0; --paper: #fff; --tint: #f5f6f7;
  --warn: #fff4d6; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #a2a9b2; --rule: #3a4047; --paper: #16181b; --tint: #1f2226; --warn: #40340f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, li { max-width: 44rem; }
.lead { font-size: 1.1rem; margin: 0; }
.note { background: var(--warn); padding: .6rem .9rem; border-radius: .3rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.45; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; vertical-align: top; }
tbody, .facts tr { border-bottom: 1px solid var(--rule); }
thead th, thead td { vertical-align: bottom; font-weight: 600; line-height: 1.3; border-bottom: 2px solid var(--ink); }
thead small { display: block; font-weight: 400; color: var(--soft); }
.numbers { white-space: nowrap; }
.numbers th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.numbers td small, .numbers th small { color: var(--soft); font-weight: 400; }
.numbers thead th, .numbers .detail td { padding-bottom: .5rem; }
.numbers tr:not(:last-child) > * { padding-bottom: 0; }
.numbers .detail td { padding-top: 0; text-align: left; white-space: normal; color: var(--soft); }
.detail span { display: inline-block; position: sticky; left: .6rem; max-width: calc(100vw - 3.2rem); }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
pre { margin: 0; padding: .7rem .9rem; background: var(--tint); border-radius: .3rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.facts { width: auto; max-width: 100%; }
.facts th, .facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { font-weight: 400; color: var(--soft); padding-left: 0; white-space: nowrap; }
@media print {
  :root { color-scheme: light; font-size: 9.5pt; }
  body { padding: 0; max-width: none; }
  .scroll { overflow: visible; }
  .detail span { position: static; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure, tbody, .sample { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .note, pre { border: 1px solid var(--rule); }
  th, td { padding: .3rem .35rem; }
}
"""


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        lead: what this is, in a sentence or two.
        sections: what it shows; those that say the same of other things become one (see `merged`).
        warnings: (what, in bold; the rest): what a reader has to know before any number.
        css: rules that its own sections need besides.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    warnings: Sequence[tuple[str, str]] = ()
    css: str = ""

    def write(self, path: Path) -> None:
        """Write the page, which loads nothing and looks the same every time.

        The file appears whole or not at all; missing folders above it are made, an older page is replaced.
        """
        page = self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)

    def html(self) -> str:
        """The whole page."""
        sections = merged(self.sections)
        looks = looks_of(sections)
        parts = [(s.title, s.figure, s.html(f"s{i}", looks)) for i, s in enumerate(sections)]
        main = []
        for title, group in groupby(parts, lambda part: part[0]):
            main.append(f"<h2>{shown(title)}</h2>" if title else "")
            for figures, side_by_side in groupby(group, lambda part: part[1]):
                html = "\n".join(part[2] for part in side_by_side)
                main.append(f'<div class="figures">\n{html}\n</div>' if figures else html)
        notes = "\n".join(
            f'<p class="note" role="note"><strong>{shown(what)}</strong> {shown(rest)}</p>'
            for what, rest in self.warnings
        )
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{shown(self.title)}</title>
<style>{_CSS}{self.css}</style>
</head>
<body>
<header>
<h1>{shown(self.title)}</h1>
<p class="lead">{shown(self.lead)}</p>
{notes}
</header>
<main>
{chr(10).join(main)}
</main>
</body>
</html>
"""
