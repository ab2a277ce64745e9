"""What is measured: the sizes of one case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from miras.errors import UsageError, near

GATES = ("head", "channel")
DTYPES = ("float32", "bfloat16")
LEVELS = ("layer", "model")
DEVICES = ("cpu", "cuda")
LAYER_DIM, MODEL_DIM = 256, 128
AUTO: Any = None


@dataclass(frozen=True)
class Sizes:
    """One case. As plain values, so that it goes into JSON and to another process.

    Args:
        batch: sequences side by side.
        time: tokens of each.
        dim: size of the stream; None: 256 for a layer, 128 (`miras train --size tiny`) for a model.
        heads: heads of each layer.
        chunk: tokens per chunk, for rules that have chunks; None: each rule's own.
        gates: "head" or "channel".
        dtype: "float32", or "bfloat16": parameters in float32 under autocast, as training in mixed precision is.
        backward: forward and backward, or the forward pass alone without a graph.
        level: "layer", a `MirasLayer`; "model", tokens to loss through a stack.
        layers: layers of a model.
        vocab: tokens that a model knows.
        device: "cpu" or "cuda".
        compile: compile layers; the first call then takes minutes.

    Raises:
        UsageError: a size or a word that cannot be.
    """

    batch: int = 2
    time: int = 2048
    dim: int = AUTO
    heads: int = 4
    chunk: int | None = None
    gates: str = "head"
    dtype: str = "float32"
    backward: bool = True
    level: str = "layer"
    layers: int = 4
    vocab: int = 256
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        known = {"gates": GATES, "dtype": DTYPES, "level": LEVELS, "device": DEVICES}
        for name, words in known.items():
            word = getattr(self, name)
            if word not in words:
                raise UsageError(f"--{name} {word}: there is no such {name}.{near(word, words)}")
        if self.dim is None:
            object.__setattr__(self, "dim", LAYER_DIM if self.level == "layer" else MODEL_DIM)
        for name in ("batch", "time", "dim", "heads", "chunk", "layers", "vocab"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} {value}: expected at least 1.")
        if self.dim % self.heads:
            raise UsageError(f"--dim {self.dim} --heads {self.heads}: the first must be a multiple of the second.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch finds no GPU. Write --device cpu.")

    @property
    def head_dim(self) -> int:
        """Size of each head."""
        return self.dim // self.heads

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * self.time

    def with_(self, **changes: Any) -> Sizes:
        """The same case but for some sizes."""
        return replace(self, **changes)
