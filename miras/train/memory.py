"""The most memory that a stretch of the program held."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

INTERVAL = 0.01
"""Seconds between looks. A step holds its activations much longer."""


class PeakMemory:
    """A context that watches: on a GPU PyTorch's own count, on a CPU how far the resident set of the process grows."""

    def __init__(self) -> None:
        self._most = 0
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Begin."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def so_far(self) -> int:
        """Bytes, at most, since the beginning."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._most

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._most = max(self._most, self._process.memory_info().rss - self._before)
