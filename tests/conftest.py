"""One thread, one seed, no network, float32 as the default dtype: in every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("miras", deadline=None, derandomize=True, max_examples=20, database=None)
settings.load_profile("miras")


@pytest.fixture(autouse=True)
def _deterministic():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left is torch.float32, f"the test leaves {left} as the default dtype"
