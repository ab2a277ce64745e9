"""`miras generate`: what a trained model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import Threads, main
from miras.errors import UsageError
from miras.process import set_threads


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
    set_threads(threads)
    from miras.evaluate import generate as run
    from miras.evaluate import load_model

    loaded, tokenizer = load_model(model)
    _write(text)
    run(loaded, tokenizer, text, tokens, _write, temperature, top_k, seed)
    _write("\n")


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
