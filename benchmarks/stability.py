"""Gradient norms of Moneta, Yaad and Memora as they train on real text: the promise that their defaults are stable.

    python benchmarks/stability.py            # the full grid, 200 steps a cell; writes benchmarks/results/stability.md
    python benchmarks/stability.py --models yaad --chunks 16 --lengths 256 --dtypes float32 --out -
    python benchmarks/stability.py --models mine.yaml --lengths 2048 --dtypes float32 --seeds 0 1 2 --out -

A small model (2 layers, 2 heads of 32) reads the source text of Python's standard library as bytes; AdamW, no warm-up
and no clipping, so that an unstable memory would show.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.bench.entries import has_chunk, mixer_of
from miras.model import Miras
from miras.train.provenance import commit

MODELS = ("moneta", "yaad", "memora")
CHUNKS = (16, 64)
LENGTHS = (256, 2048)
DTYPES = ("float32", "bfloat16")
STEPS = 200
LIMIT = 10.0  # the largest outer gradient norm that counts as stable
DIM, LAYERS, HEADS, HIDDEN, VOCAB = 64, 2, 2, 176, 256
TOKENS = 2048  # of a batch, shared out over as many sequences as fit, at least one
LEARNING_RATE = 2e-3
MARK = 30  # the step whose norm is reported beside the first
SOURCES: tuple[ModuleType, ...] = (argparse, inspect, typing, platform, subprocess)
RESULTS = Path(__file__).parent / "results" / "stability.md"


@dataclass(frozen=True)
class Cell:
    """What one training run is of, of text and of what is drawn; `context` is the longest time constant to start with,
    None: the length.
    """

    model: str
    chunk: int
    length: int
    dtype: str = "float32"
    gates: str = "head"
    context: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of it: the outer gradient norm and the loss in bits per byte of every step, and seconds."""

    cell: Cell
    norms: tuple[float, ...]
    bits: tuple[float, ...]
    seconds: float

    @property
    def stable(self) -> bool:
        """Whether nothing broke and no norm reached the limit; NaN is never below it."""
        return all(norm < LIMIT for norm in self.norms) and all(map(math.isfinite, self.bits))


def corpus() -> Tensor:
    """The bytes of some files of the standard library, int64 [N]."""
    text = "\n".join(inspect.getsource(module) for module in SOURCES)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(length: int, tokens: int = TOKENS, seed: int = 0) -> Iterator[Tensor]:
    """Random crops of the corpus without end, [tokens / length, length]."""
    data, generator = corpus(), torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(data) - length, (max(tokens // length, 1), 1), generator=generator)
        yield data[start + torch.arange(length)]


def make(cell: Cell) -> Miras:
    """A fresh model, the same for the same cell."""
    torch.manual_seed(cell.seed)
    mixers = LAYERS * [mixer_of(cell.model, cell.chunk)]
    return Miras(VOCAB, DIM, HEADS, HIDDEN, mixers, gates=cell.gates, context=cell.context or cell.length)


def backward(model: nn.Module, batch: Tensor, dtype: str = "float32") -> tuple[float, float]:
    """Set the gradients of the next-byte loss; returns its bits per byte and the norm of all gradients."""
    model.zero_grad(set_to_none=True)
    cast = nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=getattr(torch, dtype))
    with cast:
        logits, _ = model(batch)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item() / math.log(2), norm.item()


def train(cell: Cell, steps: int, tokens: int = TOKENS) -> Outcome:
    """Take `steps` steps, and measure each before it is taken."""
    model, bits, norms, begin = make(cell), [], [], time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _, batch in zip(range(steps), batches(cell.length, tokens, cell.seed), strict=False):
        bit, norm = backward(model, batch, cell.dtype)
        optimizer.step()
        bits.append(bit)
        norms.append(norm)
    return Outcome(cell, tuple(norms), tuple(bits), time.perf_counter() - begin)


def table(outcomes: Sequence[Outcome]) -> str:
    """Outcomes as a markdown table."""
    head = (
        "model",
        "chunk",
        "T",
        "dtype",
        "seed",
        "norm at step 0",
        f"at step {MARK}",
        "largest",
        "bits/byte",
        "last",
        "stable",
    )
    rows = [head, ("---",) * len(head)]
    for o in outcomes:
        c = o.cell
        # The maximum of a tensor keeps NaN, that of Python may drop it.
        norms = (o.norms[0], o.norms[min(MARK, len(o.norms) - 1)], torch.tensor(o.norms).max().item())
        numbers = [f"{x:.2f}" for x in (*norms, o.bits[0], o.bits[-1])]
        rows.append((c.model, str(c.chunk), str(c.length), c.dtype, str(c.seed), *numbers, "yes" if o.stable else "NO"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(outcomes: Sequence[Outcome], steps: int, command: str) -> str:
    """The table with what it was measured on."""
    return f"""# Outer gradient norms

{LAYERS} layers, {HEADS} heads of {DIM // HEADS}, gates per {outcomes[0].cell.gates}; bytes of standard-library sources,
{TOKENS} a step; AdamW {LEARNING_RATE:g}, no warm-up, no clipping; {steps} steps. Stable: every norm below {LIMIT:g} and
everything finite.

{table(outcomes)}

`{command}`, commit {commit() or "unknown"}, torch {torch.__version__}, {platform.machine()}
with {os.cpu_count()} cores, {torch.get_num_threads()} threads, {sum(o.seconds for o in outcomes):.0f} s.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets, or files with a rule as of miras train")
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS, help="tokens per chunk; a file has its own")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens per sequence")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="bfloat16 is autocast")
    parser.add_argument("--gates", choices=("head", "channel"), default="head", help="gates per head or per channel")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of initial weights and of the text")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps per cell")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--out", default=str(RESULTS), help="file for the table; - prints it only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Train every cell of the grid, print a line for each and write the table."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    cells = [
        Cell(model, chunk, length, dtype, options.gates, seed=seed)
        for model in options.models
        for chunk in (options.chunks if has_chunk(model) else [mixer_of(model).chunk])
        for length in options.lengths
        for dtype in options.dtypes
        for seed in options.seeds
    ]
    outcomes = []
    for number, cell in enumerate(cells, 1):
        outcomes.append(outcome := train(cell, options.steps))
        print(
            f"{number}/{len(cells)} {cell.model} chunk {cell.chunk} T {cell.length} {cell.dtype} seed {cell.seed}: "
            f"norm {outcome.norms[0]:.2f} to {outcome.norms[-1]:.2f}, {outcome.bits[0]:.2f} to {outcome.bits[-1]:.2f} "
            f"bits per byte, {outcome.seconds:.0f} s{'' if outcome.stable else ', NOT STABLE'}",
            flush=True,
        )
    text = page(outcomes, options.steps, shlex.join(["python", "benchmarks/stability.py", *given]))
    print(f"\n{text}")
    if options.out != "-":
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text)
    return outcomes


if __name__ == "__main__":
    sys.exit(0 if all(outcome.stable for outcome in main()) else 1)
