"""The page of `miras inspect`, and recall over distance."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from miras.data import load_tokenizer
from miras.data.tokenizer import plain_backend
from miras.errors import UsageError
from miras.hf import MirasConfig, MirasForCausalLM
from miras.inside import inspect, recall
from miras.inside.recall import FILLERS
from miras.inside.text import pieces
from miras.report import report

VOID = ("meta", "use", "input")
TEXT = "a <b> & é ☃ 😀\n" + "".join(f"line {i} of {i * i}\n" for i in range(40))


class Reader(HTMLParser):
    """Checks that tags close in order and collects attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.attributes, self.open, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = MirasConfig(
        mixer="yaad,transformer", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=257
    )
    MirasForCausalLM(config).save_pretrained(out)
    load_tokenizer("bytes").save_pretrained(out)
    (out / "text.txt").write_text(TEXT, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def seen(folder):
    out = folder / "page" / "inside.html"
    inspect(str(folder), str(folder / "text.txt"), 120, "line 3", [16, 64], out, "miras inspect <it>")
    return out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_refers_to_nothing(seen):
    html, _ = seen
    reader = Reader(html)
    for _, name, value in reader.attributes:
        assert name.startswith("xmlns") or "//" not in (value or "")
        assert name not in ("src", "href", "xlink:href") or value.startswith("#")
    assert "<script" not in html and "miras inspect &lt;it&gt;" in html


def test_the_text_is_shown_as_it_is(seen):
    html, _ = seen
    start = html.index('<div class="text">')
    shown = Reader(html[start : html.index("</div>", start) + 6]).text
    assert shown == TEXT[: len(shown)] and len(shown.encode()) == 120
    assert "<b>" not in html[start:]


def test_every_button_has_a_label_and_every_view_a_rule(seen):
    html, _ = seen
    ids = {value for tag, name, value in Reader(html).attributes if (tag, name) == ("input", "id")}
    assert ids == {value for tag, name, value in Reader(html).attributes if (tag, name) == ("label", "for")}
    assert len(ids) == 2 + 7
    used = set(re.findall(r"--v\d+(?=:)", html))
    assert used <= set(re.findall(r"var\((--v\d+)", html)) and len(used) >= 5


def test_attention_has_only_its_loss(seen):
    html, found = seen
    assert (
        "2 attention: loss only" in html
        and "Attention has no inner learning" in html
        and found["layers"][1]["values"] == {}
    )


def test_the_numbers_are_complete(seen):
    _, found = seen
    assert len(found["tokens"]) == len(found["loss_bits"]) == 120 and found["loss_bits"][0] is None
    values = found["layers"][0]["values"]
    assert {"surprise", "eta", "log_alpha", "delta", "extreme", "change", "distance"} == set(values)
    assert all(len(x) == 120 and len(x[0]) == 2 for x in values.values())


def test_the_numbers_are_sections_for_a_report(seen, folder):
    page = report([str(folder / "page" / "inside.json")])
    assert {s.title for s in page.sections} > {"Over the text", "By head", "Recall over distance"}
    Reader(page.html())


def test_pieces_hold_whole_characters():
    encoded = plain_backend(load_tokenizer("bytes")).encode("aé☃\n", add_special_tokens=False)
    assert pieces("aé☃\n", encoded.offsets) == [
        ("a", range(1)),
        ("é", range(1, 3)),
        ("☃", range(3, 6)),
        ("\n", range(6, 7)),
    ]
    # A word whose space the tokenizer drops.
    assert pieces("ab cd", [(0, 2), (3, 5)]) == [("ab ", range(1)), ("cd", range(1, 2))]


# -- recall -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["yaad", "transformer"])
def test_recall_is_the_loss_with_and_without_the_span_before(mixer):
    model = MirasForCausalLM(
        MirasConfig(mixer=mixer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    text, span = torch.randint(0, 257, (100,)), torch.randint(0, 257, (6,))
    found = recall(model, span, text, [5, 40])
    assert found.distances == (5, 40)
    assert found.first.shape == (FILLERS,) and found.again.shape == (FILLERS, 2)
    whole = torch.cat([text[:32], span, text[32:72], span])  # the first filler begins where the text does
    with torch.no_grad():
        logits = model(whole[None]).logits[0]
    bits = torch.nn.functional.cross_entropy(logits[:-1], whole[1:], reduction="none") / torch.tensor(2.0).log()
    assert found.first[0].item() == pytest.approx(bits[31:37].mean().item(), abs=1e-4)
    assert found.again[0, 1].item() == pytest.approx(bits[-6:].mean().item(), abs=1e-4)


def test_distances_without_room_are_refused():
    model = MirasForCausalLM(MirasConfig(mixer="yaad", hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    text, span = torch.randint(0, 257, (100,)), torch.randint(0, 257, (6,))
    assert recall(model.eval(), span, text).distances == (16, 64)
    for what, distances in ((span, [69]), (span, [0]), (span[:0], [5])):
        with pytest.raises(UsageError, match="Expected a span with text in it and distances from 1"):
            recall(model, what, text, distances)
    with pytest.raises(UsageError, match="distances none"):
        recall(model, span, text[:40])
