"""The page of the demo: models trained on the same text, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miras.report.figures import Curves, Series
from miras.report.page import Page
from miras.report.runs import loss_curves
from miras.report.sections import Section
from miras.report.table import Column, Row, Table
from miras.report.text import counted, duration, listed, three_digits
from miras.report.words import Facts, Notes, Sample, Samples


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the comparison in `results` as one HTML page that loads nothing.

    The page holds a table with the best of each column in bold, loss, decoding time and state size as inline SVG, a
    sample of each model, how to read it all, and how to do it again.

    Args:
        results: a JSON-able dict with `title`, `command`, `created`, `quick`, `data`, `setup` and `models`, as the
            demo collects it. Contexts are decimal strings; a model may lack some of them, and the table then shows
            the longest one that all models have. `sample["text"]` is what follows the prompt.
        path: where the page goes.
    """
    Page(results["title"], _lead(results), sections(results), _warnings(results)).write(path)


def sections(results: dict[str, Any]) -> list[Section]:
    """The sections of the page."""
    models, trained_on = results["models"], results["setup"]["context"]
    samples = [Sample(model["name"], model["sample"]["text"], model["sample"]["prompt"]) for model in models]
    return [
        _table(models),
        *(section for model in models for section in loss_curves(model["name"], model["curve"], model["validation"])),
        _against_context(
            models,
            "decode_ms_per_token",
            "decoding, ms per token",
            "Time for one more token after a context of so many. A memory of fixed size works the same at any "
            "length; attention reads all of its cache again. Beyond "
            f"{trained_on:,} tokens, the length of the training texts, this is a cost and says nothing of quality.",
        ),
        _against_context(
            models,
            "state_bytes",
            "state, bytes",
            "What has to be kept to go on with a text: the memory, or the cache of keys and values. Both axes are "
            "logarithmic; lines that coincide show through one another.",
        ),
        Samples(tuple(samples), "Samples", "The prompt is in bold; the model wrote the rest."),
        Notes(_reading(results), "How to read this"),
        _facts(results),
    ]


def _unit(data: dict[str, Any]) -> str:
    """Return what one token of the data is called."""
    return "byte" if data["tokenizer"] == "bytes" else "token"


def _lead(results: dict[str, Any]) -> str:
    """Say in two sentences what learned what, and from how much."""
    data, setup, models = results["data"], results["setup"], results["models"]
    unit, sizes = _unit(data), [model["parameters"] for model in models]
    text = "Python's standard library source" if data["name"] == "stdlib" else data["name"]
    tokens = setup["steps"] * setup["tokens_per_step"]
    spread = f" (the largest has {max(sizes) / min(sizes) - 1:.1%} more than the smallest)" if len(models) > 1 else ""
    size = f"{three_digits(sum(sizes) / len(sizes) / 1e6)} million parameters{spread}"
    return (
        f"This run taught {listed([model['name'] for model in models])} to predict the next {unit} of {text}, "
        f"starting from random weights. Each read {counted(tokens, unit)} in {counted(setup['steps'], 'step')} with "
        f"about {size}, and was then scored on {counted(data['validation_tokens'], unit)} kept apart from training."
    )


def _warnings(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader has to know before any number: a smoke test, or an unequal race."""
    notes = []
    if results["quick"]:
        rest = "This was a quick run that only shows that everything works; its numbers rank nothing."
        notes.append(("Smoke test.", rest))
    steps = {model["name"]: model["steps"] for model in results["models"]}
    if any(taken != results["setup"]["steps"] for taken in steps.values()):
        taken = listed([f"{name} {count:,}" for name, count in steps.items()])
        notes.append(("Unequal training.", f"Steps taken: {taken}. The losses do not compare."))
    return notes


def _longest_shared(models: Sequence[dict[str, Any]], field: str) -> str | None:
    """Return the longest context that every model has in `field`, or None where they share none."""
    shared = set.intersection(*(set(model[field]) for model in models))
    return max(shared, key=int, default=None)


def _table(models: Sequence[dict[str, Any]]) -> Table:
    """Return the comparison; the parameters have no best, because they are equal by design."""
    columns = [
        Column("Parameters", form="integer"),
        Column("Validation", "bits per byte", "low", "fixed"),
        Column("Training", "tokens/s", "high", "integer"),
        Column("Peak memory", "", "low", "bytes"),
    ]
    fields = ("parameters", "val_bits_per_byte", "tokens_per_second", "peak_memory_bytes")
    values = [{c.name: model[field] for c, field in zip(columns, fields, strict=True)} for model in models]
    if at := _longest_shared(models, "decode_ms_per_token"):
        columns.append(Column("Decoding", f"ms/token at {int(at):,}", "low"))
        values = [v | {"Decoding": m["decode_ms_per_token"][at]} for v, m in zip(values, models, strict=True)]
    if kept := _longest_shared(models, "state_bytes"):
        columns.append(Column("State", f"at {int(kept):,} tokens", "low", "bytes"))
        values = [v | {"State": m["state_bytes"][kept]} for v, m in zip(values, models, strict=True)]
    rows = [Row(model["name"], v, model["mixer"]) for model, v in zip(models, values, strict=True)]
    note = "Below each name: memory + bias + retention + algorithm. 1 kB is 1000 bytes."
    return Table(tuple(columns), tuple(rows), "Results", note)


def _against_context(models: Sequence[dict[str, Any]], field: str, label: str, note: str) -> Curves:
    """Return `field`, a map from context to value, of each model that has measurements."""
    points = [(m["name"], sorted((int(context), value) for context, value in m[field].items())) for m in models]
    series = [Series(name, tuple(x for x, _ in p), tuple(y for _, y in p)) for name, p in points if p]
    form = "bytes" if label.endswith("bytes") else "digits"
    return Curves("context, tokens", label, tuple(series), "Cost of a long context", note, "xy", form)


def _reading(results: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Say what the numbers mean and how little they prove."""
    seconds = [model["train_seconds"] for model in results["models"]]
    shortest, longest = duration(min(seconds)), duration(max(seconds))
    took = longest if shortest == longest else f"{shortest} to {longest}"
    return (
        (
            "Bits per byte",
            "is how many bits a model needs, on average, to tell the next byte of a text it has not seen. A model that "
            "knows nothing needs 8; lower is better.",
        ),
        (
            "A short run ranks nothing finally.",
            f"Training took {took} a model. Which one learns fastest at this size need not be the best one at a larger "
            "size or after a longer training.",
        ),
        (
            "One seed, one learning rate.",
            f"All models used seed {results['setup']['seed']} and the same learning rate. A small gap in loss may turn "
            "with another seed.",
        ),
        (
            "Speed belongs to the machine",
            "named below and to what else ran on it. The shape of the curves over the context carries over; the "
            "milliseconds do not.",
        ),
    )


def _facts(results: dict[str, Any]) -> Facts:
    """Return what somebody needs to do the same again."""
    data, setup = results["data"], results["setup"]
    facts = {
        "Data": f"{data['name']}, {counted(data['train_tokens'], _unit(data))} for training, hash {data['hash']}",
        "Training": f"{counted(setup['steps'], 'step')} of {counted(setup['tokens_per_step'], 'token')}, "
        f"context {setup['context']:,}, learning rate {setup['learning_rate']:g}, seed {setup['seed']}",
        "Machine": f"{setup['cpu']}, {counted(setup['threads'], 'thread')} a run, runs side by side",
        "Versions": ", ".join(f"{package} {version}" for package, version in setup["versions"].items()),
        "Commit": setup["commit"] or "not known",
        "Written": results["created"],
    }
    return Facts((results["command"],), facts, "How to reproduce it")
