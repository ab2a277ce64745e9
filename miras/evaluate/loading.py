"""Opening what training left on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from miras.errors import UsageError
from miras.hf import MirasForCausalLM
from miras.train.checkpoints import newest
from miras.train.progress import no_bars


def load_model(path: str) -> tuple[MirasForCausalLM, PreTrainedTokenizerFast]:
    """A trained model, ready to be evaluated, on the GPU if there is one, and its tokenizer.

    Args:
        path: a run folder (its model, or the newest complete checkpoint where it is not finished), or a folder that
            `save_pretrained` wrote.

    Raises:
        UsageError: there is no model of this library there, or its files are damaged.
    """
    folder = model_folder(Path(path))
    no_bars()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{folder}: expected a model that `miras train` wrote, and it cannot be loaded "
            f"({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(model, MirasForCausalLM):
        raise UsageError(f"{folder}: expected a model of the type miras, got {type(model).__name__}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer  # type: ignore[arg-type]


def model_folder(path: Path) -> Path:
    """Where in `path` the model is, see `load_model`.

    Raises:
        UsageError: nowhere.
    """
    last = newest(path / "checkpoints")
    for folder in (path / "model", path, *([last] if last else [])):
        if (folder / "config.json").is_file():
            return folder
    got = "a folder without them" if path.is_dir() else "no such folder"
    raise UsageError(
        f"{path}: expected a run folder of `miras train` or a folder with config.json and model.safetensors, got {got}."
        f" To make one write for example: miras train yaad --out {path}"
    )
