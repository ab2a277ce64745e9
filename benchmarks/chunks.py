"""What a chunk costs and what it brings: quality against speed over chunk sizes, from real training runs.

    python benchmarks/chunks.py --seeds 2 --threads 1 --jobs 1      # resumes where it stopped
    python benchmarks/chunks.py --quick --out runs/chunks-quick    # some steps, for a check; its numbers mean nothing

Every run is a `miras train` of the tiny model, equal in all but the chunk. Then a training step of each is timed, all
taking turns. Writes benchmarks/results/chunks.md and docs/chunks.svg.
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
from miras.demo import validation_text
from miras.report.plots import FILE_STYLE, file_svg, look
from miras.train.bar import Bar
from miras.train.files import write_text
from miras.train.many import Job, train_many
from miras.train.provenance import commit, cpu
from miras.train.summary import Summary

ROOT = Path(__file__).parent.parent
RESULTS, PLOT = Path("benchmarks/results/chunks.md"), Path("docs/chunks.svg")
MODELS = ("yaad", "moneta", "memora")
CHUNKS = (4, 16, 64, 128)
STEPS, CONTEXT, BATCH = 250, 512, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the timing; a training run has one for itself")
    parser.add_argument("--jobs", type=int, default=1, help="training runs side by side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/chunks"), help="folder of the runs")
    parser.add_argument("--train", action="store_true", help="train only: time when the machine is quiet")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    steps, chunks, root = (4, (16, 64), args.out) if args.quick else (STEPS, CHUNKS, ROOT)
    args.out.mkdir(parents=True, exist_ok=True)
    validation_text(args.out / "data")
    runs = [(name, chunk, seed) for seed in range(args.seeds) for chunk in reversed(chunks) for name in MODELS]
    folders = {run: args.out / "-".join(map(str, run)) for run in runs}
    train_many([_job(run, folder, steps, args.out / "data") for run, folder in folders.items()], args.jobs)
    if args.train:
        return
    torch.set_num_threads(args.threads)
    found = {run: Summary.read(folder / "summary.json") for run, folder in folders.items()}
    bits = {
        (name, chunk): [found[name, chunk, seed].val_bits_per_byte for seed in range(args.seeds)]
        for name in MODELS
        for chunk in chunks
    }
    speed = _speed(list(bits), args.rounds)
    for path in (RESULTS, PLOT):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    text = _page(bits, speed, next(iter(found.values())), args)
    write_text(root / RESULTS, text)
    _plot(bits, speed, root / PLOT)
    print(text)


def _job(run: tuple[str, int, int], out: Path, steps: int, cache: Path) -> Job:
    name, chunk, seed = run
    flags = {"chunk": chunk, "seed": seed, "steps": steps, "context": CONTEXT, "batch": BATCH, "eval-windows": 128}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    return Job(f"{name} {chunk}, seed {seed}", out, steps, ("train", name, *words, f"--cache={cache}"))


def _speed(entries: list[tuple[str, int]], rounds: int) -> dict[tuple[str, int], float]:
    """Tokens per second of a training step."""
    calls, names = {}, {f"{name} {chunk}": (name, chunk) for name, chunk in entries}
    for label, (name, chunk) in names.items():
        sizes = Sizes(level="model", batch=BATCH // CONTEXT, time=CONTEXT, chunk=chunk)
        calls[label] = step(build(name, sizes), sizes)
    with Bar("timed") as bar:
        timings = alternate(calls, rounds, told=Steps(bar, len(calls) * (rounds + 1)))
    return {names[label]: BATCH / timing.median for label, timing in timings.items()}


def _page(bits: dict, speed: dict, first: Summary, args: argparse.Namespace) -> str:
    seeds = "one seed" if args.seeds == 1 else f"mean of {args.seeds} seeds and their spread"
    lines = [
        "# Quality against speed over chunk sizes",
        "",
        f"The tiny model, {first.steps} steps of {BATCH:,} tokens in sequences of {CONTEXT}, validation bits per byte "
        f"({first.data['name']}, hash `{first.data['hash']}`), {seeds}; tokens per "
        f"second of a training step, medians of {args.rounds} turns, {args.threads} thread(s).",
        f"`python benchmarks/chunks.py --seeds {args.seeds} --threads {args.threads}`, {cpu()}, commit "
        f"{commit() or 'unknown'}, torch {first.versions['torch']}.",
        "",
        "| model | chunk | bits per byte | spread | tokens/s | speed to chunk 16 |",
        "|---|---|---|---|---|---|",
    ]
    for (name, chunk), found in bits.items():
        ratio = speed[name, chunk] / speed[name, 16]
        spread = f"{max(found) - min(found):.3f}" if args.seeds > 1 else ""
        cells = (name, chunk, f"{statistics.mean(found):.3f}", spread, f"{speed[name, chunk]:,.0f}")
        lines.append("| " + " | ".join(map(str, (*cells, f"{ratio:.2f}"))) + " |")
    return "\n".join(lines) + "\n"


def _plot(bits: dict, speed: dict, path: Path) -> None:
    with matplotlib.rc_context(FILE_STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(name for name, _ in bits)):
            own = [(speed[key], statistics.mean(found), key[1]) for key, found in bits.items() if key[0] == name]
            shape = look(index)
            axes.plot(
                *zip(*((x, y) for x, y, _ in own), strict=True), color=shape.colour, marker=shape.marker, label=name
            )
            for x, y, chunk in own:
                axes.annotate(str(chunk), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel("tokens per second of a training step")
        axes.set_ylabel("validation bits per byte")
        axes.legend(title="numbers: chunk")
        write_text(path, file_svg(figure, "benchmarks/chunks.py"))


if __name__ == "__main__":
    main()
