"""The report of a comparison: one HTML page that needs nothing but itself."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from miras.report import plots
from miras.report.text import byte_size, counted, duration, listed, printable, three_digits

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
thead th { vertical-align: bottom; font-weight: 600; line-height: 1.3; border-bottom: 2px solid var(--ink); }
thead small { display: block; font-weight: 400; color: var(--soft); }
.comparison { white-space: nowrap; }
.comparison th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.comparison th, .comparison td { padding-bottom: 0; }
.comparison thead th, .comparison .choices td { padding-bottom: .5rem; }
.comparison .choices td { padding-top: 0; text-align: left; white-space: normal; color: var(--soft); }
.choices span { display: inline-block; position: sticky; left: .6rem; max-width: calc(100vw - 3.2rem); }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.6rem 2rem; }
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
  .choices span { position: static; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure, tbody, .sample { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .note, pre { border: 1px solid var(--rule); }
  th, td { padding: .3rem .35rem; }
}
"""


def write_report(results: dict, path: Path) -> None:
    """Write the comparison in `results` as one HTML page that loads nothing and looks the same every time.

    The page holds a table with the best of each column in bold, loss, decoding time and state size as inline SVG, a
    sample of each model, how to read it all, and how to do it again. The file appears whole or not at all.

    Args:
        results: a JSON-able dict with `title`, `command`, `created`, `quick`, `data`, `setup` and `models`, as the
            demo collects it. Contexts are decimal strings; a model may lack some of them, and the table then shows
            the longest one that all models have. `sample["text"]` is what follows the prompt.
        path: where the page goes; missing folders above it are made, an older page is replaced.
    """
    page = _page(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _page(results: dict) -> str:
    """Return the whole page."""
    models = results["models"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(results["title"])}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(results["title"])}</h1>
<p class="lead">{_lead(results)}</p>
{_notes(results)}
</header>
<main>
<h2>Results</h2>
{_table(models)}
<h2>Learning</h2>
{_loss(models)}
<h2>Cost of a long context</h2>
{_costs(models, results["setup"]["context"])}
<h2>Samples</h2>
{_samples(models)}
<h2>How to read this</h2>
{_reading(results)}
<h2>How to reproduce it</h2>
{_facts(results)}
</main>
</body>
</html>
"""


def _unit(data: dict) -> str:
    """Return what one token of the data is called."""
    return "byte" if data["tokenizer"] == "bytes" else "token"


def _text_name(data: dict) -> str:
    """Return the name of the data in words, where there are words for it."""
    return "Python's standard library source" if data["name"] == "stdlib" else data["name"]


def _lead(results: dict) -> str:
    """Say in two sentences what learned what, and from how much."""
    data, setup, models = results["data"], results["setup"], results["models"]
    unit, sizes = _unit(data), [model["parameters"] for model in models]
    names = listed([f"<strong>{escape(model['name'])}</strong>" for model in models])
    tokens = setup["steps"] * setup["tokens_per_step"]
    spread = f" (the largest has {max(sizes) / min(sizes) - 1:.1%} more than the smallest)" if len(models) > 1 else ""
    size = f"{three_digits(sum(sizes) / len(sizes) / 1e6)} million parameters{spread}"
    return (
        f"This run taught {names} to predict the next {unit} of {escape(_text_name(data))}, "
        f"starting from random weights. Each read {counted(tokens, unit)} in {counted(setup['steps'], 'step')} with "
        f"about {size}, and was then scored on {counted(data['validation_tokens'], unit)} kept apart from training."
    )


def _notes(results: dict) -> str:
    """Return what a reader has to know before any number: a smoke test, or an unequal race."""
    notes = []
    if results["quick"]:
        notes.append(
            "<strong>Smoke test.</strong> This was a quick run that only shows that everything works; "
            "its numbers rank nothing."
        )
    steps = {model["name"]: model["steps"] for model in results["models"]}
    if any(taken != results["setup"]["steps"] for taken in steps.values()):
        taken = listed([f"{escape(name)} {count:,}" for name, count in steps.items()])
        notes.append(f"<strong>Unequal training.</strong> Steps taken: {taken}. The losses do not compare.")
    return "\n".join(f'<p class="note" role="note">{note}</p>' for note in notes)


class _Column(NamedTuple):
    """A column of numbers: its head, what the number of a model is, how to write it, and which end is best."""

    head: str
    hint: str
    value: Callable[[dict], float]
    write: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None


def _longest_shared(models: Sequence[dict], field: str) -> str | None:
    """Return the longest context that every model has in `field`, or None where they share none."""
    shared = set.intersection(*(set(model[field]) for model in models))
    return max(shared, key=int, default=None)


def _columns(models: Sequence[dict]) -> list[_Column]:
    """Return the columns of numbers; the parameters have no best, because they are equal by design."""
    columns = [
        _Column("Parameters", "", lambda m: m["parameters"], lambda x: f"{x:,}", None),
        _Column("Validation&nbsp;↓", "bits per byte", lambda m: m["val_bits_per_byte"], lambda x: f"{x:.3f}", min),
        _Column("Training&nbsp;↑", "tokens/s", lambda m: m["tokens_per_second"], lambda x: f"{x:,.0f}", max),
        _Column("Peak memory&nbsp;↓", "", lambda m: m["peak_memory_bytes"], byte_size, min),
    ]
    if at := _longest_shared(models, "decode_ms_per_token"):
        hint = f"ms/token at {int(at):,}"
        columns.append(_Column("Decoding&nbsp;↓", hint, lambda m: m["decode_ms_per_token"][at], three_digits, min))
    if kept := _longest_shared(models, "state_bytes"):
        hint = f"at {int(kept):,} tokens"
        columns.append(_Column("State&nbsp;↓", hint, lambda m: m["state_bytes"][kept], byte_size, min))
    return columns


def _cells(column: _Column, models: Sequence[dict]) -> list[str]:
    """Return a column's cells, the best in bold.

    The best is judged as written: numbers that read the same are all bold, and none is where all read the same.
    """
    values = [column.value(model) for model in models]
    written = [column.write(value) for value in values]
    finite = [value for value in values if math.isfinite(value)]
    best = column.write(column.best(finite)) if column.best and finite and len(set(written)) > 1 else None
    return [f"<td><strong>{text}</strong></td>" if text == best else f"<td>{text}</td>" for text in written]


def _dot(index: int) -> str:
    return f'<span class="dot" style="background:{plots.look(index).colour}"></span>'


def _table(models: Sequence[dict]) -> str:
    """Return the comparison as a table: for each model a row of numbers, and below it what it is made of."""
    columns = _columns(models)
    heads = "".join(f'<th scope="col">{column.head} <small>{column.hint}</small></th>' for column in columns)
    rows = []
    for index, cells in enumerate(zip(*(_cells(column, models) for column in columns), strict=True)):
        name, mixer = escape(models[index]["name"]), escape(models[index]["mixer"])
        head = f'<th scope="row">{_dot(index)}{name}</th>'
        choices = f'<tr class="choices"><td colspan="{1 + len(columns)}"><span>{mixer}</span></td></tr>'
        rows.append(f"<tbody><tr>{head}{''.join(cells)}</tr>{choices}</tbody>")
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="Results">
<table class="comparison">
<thead><tr><th scope="col">Model <small>and its choices</small></th>{heads}</tr></thead>
{chr(10).join(rows)}
</table>
</div>
<p class="soft">Below each name: memory + bias + retention + algorithm. ↓ lower is better, ↑ higher is better, best in
bold. 1 kB is 1000 bytes.</p>"""


def _figures(*figures: tuple[str, str]) -> str:
    """Lay (SVG, caption) pairs out side by side, or below one another where the window is narrow."""
    cells = (f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in figures)
    return f'<div class="figures">\n{chr(10).join(cells)}\n</div>'


def _loss(models: Sequence[dict]) -> str:
    """Return the loss curves: the whole run, and its second half where the models can be told apart."""
    reach = max(plots.smoothing_reach(len(model["curve"]["step"])) for model in models)
    smoothed = f"training, each point the mean of {2 * reach + 1} measurements" if reach else "training"
    return _figures(
        (plots.loss_figure(models, "loss"), f"The whole run. Lines: {smoothed}. Marks: validation."),
        (plots.loss_figure(models, "late", start=0.5), "The second half of the run, with an axis of its own."),
    )


def _costs(models: Sequence[dict], trained_on: int) -> str:
    """Return decoding time and state size against context."""
    return _figures(
        (
            plots.decode_figure(models, "decode"),
            "Time for one more token after a context of so many. A memory of fixed size works the same at any "
            "length; attention reads all of its cache again. Beyond "
            f"{trained_on:,} tokens, the length of the training texts, this is a cost and says nothing of quality.",
        ),
        (
            plots.state_figure(models, "state"),
            "What has to be kept to go on with a text: the memory, or the cache of keys and values. Both axes are "
            "logarithmic; lines that coincide show through one another.",
        ),
    )


def _samples(models: Sequence[dict]) -> str:
    """Return one generated text a model, its prompt in bold."""
    parts = []
    for index, model in enumerate(models):
        prompt, text = (escape(printable(model["sample"][key])) for key in ("prompt", "text"))
        # HTML drops a line break right after <pre>: one that may be dropped goes before the text.
        block = f"<pre>\n<strong>{prompt}</strong>{text}</pre>"
        parts.append(f'<div class="sample"><h3>{_dot(index)}{escape(model["name"])}</h3>{block}</div>')
    return '<p class="soft">The prompt is in bold; the model wrote the rest.</p>\n' + "\n".join(parts)


def _reading(results: dict) -> str:
    """Say what the numbers mean and how little they prove."""
    seconds = [model["train_seconds"] for model in results["models"]]
    shortest, longest = duration(min(seconds)), duration(max(seconds))
    took = longest if shortest == longest else f"{shortest} to {longest}"
    return f"""<ul>
<li><strong>Bits per byte</strong> is how many bits a model needs, on average, to tell the next byte of a text it has
not seen. A model that knows nothing needs 8; lower is better.</li>
<li><strong>A short run ranks nothing finally.</strong> Training took {took} a model. Which one learns
fastest at this size need not be the best one at a larger size or after a longer training.</li>
<li><strong>One seed, one learning rate.</strong> All models used seed {results["setup"]["seed"]} and the same learning
rate. A small gap in loss may turn with another seed.</li>
<li><strong>Speed belongs to the machine</strong> named below and to what else ran on it. The shape of the curves over
the context carries over; the milliseconds do not.</li>
</ul>"""


def _facts(results: dict) -> str:
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
    rows = (f'<tr><th scope="row">{name}</th><td>{escape(str(fact))}</td></tr>' for name, fact in facts.items())
    return f"""<pre>
{escape(results["command"])}</pre>
<table class="facts"><tbody>
{chr(10).join(rows)}
</tbody></table>"""
