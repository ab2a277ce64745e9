"""The map of the design space says what the code says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from miras import bias
from miras.evaluate.describe import AXES, parts
from miras.lab import SCENARIOS
from miras.variants import VARIANTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PARTS = [(axis, part) for axis in AXES for part in parts(axis)]


def load(name):
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("generate")


def test_nothing_is_out_of_date():
    assert not generate.out_of_date(), "run: make docs"


def test_check_names_the_stale_page_and_the_command(monkeypatch, capsys):
    page = DOCS / "axes" / "bias.md"
    monkeypatch.setattr(generate, "pages", lambda: {page: "another text"})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    said = capsys.readouterr().out
    assert "docs/axes/bias.md is out of date" in said and "make docs" in said


@pytest.mark.parametrize(("axis", "part"), PARTS, ids=[f"{axis}.{part.name}" for axis, part in PARTS])
def test_every_class_says_its_formula_and_when_to_choose_it(axis, part):
    assert re.search(r"arXiv \d{4}\.\d{5}", part.formula), "the first line names an equation or a paper"
    assert part.choose.endswith("."), 'one paragraph of the docstring begins "Choose it"'
    assert part.meaning.keys() <= part.arguments.keys()
    page = (DOCS / "axes" / f"{axis}.md").read_text()
    (section,) = (s for s in page.split("\n## ") if s.startswith(f"{part.name}\n"))
    assert part.formula in section and "**Choose it**" in section
    drawing = re.search(r"!\[.*\]\((.*\.svg)\)", section)
    assert drawing and (DOCS / "axes" / drawing[1]).is_file()


def test_the_picture_has_every_model():
    drawn = (DOCS / "design-space.svg").read_text()
    assert "design-space.svg" in (DOCS / "design-space.md").read_text()
    assert not [name for name in VARIANTS if f">{name}<" not in drawn], "run: make docs"


def test_a_drawing_is_the_same_every_time(tmp_path):
    plots = load("plots")
    for name in "ab":
        plots.write_svg(lambda: plots.figure_of(bias.Huber), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_lab_page_shows_every_scenario_with_its_rules():
    page = (DOCS / "lab.md").read_text()
    for name, cls in SCENARIOS.items():
        part = page.split(f"<!-- lab {name} -->")[1].split("<!-- end -->")[0]
        rules, drawn = [e.name for e in cls().entries()], (DOCS / "lab" / f"{name}.svg").read_text()
        assert re.findall(r"^\| (.+?) \|", part, flags=re.MULTILINE)[2:] == rules, "run: make lab"
        assert f"(lab/{name}.svg)" in part and all(f">{rule}<" in drawn for rule in rules)


def test_the_results_page_says_what_the_experiments_found(monkeypatch):
    results = load("results")
    assert not results.out_of_date(), "run: make docs"
    monkeypatch.setattr(results, "page", lambda path: "another text")
    assert results.out_of_date() == [DOCS / "results.md", ROOT / "README.md"]


PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            # As GitHub makes anchors: without punctuation.
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{target}: no such heading"
