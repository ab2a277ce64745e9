"""What a chunk costs and what it brings: a training step's speed over chunk sizes, beside the loss of the runs of
`miras experiment chunk` (experiments/results/chunk-laptop.json).

    python benchmarks/chunks.py --threads 1

Steps of all models and chunks take turns. Writes benchmarks/results/chunks.md and docs/chunks.svg.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from miras.bench.entries import build, step
from miras.bench.progress import Steps
from miras.bench.sizes import Sizes
from miras.bench.timing import alternate
from miras.experiments.plan import SCALES
from miras.report.figures import Curves
from miras.report.plots import FILE_STYLE, file_svg, look
from miras.report.runs import file_sections
from miras.train.bar import Bar
from miras.train.config import load_config
from miras.train.files import write_text
from miras.train.provenance import commit, cpu

ROOT = Path(__file__).parent.parent
FOUND, RESULTS, PLOT = (
    ROOT / path for path in ("experiments/results/chunk-laptop.json", "benchmarks/results/chunks.md", "docs/chunks.svg")
)
TRAINING = load_config("yaad", SCALES["laptop"].training)

Loss = dict[tuple[str, int], list[float]]
"""Bits per byte of each seed of a model and chunk."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loss = _loss()
    speed = _speed(list(loss), args.rounds)
    text = _page(loss, speed, args)
    write_text(RESULTS, text)
    _plot(loss, speed)
    print(text)


def _loss() -> Loss:
    (curves,) = (s for s in file_sections(FOUND) if isinstance(s, Curves) and s.title == "By chunk")
    found: Loss = {}
    for series in curves.series:
        for chunk, bits in zip(series.x, series.y, strict=True):
            found.setdefault((series.name, int(chunk)), []).append(bits)
    return found


def _speed(entries: list[tuple[str, int]], rounds: int) -> dict[tuple[str, int], float]:
    """Tokens per second of a training step of the experiment's models."""
    calls, names = {}, {f"{name} {chunk}": (name, chunk) for name, chunk in entries}
    for label, (name, chunk) in names.items():
        sizes = Sizes(level="model", batch=TRAINING.batch // TRAINING.context, time=TRAINING.context, chunk=chunk)
        calls[label] = step(build(name, sizes), sizes)
    with Bar("timed") as bar:
        timings = alternate(calls, rounds, told=Steps(bar, len(calls) * (rounds + 1)))
    return {names[label]: TRAINING.batch / timing.median for label, timing in timings.items()}


def _page(loss: Loss, speed: dict[tuple[str, int], float], args: argparse.Namespace) -> str:
    (seeds,) = {len(found) for found in loss.values()}
    lines = [
        "# Quality against speed over chunk sizes",
        "",
        f"Validation bits per byte of `miras experiment chunk`, mean of {seeds} seeds and their spread "
        "([results.md](../../docs/results.md#the-chunk)); tokens per second of a training step of "
        f"{TRAINING.batch:,} tokens in sequences of {TRAINING.context}, medians of {args.rounds} turns, "
        f"{args.threads} thread(s).",
        f"`python benchmarks/chunks.py --threads {args.threads}`, {cpu()}, commit {commit() or 'unknown'}, torch "
        f"{torch.__version__}.",
        "",
        "| model | chunk | bits per byte | spread | tokens/s | speed to chunk 16 |",
        "|---|---|---|---|---|---|",
    ]
    for (name, chunk), found in loss.items():
        mean, spread, here = statistics.mean(found), max(found) - min(found), speed[name, chunk]
        ratio = here / speed[name, 16]
        lines.append(f"| {name} | {chunk} | {mean:.3f} | {spread:.3f} | {here:,.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def _plot(loss: Loss, speed: dict[tuple[str, int], float]) -> None:
    with matplotlib.rc_context(FILE_STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(name for name, _ in loss)):
            own = [(speed[key], statistics.mean(found), key[1]) for key, found in loss.items() if key[0] == name]
            shape, (x, y, chunks) = look(index), zip(*own, strict=True)
            axes.plot(x, y, color=shape.colour, marker=shape.marker, label=name)
            for *at, chunk in zip(x, y, chunks, strict=True):
                axes.annotate(str(chunk), at, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel("tokens per second of a training step")
        axes.set_ylabel("validation bits per byte")
        axes.legend(title="numbers: chunk")
        write_text(PLOT, file_svg(figure, "benchmarks/chunks.py"))


if __name__ == "__main__":
    main()
