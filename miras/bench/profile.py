"""Where the time of a call goes, by kind of operation."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.autograd.profiler import profile

KINDS: tuple[str, ...] = (
    "kernels",
    "matrix products",
    "element-wise and reductions",
    "copies",
    "between operations",
)

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution")
_COPIES = (
    "copy",
    "clone",
    "cat",
    "stack",
    "fill",
    "zero",
    "index",
    "gather",
    "scatter",
    "empty",
    "new_",
    "constant_pad",
)
_VIEWS = ("view", "reshape", "as_strided", "expand", "permute", "t", "transpose", "select", "slice", "split", "narrow")
_VIEWS += (
    "unbind",
    "unsqueeze",
    "squeeze",
    "unflatten",
    "flatten",
    "detach",
    "alias",
    "to",
    "lift",
    "resolve",
    "chunk",
)


def shares(call: Callable[[], object]) -> dict[str, float]:
    """The time of one call on a CPU by kind of operation, as parts of 1.

    "kernels" are this library's own operators, "copies" are operations that only move or set memory, "between
    operations" is what no operation accounts for: Python, autograd, dispatch and views. The profiler itself adds to the
    last.

    Args:
        call: what to look at; it is called once before, to warm up.
    """
    call()
    # Without kineto, which writes lines of its own to the terminal.
    with profile(use_kineto=False) as seen:
        start = time.perf_counter()
        call()
        whole = 1e6 * (time.perf_counter() - start)
    found = dict.fromkeys(KINDS, 0.0)
    assert seen is not None
    for event in seen.key_averages():
        if event.key.startswith("aten::") or "miras" in event.key:
            found[kind(event.key)] += event.self_cpu_time_total
    found[KINDS[-1]] += max(0.0, whole - sum(found.values()))
    total = sum(found.values())
    return {name: taken / total for name, taken in found.items()}


def kind(name: str) -> str:
    """The kind of an operator, such as "aten::bmm"."""
    if "miras" in name:  # the operator itself, or what autograd calls it
        return KINDS[0]
    plain = name.removeprefix("aten::").strip("_")
    if plain in _PRODUCTS or "attention" in plain or "solve_triangular" in plain or "triangular_solve" in plain:
        return KINDS[1]
    # The backward of a view fills a whole tensor.
    if plain.startswith(_COPIES) or plain.endswith(("slice_backward", "select_backward", "split_backward")):
        return KINDS[3]
    return KINDS[4] if plain in _VIEWS or plain.startswith(("split", "view", "unsafe_view")) else KINDS[2]
