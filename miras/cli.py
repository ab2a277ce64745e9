"""The command line. Everything heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from miras.errors import MirasError, UsageError


class _Commands(TyperGroup):
    """Commands whose deliberate failures are one paragraph and an exit code, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MirasError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stop:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(1) from stop


main = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Sequence layers as associative memories that learn while they read.",
    epilog="Begin with [bold]miras demo[/bold], or [bold]miras list[/bold] and [bold]miras train yaad[/bold].",
)

Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch; all cores unless given.", min=1)]


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
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Windows of the last validation.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep.")] = None,
    dim: Annotated[int | None, typer.Option(help="Size of the stream.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of each layer.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size of each SwiGLU.")] = None,
    gates: Annotated[str | None, typer.Option(help="head or channel.")] = None,
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
    _threads(threads)
    from miras.train import load_config
    from miras.train import train as run
    from miras.train.checkpoints import how_to_resume
    from miras.train.folder import resumed_config

    config = resumed_config(model, flags) if resume else load_config(model, flags)
    try:
        run(config, resume)
    except KeyboardInterrupt as stop:
        raise MirasError(f"Stopped. {how_to_resume(Path(config.out))}") from stop


@main.command(
    name="eval",
    epilog="Examples:\n\n  miras eval runs/yaad\n\n  miras eval runs/yaad --data book.txt --part all --json",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder or model folder.")],
    data: Annotated[str, typer.Option(help="As for miras train.")] = "stdlib",
    context: Annotated[str, typer.Option(help="Lengths of windows in tokens, separated by commas.")] = "256,1024,4096",
    part: Annotated[str, typer.Option(help="validation, train, or all (of a text not trained on).")] = "validation",
    limit: Annotated[int, typer.Option(help="Tokens to look at, at most.", min=2)] = 131_072,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Threads = None,
) -> None:
    """Perplexity and bits per byte on text, a row per context length, all over the same tokens."""
    lengths = _lengths(context)
    if part not in ("validation", "train", "all"):
        raise UsageError(f"--part {part}: expected validation, train or all.")
    _threads(threads)
    from miras.evaluate import evaluate as run

    rows = [asdict(row) for row in run(model, data, lengths, limit, part)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=f"{model} on {data} ({part})")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else f"{v:,.{0 if v > 1e3 else 3}f}" for v in row.values()))
    for column in table.columns:
        column.justify = "right"
    Console().print(table)


@main.command(
    epilog="Examples:\n\n  miras generate runs/yaad --prompt 'def '\n\n  head book.txt | miras generate runs/yaad"
    "\n\n  miras generate runs/yaad --prompt-file start.txt --temperature 0 --tokens 1000"
)
def generate(
    model: Annotated[str, typer.Argument(help="Run folder or model folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without it, standard input.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the text to continue.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many likeliest tokens; 0: among all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Threads = None,
) -> None:
    """Continue a text, shown as it comes."""
    text = _prompt(prompt, prompt_file)
    _threads(threads)
    from miras.evaluate import generate as run
    from miras.evaluate import load_model

    loaded, tokenizer = load_model(model)
    _write(text)
    run(loaded, tokenizer, text, tokens, _write, temperature, top_k, seed)
    _write("\n")


@main.command(name="list", epilog="Examples:\n\n  miras list\n\n  miras list --axes\n\n  miras list --json")
def list_variants(
    of_axes: Annotated[bool, typer.Option("--axes", help="What exists on each axis, instead of the variants.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The variants: four choices each, the update, the engines, and what each is checked against."""
    from miras.evaluate.describe import AXES, axes, rows

    table = axes() if of_axes else rows()
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    if isinstance(table, dict):
        typer.echo("\n\n".join(_axis(axis, parts) for axis, parts in table.items()))
        return
    grid = Table("name", *AXES, "engine", "checked against", "error", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in table:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        oracle = row["oracle"] or "nothing yet"
        grid.add_row(row["name"], *(row[axis] for axis in AXES), row["engines"][0], oracle, error)
    for column in grid.columns:
        column.overflow = "fold"
    # Where there is no terminal, rich would guess 80 columns and break the lines for nobody.
    Console(width=None if sys.stdout.isatty() else 220).print(grid)
    typer.echo(
        "error: largest relative deviation of outputs, memory and all gradients from the implementation it is checked "
        "against, in float64."
        "\nOne as formulas, with gates and sizes: miras explain NAME. Updates and all engines: miras list --json"
        "\nWhat else there is on each axis: miras list --axes"
    )


def _axis(name: str, parts: list[dict[str, Any]]) -> str:
    """An axis as lines: each class with its arguments, below it its formula."""
    lines = [name]
    for part in parts:
        arguments = ", ".join(f"{key}={value!r}" for key, value in part["arguments"].items())
        lines += [f"  {part['name']}({arguments})", f"      {part['formula']}"]
    return "\n".join(lines)


@main.command(epilog="Examples:\n\n  miras explain yaad\n\n  miras explain memora --heads 16 --head-dim 64 --chunk 64")
def explain(
    name: Annotated[str, typer.Argument(help="A variant, a pattern of them, or a .yaml / .json file with a rule.")],
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Size of each head.")] = 32,
    chunk: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
) -> None:
    """A variant as formulas: the update, the axes, the gates, what it stores, and which engine runs it."""
    from miras.evaluate.describe import explanation
    from miras.train.config import load_config

    config = load_config(name, {"layers": max(4, name.count(",") + 1), **({} if chunk is None else {"chunk": chunk})})
    mixers = dict.fromkeys(config.mixers)
    typer.echo("\n\n".join(explanation(config.model, mixer, heads, head_dim) for mixer in mixers))


@main.command(epilog="Examples:\n\n  miras demo\n\n  miras demo --quick --out runs/smoke")
def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs and the report.")] = "runs/demo",
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of ten, for checks.")] = False,
    seed: Annotated[int, typer.Option(help="Of initialisation and order of data.")] = 0,
) -> None:
    """Train Moneta, Yaad, Memora, Gated DeltaNet and a Transformer on the same text, and write a report."""
    from miras.demo import demo as run

    run(Path(out), quick, seed)


@main.command(
    epilog="Examples:\n\n  miras bench\n\n  miras bench yaad memora --chunk 16,64 --threads 1"
    "\n\n  miras bench yaad transformer --level model --time 256,8192 --sweep none"
    "\n\n  miras bench yaad --sweep time --forward --peers sdpa\n\n  miras bench yaad moneta --decode --profile"
)
def bench(
    models: Annotated[list[str] | None, typer.Argument(help="Variants (see miras list); some unless given.")] = None,
    time: Annotated[str, typer.Option(help="Tokens of a sequence, several separated by commas.")] = "2048",
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 2,
    dim: Annotated[int | None, typer.Option(help="Size of the stream; 256, for a model 128.")] = None,
    heads: Annotated[int, typer.Option(help="Heads of each layer.")] = 4,
    chunk: Annotated[str, typer.Option(help="Tokens per chunk, several separated by commas.")] = "64",
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
    threads: Threads = None,
    out: Annotated[str, typer.Option(help="Folder for bench.json and bench.svg.")] = "runs/bench",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds, for checks.")] = False,
) -> None:
    """Speed and memory of layers or models on this machine, beside peers and the machine's own matrix product.

    All take turns in one run, so that other work on the machine falls on all alike.
    """
    times, chunks = _lengths(time, "--time"), _lengths(chunk, "--chunk")
    if sweep not in ("chunk", "time", "none"):
        raise UsageError(f"--sweep {sweep}: expected chunk, time or none.")
    # The profiler would write lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    _threads(threads)
    import torch

    from miras.bench.command import measure

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"batch": batch, "dim": dim, "heads": heads, "gates": gates, "dtype": dtype, "backward": backward}
    sizes |= {"level": level, "layers": layers, "device": where}
    options = {"rounds": rounds, "memory": memory, "profiled": profile}
    measure(models, peers, sizes, times, chunks, sweep, decode, options, Path(out), quick)


def _threads(count: int | None) -> None:
    """Settings that PyTorch's thread library reads while it is loaded, so before the first import of torch."""
    # Threads that wait by spinning make a step 50 times slower as soon as another process wants the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        import torch

        torch.set_num_threads(count)


def _lengths(text: str, option: str = "--context") -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise UsageError(f"{option} {text}: expected whole numbers separated by commas, such as 256,1024,4096.")
    return [int(word) for word in words]


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise UsageError("miras generate: got --prompt and --prompt-file, expected one of them.")
    if prompt is not None:
        return prompt
    if prompt_file is None:
        return "" if sys.stdin.isatty() else _utf8(sys.stdin.buffer.read(), "the text on standard input")
    path = Path(prompt_file)
    if not path.is_file():
        raise UsageError(f"--prompt-file {prompt_file}: there is no such file.")
    return _utf8(path.read_bytes(), f"--prompt-file {prompt_file}")


def _utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: expected UTF-8 text, and byte {error.start} is none.") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
