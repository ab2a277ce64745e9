"""Decoding: milliseconds for one more token after contexts of several lengths.

A memory of fixed size is read at a context by setting the position of its state, for nothing else in it grows;
attention gets a cache of that length, as far as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from miras.attention import CacheState
from miras.bench.entries import autocast, build
from miras.bench.memory import available
from miras.bench.sizes import Sizes
from miras.bench.timing import alternate
from miras.layer import LayerState, layers_of

CONTEXTS = (1024, 1_048_576)
# Tokens that are really read first; a memory's state is then like any later one.
READ = 64
# Part of the free memory that the caches of one case may take.
SHARE = 8


@torch.no_grad()
def decode(
    names: list[str], sizes: Sizes, contexts: tuple[int, ...], rounds: int, told: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time one token of each model at each context, all of them in turn.

    Args:
        names: variants.
        sizes: the level, dim, heads, gates, chunk, dtype; one sequence whatever the batch is.
        contexts: tokens read before.
        rounds: how often each is timed.
        told: called with a name before each call.

    Returns:
        For each name and context {"name", "context", "ms", "spread", "state_bytes", "note"}; ms is None where the note
        says why.
    """
    sizes = sizes.with_(batch=1, backward=False)
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        module, first = build(name, sizes), _input(sizes, READ)
        module.eval()
        one = _input(sizes, 1)
        with autocast(sizes):
            after = module(first)[1]
        for context in contexts:
            row = {"name": name, "context": context, "ms": None, "spread": None, "state_bytes": None, "note": ""}
            rows.append(row)
            need = sum(state_bytes(module, context))
            if need > available(sizes.device) // SHARE:
                row["note"] = f"a cache of {need / 1e9:.1f} GB"
                continue
            state = at_context(after, context)
            row["state_bytes"] = sum(s.nbytes for s in state) if isinstance(state, list) else state.nbytes
            calls[f"{name} at {context:,}"] = _call(module, one, state, sizes)
    for key, timing in alternate(calls, rounds, 2, sizes.device, told).items():
        row = next(r for r in rows if key == f"{r['name']} at {r['context']:,}")
        row |= {"ms": 1000 * timing.median, "spread": timing.spread}
    return rows


def at_context(state: Any, context: int) -> Any:
    """A state, or a list of them, as it would be after so many tokens."""
    if isinstance(state, list):
        return [at_context(s, context) for s in state]
    mixer = state.mixer
    if isinstance(mixer, CacheState):
        k, v = (x.new_zeros(x.shape[0], context, *x.shape[2:]) for x in (mixer.k, mixer.v))
        mixer = CacheState(k, v, torch.full_like(mixer.position, context))
    return replace(state, mixer=mixer, position=torch.full_like(state.position, context))


def state_bytes(module: nn.Module, context: int) -> list[int]:
    """Bytes of the state of each layer by formula."""
    return [m.rule.state_bytes(m.heads, m.head_dim, m.head_dim, context) for m in layers_of(module)]


def _input(sizes: Sizes, time: int) -> Tensor:
    torch.manual_seed(0)
    if sizes.level == "layer":
        return torch.randn(1, time, sizes.dim, device=sizes.device)
    return torch.randint(sizes.vocab, (1, time), device=sizes.device)


def _call(module: nn.Module, one: Tensor, state: LayerState | list[LayerState], sizes: Sizes) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad(), autocast(sizes):
            return module(one, state)

    return call
