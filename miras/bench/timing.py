"""Time by taking turns, and what the machine itself can do at the same moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from miras.bench.sizes import Sizes

Call = Callable[[], object]

CEILING = "matrix product"
STREAM = "copy"
# Products of this size run at full speed and still take a small part of a second on one core.
PRODUCT, GPU_PRODUCT = 1024, 8192
# Far beyond any cache.
STREAMED = 1 << 26


@dataclass
class Timing:
    """Seconds of one call.

    Attributes:
        first: of the very first one, which allocates, chooses kernels and compiles.
        seconds: of the later ones, in order.
    """

    first: float = 0.0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """What is reported."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the fastest and the slowest, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def alternate(
    calls: Mapping[str, Call],
    rounds: int,
    warm: int = 1,
    device: str = "cpu",
    told: Callable[[str], None] = lambda name: None,
    between: Mapping[str, Call] | None = None,
) -> dict[str, Timing]:
    """Time calls in turn, A B C A B C ...: whatever else the machine does then falls on all of them alike.

    Args:
        calls: what to time, by name.
        rounds: how often each is timed.
        warm: rounds before that, of which only the first call is kept, as `first`.
        device: where they run; on a GPU each call is waited for.
        told: called with the name before each call.
        between: short calls to time after each of the others, so that they see the same machine on average.

    Returns:
        A `Timing` for each name.
    """
    between = between or {}
    timings = {name: Timing() for name in (*calls, *between)}
    for turn in range(-warm, rounds):
        for name, call in calls.items():
            told(name)
            for each, made in ((name, call), *between.items()):
                took = _timed(made, device)
                if turn == -warm and not timings[each].first:
                    timings[each].first = took
                if turn >= 0:
                    timings[each].seconds.append(took)
    return timings


def _timed(call: Call, device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Let a GPU finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine_calls(sizes: Sizes) -> dict[str, Call]:
    """The machine's own speed as two short calls: a square matrix product and a copy of memory."""
    side = GPU_PRODUCT if sizes.device == "cuda" else PRODUCT
    dtype = getattr(torch, sizes.dtype)
    a, b = (torch.randn(side, side, dtype=dtype, device=sizes.device) for _ in range(2))
    source = torch.zeros(STREAMED // 4, device=sizes.device)
    target = torch.empty_like(source)
    return {CEILING: lambda: a @ b, STREAM: lambda: target.copy_(source)}


def machine_speed(timings: Mapping[str, Timing], sizes: Sizes) -> dict[str, float]:
    """What the calls of `machine_calls` took, as FLOP/s and as bytes per second (read and written)."""
    side = GPU_PRODUCT if sizes.device == "cuda" else PRODUCT
    return {
        "flops_per_second": 2 * side**3 / timings[CEILING].median,
        "bytes_per_second": 2 * STREAMED / timings[STREAM].median,
    }


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """So many threads of PyTorch inside, as many as before outside.

    Yields:
        The number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
