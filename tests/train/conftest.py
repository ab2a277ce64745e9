import random
from functools import partial

import pytest

from miras.train import TrainConfig

WORDS = "the memory learns while it reads and forgets what it does not need any more".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small file of text with something to learn in it."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(4000)))
    return str(path)


def small(text, folder, **changes) -> TrainConfig:
    """The configuration of a run that takes a second."""
    shape = {"dim": 16, "layers": 2, "heads": 2, "context": 32, "batch": 128, "steps": 6}
    where = {"data": text, "out": str(folder / "run"), "cache": str(folder / "cache")}
    return TrainConfig(**{"model": "yaad", **where, **shape, **changes})


@pytest.fixture
def config(text, tmp_path):
    return partial(small, text, tmp_path)
