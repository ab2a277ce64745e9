"""The kernels' library: compiled for this machine when it is first wanted, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from miras.bias import huber, lp, robust
from miras.errors import MirasError
from miras.retention import base, lq

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]*"))
# Nothing of -ffast-math: NaN stays NaN, and rounding is that of the formulas.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
REAL = {torch.float32: "float", torch.float64: "double"}
# Channels of a head come in strips, and a row of them lies on the stack.
STRIP, WIDEST = 16, 256
CONSTANTS = {
    "LP_EPS": lp.EPS,
    "HUBER_EPS": huber.EPS,
    "ROBUST_EPS": robust.EPS,
    "LQ_EPS": lq.EPS,
    "SLOPE_EPS": base.EPS,
}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What values of a dtype are computed in: the state is at least float32."""
    return torch.promote_types(dtype, torch.float32)


def fits(size: int) -> bool:
    """Whether kernels are for heads of this size."""
    return size % STRIP == 0 and size <= WIDEST


def compiler() -> str | None:
    """The C++ compiler: that of the environment variable CXX, or what is found by the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def missing(dtype: torch.dtype | None = None) -> str | None:
    """Why there are no kernels that compute in a dtype, or None; without a dtype nothing is compiled to know it."""
    return _missing(dtype)


# torch.compiler.assume_constant_result, which imports all of the compiler to say this.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _missing(dtype: torch.dtype | None) -> str | None:
    if compiler() is None:
        return "a C++ compiler makes its kernels, and none was found: install g++ or clang++, or set CXX"
    try:
        _ = dtype is None or library(dtype)
    except (MirasError, OSError) as error:
        return str(error)
    return None


def folder() -> Path:
    """Where libraries are kept: where PyTorch keeps its extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "torch_extensions") / "miras"


@lru_cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The library that computes in a dtype; the first time on a machine this takes some seconds.

    Raises:
        MirasError: the compiler failed, with what it said.
        OSError: there is none, or nothing can be written to `folder`.
    """
    words = [
        str(compiler()),
        *FLAGS,
        f"-DREAL={REAL[dtype]}",
        *(f"-D{name}={value!r}" for name, value in CONSTANTS.items()),
    ]
    # What the compiler takes this machine for is a part of the name: a home folder may be shared by several.
    native = _run([*words[: 1 + len(FLAGS)], "-dM", "-E", "-x", "c++", os.devnull])
    content = "\0".join([*words, native, *(path.read_text(encoding="utf-8") for path in SOURCES)])
    path = folder() / f"scan-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            _run([*words, str(Path(__file__).with_name("scan.cpp")), "-o", str(made)])
            made.replace(path)  # whole or not at all, whoever else is compiling it
    return ctypes.CDLL(str(path))


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise MirasError(f"the C++ compiler failed.\n{' '.join(words)}\n{done.stderr.strip()}")
    return done.stdout
