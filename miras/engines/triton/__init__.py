"""Kernels in Triton for NVIDIA GPUs, and what they can run.

Triton is optional: without it this module can be imported and refuses every rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from miras.engines.model import memory_name, reasons
from miras.rule import Gates, Rule, State

# PyTorch for CPUs has no use of it but to be tested, and importing it takes a while.
if find_spec("triton") and (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
    from miras.engines.triton import engine, parts

    INTERPRETED = bool(parts.INTERPRETED)
else:
    engine, INTERPRETED = None, False

# Head sizes that fill tiles, and the longest chunk that a program holds.
HEADS, LONGEST = (16, 32, 64, 128), 128


def run(rule: Rule, state: State, *given: Any) -> tuple[Tensor, State]:
    """See `engine.run`."""
    assert engine is not None  # else `refuses` has said so
    return engine.run(rule, state, *given)


def refuses(rule: Rule, gates: Gates | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> str | None:
    """Why the kernels cannot run a rule, or None. Without keys and values they are taken to be on a CPU."""
    del gates
    return next(_reasons(rule, tokens), None)


def _reasons(rule: Rule, tokens: tuple[Tensor, Tensor] | None) -> Iterator[str]:
    if not memory_name(rule):
        yield f"its kernels are for SwiGLU and for an MLP of 2 layers without fast biases, not {rule.memory}"
    yield from reasons(rule)
    if rule.chunk > LONGEST:
        yield f"at chunks above {LONGEST} plain matrix products are as good"
    if tokens is None or not (tokens[1].is_cuda or INTERPRETED):
        yield "its kernels run on CUDA, and the tensors are on a CPU"
        return
    if engine is None:
        yield "Triton is not installed: pip install 'miras[kernels]'"
    k, v = tokens
    if not k.shape[-1] == v.shape[-1] or v.shape[-1] not in HEADS:
        yield f"its kernels are for heads of {', '.join(map(str, HEADS))}, not of {k.shape[-1]} and {v.shape[-1]}"
    if v.is_cuda and v.dtype == torch.float64:
        yield "its kernels compute in float32"
