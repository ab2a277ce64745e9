"""One thread, one seed, no network, float32 as the default dtype: in every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("miras", deadline=None, derandomize=True, max_examples=20, database=None)
settings.load_profile("miras")


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the tests")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--shard").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--shard {part}/{parts}: the part must be one of 1 to {parts}")
    kept = items[part - 1 :: parts]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % parts != part - 1])
        items[:] = kept


@pytest.fixture(autouse=True)
def _deterministic():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left is torch.float32, f"the test leaves {left} as the default dtype"
