"""Kernels in C++ for CPUs, and what they can run.

A C++ compiler makes them when they are first wanted; without one every rule is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from miras.engines.model import alone, link_name, memory_name, reasons
from miras.engines.native import build, engine, linear
from miras.layout import Layout
from miras.memory import Linear
from miras.rule import Gates, Rule, State


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same function as `recurrence`; arguments as of `chunk.run`."""
    kernels = linear if isinstance(rule.memory, Linear) else engine
    return kernels.run(rule, state, q, k, v, gates, where)


def refuses(rule: Rule, gates: Gates | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> str | None:
    """Why the kernels cannot run a rule, or None. Without keys and values they are taken to be on a CPU."""
    return next(_reasons(rule, gates, tokens), None)


def _reasons(rule: Rule, gates: Gates | None, tokens: tuple[Tensor, Tensor] | None) -> Iterator[str]:
    if isinstance(rule.memory, Linear):
        yield from linear.reasons(rule, gates)
    else:
        yield from _deep(rule, gates)
    if reason := build.missing():
        yield reason
    if tokens is None:
        return
    k, v = tokens
    if v.device.type != "cpu":
        yield "its kernels run on a CPU"
    sizes = {k.shape[-1], v.shape[-1]}
    if not all(map(build.fits, sizes)) or (len(sizes) > 1 and not isinstance(rule.memory, Linear)):
        wanted = f"a multiple of {build.STRIP} up to {build.WIDEST}"
        yield f"its kernels are for heads of {wanted}, not of {k.shape[-1]} and {v.shape[-1]}"
    if reason := build.missing(build.computed_in(v.dtype)):
        yield reason


def _deep(rule: Rule, gates: Gates | None) -> Iterator[str]:
    if memory_name(rule) != "mlp":
        yield f"its kernels are for Linear and for an MLP of 2 layers without fast biases, not {rule.memory}"
    yield from reasons(rule)
    if rule.link_at == "token" and link_name(rule) != "identity" and not alone(rule):
        yield "its kernels have links at chunks only, link_at='chunk', or in chunks of one token, read after it"
    if link_name(rule) == "logistic":
        yield f"its kernels do not know the link of {rule.retention}"
    per_channel = gates and any(gates[gate.name].shape[-1] > 1 for gate in rule.retention.gates + rule.algorithm.gates)
    if per_channel and (rule.algorithm.slots or rule.read_at == "before"):
        yield "its kernels have gates per channel for gradient descent only, read after it"
