"""Training runs that take a second."""

import random
from pathlib import Path

from miras.train import TrainConfig

WORDS = "the memory learns while it reads and forgets what it does not need any more".split()


def write_text(folder: Path) -> str:
    """A small file of text with something to learn in it."""
    draw = random.Random(0)
    path = folder / "words.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(4000)))
    return str(path)


def small(text: str, folder: Path, **changes) -> TrainConfig:
    shape = {"dim": 16, "layers": 2, "heads": 2, "context": 32, "batch": 128, "steps": 6, "eval_windows": 16}
    where = {"data": text, "out": str(folder / "run"), "cache": str(folder / "cache")}
    return TrainConfig(**{"model": "yaad", **where, **shape, **changes})
