"""What `miras inspect` does: read, record, write a page and its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from miras.data.tokenizer import plain_backend
from miras.errors import UsageError
from miras.evaluate import load_model
from miras.hf import MirasForCausalLM
from miras.inside.page import coloured, recall_section, sections
from miras.inside.recall import Recall, recall
from miras.inside.record import Trace, trace
from miras.inside.text import pieces
from miras.layer import layers_of
from miras.report.page import Page
from miras.report.sections import plain
from miras.report.text import counted
from miras.report.words import Facts
from miras.rule import Rule
from miras.train.files import write_json
from miras.train.provenance import versions


class Found(NamedTuple):
    """A model on a text: what was read, what was seen of it, and recall where it was asked for."""

    text: str
    kept: list[tuple[str, range]]
    mixers: list[str]
    trace: Trace
    recall: tuple[Recall, str] | None


def inspect(
    path: str, file: str, limit: int, span: str | None, distances: Sequence[int], out: Path, command: str
) -> None:
    """Look inside a trained model while it reads a file, and write a page and, beside it, its numbers as JSON.

    Args:
        path: see `load_model`.
        file: UTF-8 text.
        limit: tokens of it to show, at most.
        span: text whose recall over distance is measured; None: none.
        distances: see `recall`.
        out: the page; the numbers get the same name with .json.
        command: that does it again.

    Raises:
        UsageError: no such model or text, a text of less than two tokens, or a span that cannot be measured.
    """
    text = _read(file)
    model, tokenizer = load_model(path)
    found = look(model, tokenizer, text, limit, span, distances)
    page = _page(path, file, found, command)
    page.write(out)
    write_json(out.with_suffix(".json"), numbers(path, found, page))


def look(
    model: MirasForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    limit: int,
    span: str | None = None,
    distances: Sequence[int] = (),
) -> Found:
    """Record what a model does on the first `limit` tokens of a text; the rest of it only fills distances of recall."""
    encoded = plain_backend(tokenizer).encode(text, add_special_tokens=False)
    ids, offsets = torch.tensor(encoded.ids[:limit]), encoded.offsets[:limit]
    if len(ids) < 2:
        raise UsageError(f"--text: expected at least two tokens to look at, got {len(ids)}.")
    again = None
    if span is not None:
        # A copy of the span in the filler would be recalled in place of the one in question.
        around = _tokens(tokenizer, text.replace(span, "") if span else text)
        again = recall(model, _tokens(tokenizer, span), around, distances), span
    mixers = [f"{i} {_short(layer.rule)}" for i, layer in enumerate(layers_of(model), 1)]
    return Found(text[: offsets[-1][1]], pieces(text, offsets), mixers, trace(model, ids), again)


def numbers(path: str, found: Found, page: Page) -> dict[str, Any]:
    """What was seen as JSON: for each layer and quantity a row of heads for each token, and the page's sections, which
    `miras report` shows too.
    """
    recorded = [
        {"mixer": mixer, "values": {n: _rounded(x) for n, x in layer.items()}}
        for mixer, layer in zip(found.mixers, found.trace.layers, strict=True)
    ]
    return {
        "model": path,
        "text": found.text,
        "tokens": found.trace.tokens.tolist(),
        "loss_bits": [None, *_rounded(found.trace.loss)],
        "layers": recorded,
        "sections": [plain(section) for section in page.sections if section.kind != "text"],
    }


def _page(path: str, file: str, found: Found, command: str) -> Page:
    text = coloured(found.trace, found.kept, found.mixers)
    parts = sections(found.trace, found.kept, found.mixers)
    curve = [recall_section(*found.recall)] if found.recall else []
    digest = hashlib.sha256(found.text.encode()).hexdigest()[:16]
    facts = {
        "Text": f"{file}, {counted(len(found.trace.tokens), 'token')}, hash {digest}",
        "Versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }
    bits = found.trace.loss.sum().item() / max(1, len(found.text.encode()))
    memories = sum(bool(layer) for layer in found.trace.layers)
    silent = "Attention has no inner learning: of such a layer there is nothing but the loss of the whole model."
    warnings = [("Attention.", silent)] if memories < len(found.trace.layers) else []
    lead = (
        f"{path} reads {counted(len(found.trace.tokens), 'token')} of {Path(file).name} at {bits:.2f} bits per byte. "
        f"{memories} of its {len(found.trace.layers)} layers learn while they read; this is what they do."
    )
    again = Facts((command,), facts, "How to reproduce it")
    return Page(f"Inside {Path(path).name}", lead, [text, *parts, *curve, again], warnings, text.css("s0"))


def _read(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--text {file}: there is no such file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {file}: expected UTF-8 text, and byte {error.start} is none.") from error


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(plain_backend(tokenizer).encode(text, add_special_tokens=False).ids, dtype=torch.int64)


def _short(mixer: Any) -> str:
    """A mixer in a word or two: its bias and retention are what tells memories apart."""
    if not isinstance(mixer, Rule):
        return "attention"
    return f"{type(mixer.bias).__name__}, {type(mixer.retention).__name__}"


def _rounded(x: Tensor) -> Any:
    """Numbers of a tensor with five digits, which is more than their float32 is worth after a text."""
    return [_rounded(row) for row in x] if x.dim() > 1 else [float(f"{value:.5g}") for value in x.tolist()]
