"""`miras bench`: from what was asked for to a plan, a table and two files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from miras.bench.decode import CONTEXTS
from miras.bench.entries import PEERS, mixer_of
from miras.bench.run import Plan, bench
from miras.bench.show import plot, speed_line, tables
from miras.bench.sizes import Sizes
from miras.demo import MODELS
from miras.errors import UsageError, near
from miras.train.files import write_json

CHUNKS = (4, 8, 16, 32, 64, 128)
TIMES = tuple(512 << i for i in range(8))
QUICK_CHUNKS, QUICK_TIMES, QUICK_CONTEXTS = (4, 8), (32, 64), (64, 128)
QUICK: dict[str, Any] = {"batch": 1, "dim": 32, "heads": 2, "layers": 1}


def measure(
    models: Sequence[str] | None,
    peers: str,
    sizes: dict[str, Any],
    times: Sequence[int],
    chunks: Sequence[int],
    sweep: str,
    decoding: bool,
    options: dict[str, Any],
    out: Path,
    quick: bool,
) -> dict[str, Any]:
    """Measure, print and write; the arguments are those of the command line.

    Returns:
        The results, as in bench.json.

    Raises:
        UsageError: an unknown model or peer, or sizes that cannot be.
    """
    if quick:
        sizes, times, chunks = sizes | QUICK, QUICK_TIMES[-1:], QUICK_CHUNKS[-1:]
        options = options | {"rounds": min(2, options["rounds"])}
    if sweep == "chunk":
        chunks = QUICK_CHUNKS if quick else CHUNKS
    if sweep == "time":
        times = QUICK_TIMES if quick else TIMES
    contexts = (QUICK_CONTEXTS if quick else CONTEXTS) if decoding else ()
    for name in models or ():
        mixer_of(name)  # what is wrong with it shows before the work
    base = Sizes(**sizes)
    names = dict.fromkeys([*(models or MODELS), *_peers(peers, base.level)])
    plan = Plan(tuple(names), base, tuple(sorted(set(times))), tuple(sorted(set(chunks))), contexts=contexts, **options)
    results = bench(plan, shlex.join(["miras", *sys.argv[1:]]))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "bench.json", results)
    plot(results, out / "bench.svg")
    # Where there is no terminal, rich would guess 80 columns and break the lines for nobody.
    console = Console(width=None if sys.stdout.isatty() else 220)
    for table in tables(results):
        console.print(table)
    print(speed_line(results))
    print(f"x PEER: how many times as fast, at the same chunk where the peer has one. {_threads()}")
    print(f"Written: {out / 'bench.json'} and {out / 'bench.svg'}.")
    return results


def _peers(words: str, level: str) -> list[str]:
    if words == "none" or (words == "all" and level == "model"):
        return []
    if words == "all":
        return list(PEERS)
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--peers: {name!r} is no peer." + near(name, [*PEERS, "all", "none"]))
    return names


def _threads() -> str:
    count = torch.get_num_threads()
    return f"Medians of calls in turn, {count} thread{'' if count == 1 else 's'}."
