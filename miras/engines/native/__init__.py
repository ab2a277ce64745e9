"""Kernels in C++ for CPUs, and what they can run.

A C++ compiler makes them when they are first wanted; without one every rule is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from miras.engines.model import link_name, memory_name, reasons
from miras.engines.native import build
from miras.engines.native.engine import run as run
from miras.rule import Gates, Rule

# Channels of a head come in strips, and a row of them lies on the stack.
STRIP, WIDEST = 16, 256


def refuses(rule: Rule, gates: Gates | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> str | None:
    """Why the kernels cannot run a rule, or None. Without keys and values they are taken to be on a CPU."""
    return next(_reasons(rule, gates, tokens), None)


def _reasons(rule: Rule, gates: Gates | None, tokens: tuple[Tensor, Tensor] | None) -> Iterator[str]:
    if memory_name(rule) != "mlp":
        yield f"its kernels are for an MLP of 2 layers without fast biases, not {rule.memory}"
    yield from reasons(rule)
    if rule.link_at == "token" and link_name(rule) != "identity":
        yield "its kernels have links at chunks only, of two tokens at least"
    per_channel = gates and any(gates[gate.name].shape[-1] > 1 for gate in rule.retention.gates + rule.algorithm.gates)
    if per_channel and (rule.algorithm.slots or rule.read_at == "before"):
        yield "its kernels have gates per channel for gradient descent only, read after it"
    if reason := build.missing():
        yield reason
    if tokens is None:
        return
    k, v = tokens
    if v.device.type != "cpu":
        yield "its kernels run on a CPU"
    if (d := v.shape[-1]) != k.shape[-1] or d % STRIP or d > WIDEST:
        yield f"its kernels are for heads of a multiple of {STRIP} up to {WIDEST}, not of {k.shape[-1]} and {d}"
    if reason := build.missing(build.computed_in(v.dtype)):
        yield reason
