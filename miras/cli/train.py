"""`miras train`, `miras demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import Threads, main
from miras.errors import MirasError, UsageError
from miras.process import set_threads


@main.command(
    epilog="Examples:\n\n  miras train yaad\n\n  miras train yaad,sliding_window --data book.txt --steps 999\n\n"
    "  miras train my_rule.yaml --size 120m --data corpus/ --bf16\n\n  miras train --resume --out runs/yaad"
)
def train(
    model: Annotated[
        str | None,
        typer.Argument(help="A variant (see miras list), a pattern (yaad,sliding_window), or a .yaml / .json file."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Preset: tiny, 120m, 340m, 760m or 1.3b.")] = None,
    data: Annotated[
        str | None, typer.Option(help="stdlib, a file or folder of text, .jsonl or .parquet, or a hub id.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, bpe:SIZE, a folder or a hub id.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; runs/MODEL unless given.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of tokenised text, which runs may share.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens per optimizer step.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Parts that a step is taken in, to save memory.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which the learning rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the weights of linear maps.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and order of data.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Mixed precision.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Some minutes at first for faster steps.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Windows of the last validation.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep.")] = None,
    dim: Annotated[int | None, typer.Option(help="Size of the stream.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of each layer.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size of each SwiGLU.")] = None,
    gates: Annotated[str | None, typer.Option(help="head or channel.")] = None,
    conv: Annotated[int | None, typer.Option(help="Width of the short convolution; 0: none.")] = None,
    rope: Annotated[bool | None, typer.Option("--rope/--no-rope", help="Rotate q and k before a memory.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
    threads: Threads = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Metrics for TensorBoard too.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the newest complete checkpoint.")] = False,
) -> None:
    """Train a model on text, from nothing to a folder that generates.

    What is given here wins over a configuration file, the file over the size.
    """
    flags = {n: v for n, v in locals().items() if n not in ("model", "resume") and v is not None}
    if model is None and not resume:
        raise UsageError("miras train: say which model, such as miras train yaad; miras list shows them all.")
    set_threads(threads)
    from miras.train import load_config
    from miras.train import train as run
    from miras.train.checkpoints import how_to_resume
    from miras.train.folder import resumed_config

    config = resumed_config(model, flags) if resume else load_config(model, flags)
    try:
        run(config, resume)
    except KeyboardInterrupt as stop:
        raise MirasError(f"Stopped. {how_to_resume(Path(config.out))}") from stop


@main.command(epilog="Examples:\n\n  miras demo\n\n  miras demo --quick --out runs/smoke")
def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs and the report.")] = "runs/demo",
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of ten, for checks.")] = False,
    seed: Annotated[int, typer.Option(help="Of initialisation and order of data.")] = 0,
) -> None:
    """Train Moneta, Yaad, Memora, Gated DeltaNet and a Transformer on the same text, and write a report."""
    from miras.demo import demo as run

    run(Path(out), quick, seed)
