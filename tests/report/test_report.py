import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from miras.errors import UsageError
from miras.evaluate import intervals
from miras.report import Page, plots, report, text, write_report
from miras.report.runs import KINDS, read_sections
from miras.report.sections import merged, plain
from miras.train import files

CONTEXTS = ("256", "1024", "4096", "16384")


def make_model(name, **changes):
    steps = list(range(1, 201))
    model = {
        "name": name,
        "mixer": f"MLP + L2 + KL of {name}",
        "parameters": 1_000_000,
        "steps": 200,
        "val_bits_per_byte": 2.5,
        "tokens_per_second": 5000.0,
        "peak_memory_bytes": 500_000_000,
        "decode_ms_per_token": dict.fromkeys(CONTEXTS, 1.5),
        "state_bytes": dict.fromkeys(CONTEXTS, 2_000_000),
        "train_seconds": 82.0,
        "curve": {"step": steps, "bits_per_byte": [2.5 + 5.5 / step for step in steps]},
        "validation": {"step": [100, 200], "bits_per_byte": [2.6, 2.5]},
        "sample": {"prompt": "def f(", "text": "x):\n    return x"},
    }
    return model | changes


def make_results(*models, **changes):
    results = {
        "title": "A comparison",
        "command": "make demo",
        "created": "2025-06-01T12:00:00+00:00",
        "quick": False,
        "data": {
            "name": "stdlib",
            "hash": "9f2c4a7b",
            "train_tokens": 9_000_000,
            "validation_tokens": 262_144,
            "tokenizer": "bytes",
        },
        "setup": {
            "steps": 200,
            "tokens_per_step": 2048,
            "context": 512,
            "learning_rate": 0.002,
            "seed": 7,
            "threads": 2,
            "cpu": "A CPU & more",
            "versions": {"miras": "0.1.0", "torch": "2.9.0"},
            "commit": "1a2b3c4d",
        },
        "models": list(models),
    }
    return results | changes


@pytest.fixture
def trio():
    growing = {context: int(context) * 0.01 for context in CONTEXTS}
    return make_results(
        make_model("yaad", val_bits_per_byte=2.4444, parameters=1_010_000),
        make_model("memora", val_bits_per_byte=2.4441, tokens_per_second=4321.0, peak_memory_bytes=400_000_000),
        make_model("transformer", tokens_per_second=9876.0, decode_ms_per_token=growing),
    )


@pytest.fixture
def written(tmp_path):
    def write(results):
        path = tmp_path / "report.html"
        write_report(results, path)
        return path.read_text(encoding="utf-8")

    return write


class Reader(HTMLParser):
    """Collects attributes, and the cells of the comparison's rows as (text, bold)."""

    def __init__(self, html):
        super().__init__()
        self.attributes, self.open, self.rows = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "use", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", False))

    def handle_endtag(self, tag):
        if tag not in ("meta", "use", "input"):
            assert self.open.pop() == tag, "the page closes what it opened, in order"

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] = (self.rows[-1][-1][0] + data, "strong" in self.open)

    def row(self, name):
        return next(row for row in self.rows if row[0][0] == name)


def test_the_page_is_one_file_that_refers_to_nothing(written, trio, tmp_path):
    html = written(trio)
    reader = Reader(html)
    assert not reader.open
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for name, value in reader.attributes:
        if not name.startswith("xmlns"):
            assert "//" not in (value or ""), f"{name} refers outside the page: {value}"
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    assert "<script" not in html and "@import" not in html
    assert "//" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)


def test_ids_are_unique_and_references_meet_one(written, trio):
    html = written(trio)
    ids = [value for name, value in Reader(html).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_each_model_has_its_row_and_its_choices(written, trio):
    reader = Reader(written(trio))
    numbers = [text for text, _ in reader.row("transformer")[1:]]
    assert numbers == ["1,000,000", "2.500", "9,876", "500 MB", "164", "2 MB"]
    for name in ("yaad", "memora", "transformer"):
        assert reader.rows[reader.rows.index(reader.row(name)) + 1][0][0] == f"MLP + L2 + KL of {name}"


def test_the_best_is_bold_as_it_reads(written, trio):
    reader = Reader(written(trio))
    bold = {name: [is_bold for _, is_bold in reader.row(name)[1:]] for name in ("yaad", "memora", "transformer")}
    # Both losses read 2.444, so both are bold; the states are all the same, so none is; parameters have no best.
    assert bold["yaad"] == [False, True, False, False, True, False]
    assert bold["memora"] == [False, True, False, True, True, False]
    assert bold["transformer"] == [False, False, True, False, False, False]


def test_a_loss_that_is_not_a_number_is_never_best(written):
    reader = Reader(written(make_results(make_model("a", val_bits_per_byte=math.nan), make_model("b"))))
    assert [reader.row(name)[2] for name in "ab"] == [("nan", False), ("2.500", True)]


def test_text_is_escaped_and_printable(written):
    sample = {"prompt": "<i>&", "text": "</pre><script>alert(1)</script>\x00\x1b\udc80\u202e\n\tend"}
    html = written(make_results(make_model("<a>", mixer="a < b", sample=sample), title="T & <t>"))
    assert "<pre>\n<strong>&lt;i&gt;&amp;</strong>&lt;/pre&gt;&lt;script&gt;" in html
    assert "\ufffd" * 4 + "\n\tend</pre>" in html
    assert "<script" not in html
    assert "<h1>T &amp; &lt;t&gt;</h1>" in html and "a &lt; b" in html and "A CPU &amp; more" in html
    assert not Reader(html).open


def test_the_same_results_give_the_same_bytes_after_a_round_trip_through_json(written, trio):
    first = written(trio)
    assert written(json.loads(json.dumps(trio))) == first


def test_one_model_with_few_contexts_and_no_validation_yet(written):
    short = {"256": 1.5, "1024": 1.6}
    model = make_model("yaad", decode_ms_per_token=short, state_bytes={"256": 100})
    model |= {"curve": {"step": [1], "bits_per_byte": [8.0]}, "validation": {"step": [], "bits_per_byte": []}}
    html = written(make_results(model))
    assert "ms/token at 1,024" in html and "at 256 tokens" in html
    assert "16,384" not in html
    assert not any(is_bold for _, is_bold in Reader(html).row("yaad")[1:])


def test_models_are_compared_at_the_longest_context_that_all_have(written, trio):
    del trio["models"][2]["decode_ms_per_token"]["16384"]
    assert [Reader(written(trio)).row(name)[5][0] for name in ("yaad", "transformer")] == ["1.50", "41.0"]


def test_a_column_without_shared_contexts_is_left_out(written):
    html = written(make_results(make_model("a", decode_ms_per_token={}), make_model("b")))
    assert "Decoding" not in html and "State" in html


def test_a_quick_run_says_that_it_ranks_nothing(written, trio):
    assert 'role="note"' not in written(trio)
    assert "its numbers rank nothing" in written(trio | {"quick": True})


def test_models_that_took_fewer_steps_are_reported(written):
    html = written(make_results(make_model("a"), make_model("b", steps=150)))
    assert "Steps taken: a 200 and b 150." in html


def test_the_lead_is_two_sentences_with_the_amounts(written, trio):
    html = written(trio)
    lead = re.sub("<[^>]*>", "", re.search(r'<p class="lead">(.*?)</p>', html, re.DOTALL)[1])
    assert "yaad, memora and transformer" in lead
    for fact in ("409,600 bytes", "200 steps", "1.00 million", "1.0% more", "262,144 bytes"):
        assert fact in lead
    assert len(re.findall(r"\.(?= |$)", lead)) == 2


def test_how_to_reproduce_names_everything(written, trio):
    html = written(trio)
    for fact in ("make demo", "9f2c4a7b", "seed 7", "0.002", "2 threads", "torch 2.9.0", "1a2b3c4d", "2025-06-01"):
        assert fact in html
    trio["setup"]["commit"] = None
    assert "not known" in written(trio)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch, trio):
    path = tmp_path / "deep" / "report.html"
    write_report(trio, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_report(trio | {"quick": True}, path)
    assert path.read_bytes() == before


def test_settings_of_matplotlib_stay_as_they_were(written, trio):
    before = dict(matplotlib.rcParams)
    written(trio)
    assert dict(matplotlib.rcParams) == before


def test_figures_take_the_colours_of_the_page():
    line = plots.Line("yaad", "both", (256, 1024), (1.5, 1.6))
    svg = plots.curves([line], {"yaad": 0}, "decode", "context", "ms")
    assert "currentColor" in svg and "var(--rule)" in svg
    assert not {"#010203", "#040506", "#000000", "#ffffff"} & set(re.findall(r"#\w{6}\b", svg))
    assert svg.startswith("<svg") and "<title>" in svg and "aria-label" in svg


@pytest.mark.parametrize(("name", "columns"), [("yaad", 3), ("gated_deltanet, 512", 2), ("a long name " * 4, 1)])
def test_a_legend_has_the_columns_that_there_is_room_for(name, columns):
    names = [f"{name} {i}" for i in range(6)]
    lines = [plots.Line(each, "line", (1, 2), (0.1, 0.2)) for each in names]
    svg = plots.curves(lines, {each: i for i, each in enumerate(names)}, "legend", "x", "y")
    begins = [re.search(rf' x="([\d.]+)"[^<>]*>{re.escape(each)}<', svg)[1] for each in names]
    assert len(set(begins)) == columns


def test_looks_are_distinct_even_without_colour():
    looks = [plots.look(index) for index in range(21)]
    assert len(set(looks)) == 21
    assert len({look.colour for look in looks[:7]}) == len({(look.dash, look.marker) for look in looks[:7]}) == 7


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (131_072, "131 kB"),
        (999_999, "1.00 MB"),
        (67_108_864, "67.1 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_byte_size(count, expected):
    assert text.byte_size(count) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.01234, "0.0123"), (1.2, "1.20"), (99.96, "100"), (999.6, "1,000"), (12345.6, "12,346")]
)
def test_three_digits(value, expected):
    assert text.three_digits(value) == expected


def test_duration():
    assert [text.duration(value) for value in (4.6, 119, 120, 490)] == ["5 s", "119 s", "2 min", "8 min"]


# -- sections ---------------------------------------------------------------------------------------------------------

SECTIONS = {
    "sections": [
        {
            "kind": "table",
            "title": "Recall",
            "columns": [{"name": "Accuracy", "better": "high", "form": "percent"}, {"name": "Note"}],
            "rows": [
                {"name": "yaad", "values": {"Accuracy": 0.9, "Note": "<b>"}},
                {"name": "yaad", "values": {"Accuracy": 1.0}},
                {"name": "other", "values": {"Accuracy": 0.5}},
            ],
        },
        {
            "kind": "curves",
            "title": "Length",
            "x": "context",
            "y": "bits",
            "log": "xy",
            "series": [
                {"name": "yaad", "x": [256, 512], "y": [2, 1.9]},
                {"name": "yaad", "x": [256, 512], "y": [2, 2]},
            ],
        },
        {
            "kind": "heatmap",
            "title": "Needles",
            "x": "length",
            "y": "depth",
            "columns": ["1K", "2K"],
            "rows": ["0 %"],
            "grids": [{"name": "yaad", "values": [[1, None]]}, {"name": "yaad", "values": [[0.5, 0.25]]}],
        },
        {"kind": "notes", "items": [["Mind", "the & gap"]]},
        {"kind": "samples", "samples": [{"name": "yaad", "text": "<i>\x00"}]},
        {"kind": "facts", "commands": ["miras eval a"], "facts": {"Seeds": "0"}},
    ]
}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="result.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return save


def test_every_kind_of_section_is_shown_from_json(saved):
    assert {part["kind"] for part in SECTIONS["sections"]} == set(KINDS)
    html = report([saved(SECTIONS)], "Mine & <yours>").html()
    reader = Reader(html)
    assert not reader.open and "//" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in html and "&lt;b&gt;" in html and "&lt;i&gt;\ufffd" in html
    assert reader.row("yaad 2 seeds")[1] == ("95 % ± 63.5 %", False)
    assert reader.row("other")[1] == ("50 %", False)
    assert "the &amp; gap" in html and "mean of 2 seeds" in html and "miras eval a" in html
    assert ">0.750<" in html and ">0.250<" in html  # the mean over seeds, of what was measured


def test_sections_survive_a_round_trip(saved):
    read = read_sections(SECTIONS, "here")
    again = read_sections(json.loads(json.dumps({"sections": [plain(s) for s in read]})), "again")
    assert Page("a", "b", again).html() == Page("a", "b", read).html()


def test_files_join_to_one_section(saved):
    both = report([saved(SECTIONS, "a.json"), saved(SECTIONS, "b.json")])
    joined = {section.kind: section for section in merged(both.sections)}
    assert len(joined) == len(KINDS)
    assert [len(joined["table"].rows), len(joined["curves"].series), len(joined["heatmap"].grids)] == [6, 4, 4]
    assert joined["facts"].commands == ("miras eval a",)


def test_what_eval_prints_becomes_a_curve_over_length(saved):
    rows = [
        {"context": c, "bits_per_byte": {"mean": 2.0, "interval": 0.1, "values": [1.9 + c / 1e4, 2.1 + c / 1e4]}}
        for c in (256, 1024)
    ]
    found = {"task": "perplexity", "settings": {}, "models": {"yaad": {"rows": rows}}}
    reader = Reader(report([saved(found, "yaad.json")]).html())
    assert [cell for cell, _ in reader.row("yaad 2 seeds")[1:]] == ["2.03 ± 1.27", "2.10 ± 1.27"]


def test_a_grid_has_a_table_of_its_means(saved):
    def row(length, depth, found):
        measured = {"mean": found, "interval": None, "values": [found]}
        return {"length": length, "depth": depth, **dict.fromkeys(("exact", "found", "margin"), measured)}

    rows = [row(512, 0.0, 1.0), row(512, 1.0, 0.5), row(1024, 0.0, 0.25), row(1024, 1.0, 0.0)]
    found = {"task": "passkey", "settings": {}, "models": {"yaad": {"rows": rows}}}
    sections = merged(report([saved(found, "yaad.json")]).sections)
    table, grid = (s for s in sections if s.title == "passkey, found")
    assert table.rows[0].values == {"512": 0.75, "1,024": 0.125} and table.note == "Found by length, mean over depth."
    assert grid.grids[0].values == ((1.0, 0.25), (0.5, 0.0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as that"),
        ("[1]", 'expected {"sections"'),
        ({"sections": [{"kind": "tabel"}]}, "section 0: expected a kind, one of table, curves"),
        ({"sections": [{"kind": "notes", "itms": []}]}, "has no field 'itms'. Did you mean 'items'"),
        ({"sections": [{"kind": "table", "columns": []}]}, "Table needs the fields rows"),
        ({"sections": [{"kind": "table", "columns": [], "rows": 1}]}, "expected a list as rows"),
        ({"sections": [{"kind": "table", "columns": [], "rows": [1]}]}, "rows 0: expected an object"),
        ({"sections": [{"kind": "table", "columns": [{"name": "a", "better": "up"}], "rows": []}]}, "low or high"),
        (
            {"sections": [{"kind": "curves", "x": "", "y": "", "series": [{"name": "a", "x": [1], "y": []}]}]},
            "series 0: x and y of 'a' must be equally many numbers",
        ),
        (
            {
                "sections": [
                    {"kind": "curves", "x": "", "y": "", "log": "x", "series": [{"name": "a", "x": [0], "y": [1]}]}
                ]
            },
            "a logarithmic x axis needs numbers above 0",
        ),
        (
            {
                "sections": [
                    {
                        "kind": "heatmap",
                        "x": "",
                        "y": "",
                        "columns": ["1"],
                        "rows": ["1"],
                        "grids": [{"name": "a", "values": [[1, 2]]}],
                    }
                ]
            },
            "the grid 'a' must be 1 rows of 1 numbers",
        ),
    ],
)
def test_bad_files_are_refused_with_the_place(saved, content, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        report([saved(content)])


def test_student_is_right_where_the_table_ends():
    assert [round(intervals.student(n), 2) for n in (1, 2, 10, 11, 30, 1000)] == [12.71, 4.3, 2.23, 2.2, 2.04, 1.96]
    assert intervals.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert intervals.interval([1.0]) == intervals.interval([1.0, math.nan]) == 0
