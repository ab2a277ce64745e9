"""Kernels compiled ahead of time for an H200, which needs no GPU but a process that does not interpret them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

READS = ("hidden", "over_hidden", "over_tokens")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ahead_of_time.py"


def table(*arguments):
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_kernels_fit_an_h200():
    kernels = [row.split(" | ")[3] for row in table("--quick")]
    by_chunk = ["learn", "read_forward", *(f"read_back_{part}" for part in READS), "learn_back"]
    assert kernels == [*by_chunk, "learn", "read_each_forward", "read_each_backward", "learn_back", *by_chunk]


@pytest.mark.slow
def test_every_variant_fits_an_h200():
    assert len(table()) > 260
