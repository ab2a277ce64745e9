"""`miras bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import Threads, lengths, main
from miras.errors import UsageError
from miras.process import set_threads


@main.command(
    epilog="Examples:\n\n  miras bench\n\n  miras bench yaad memora --chunk 16,64 --threads 1"
    "\n\n  miras bench yaad transformer --level model --time 256,8192 --sweep none"
    "\n\n  miras bench yaad --sweep time --forward --peers sdpa\n\n  miras bench yaad moneta --decode --profile"
    "\n\n  miras bench mine.yaml yaad --chunk 16"
)
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Variants (see miras list) or .yaml / .json files with a rule; some unless given."),
    ] = None,
    time: Annotated[str, typer.Option(help="Tokens of a sequence, several separated by commas.")] = "2048",
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 2,
    dim: Annotated[int | None, typer.Option(help="Size of the stream; 256, for a model 128.")] = None,
    heads: Annotated[int, typer.Option(help="Heads of each layer.")] = 4,
    chunk: Annotated[str, typer.Option(help="Tokens per chunk of variants, several separated by commas.")] = "64",
    gates: Annotated[str, typer.Option(help="head or channel.")] = "head",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for mixed precision.")] = "float32",
    backward: Annotated[
        bool, typer.Option("--backward/--forward", help="Forward and backward, or forward alone.")
    ] = True,
    level: Annotated[str, typer.Option(help="layer, or model for tokens to loss.")] = "layer",
    layers: Annotated[int, typer.Option(help="Layers of a model.")] = 4,
    sweep: Annotated[str, typer.Option(help="chunk (4 to 128), time (512 to 65,536) or none.")] = "none",
    peers: Annotated[str, typer.Option(help="titans-pytorch, transformers, sdpa, or all, or none.")] = "all",
    decode: Annotated[bool, typer.Option("--decode", help="Time one token after 1,024 and after 1,048,576.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Where the time of a call goes.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory, in a process each.")] = True,
    rounds: Annotated[int, typer.Option(help="How often each is timed; medians are reported.", min=1)] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compiled layers; minutes each at first.")] = False,
    threads: Threads = None,
    out: Annotated[str, typer.Option(help="Folder for bench.json and bench.svg.")] = "runs/bench",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds, for checks.")] = False,
) -> None:
    """Speed and memory of layers or models on this machine, beside peers and the machine's own matrix product.

    All take turns in one run, so that other work on the machine falls on all alike.
    """
    times, chunks = lengths(time, "--time"), lengths(chunk, "--chunk")
    if sweep not in ("chunk", "time", "none"):
        raise UsageError(f"--sweep {sweep}: expected chunk, time or none.")
    # The profiler would write lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    set_threads(threads)
    import torch

    from miras.bench.command import measure

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"batch": batch, "dim": dim, "heads": heads, "gates": gates, "dtype": dtype, "backward": backward}
    sizes |= {"level": level, "layers": layers, "device": where, "compile": compile}
    options = {"rounds": rounds, "memory": memory, "profiled": profile}
    measure(models, peers, sizes, times, chunks, sweep, decode, options, Path(out), quick)
