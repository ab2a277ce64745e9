"""What a finished run says of itself: `summary.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miras.train.files import write_json


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        name: the model, as it was given.
        mixer: what mixes along the sequence, the distinct ones in order.
        parameters: of the whole model; a shared one counts once.
        steps: optimizer steps.
        tokens: trained on, repetitions included.
        val_loss: nats per token over the last validation, which is larger than those on the way.
        val_bits_per_byte: the same per byte of text, comparable between tokenizers.
        tokens_per_second: of training alone, the first steps of the process left out.
        train_seconds: of training alone.
        peak_memory_bytes: on a GPU, what PyTorch held at most; on a CPU, how much the process grew at most since before
            the model was built.
        threads: of PyTorch.
        data: name, hash, train_tokens, validation_tokens, bytes_per_token, tokenizer.
        versions: of Python and the libraries.
        seed: of initialisation and order of data.
        command: does the same again.
    """

    name: str
    mixer: str
    parameters: int
    steps: int
    tokens: int
    val_loss: float
    val_bits_per_byte: float
    tokens_per_second: float
    train_seconds: float
    peak_memory_bytes: int
    threads: int
    data: dict[str, Any]
    versions: dict[str, str]
    seed: int
    command: str

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))

    @staticmethod
    def read(path: Path) -> Summary:
        """Read what `write` wrote."""
        return Summary(**json.loads(path.read_text()))
