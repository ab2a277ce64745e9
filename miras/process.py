"""Settings of a process that come before its first tensors."""

from __future__ import annotations

import ctypes
import os
import sys

# Names of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def set_threads(count: int | None) -> None:
    """Have waiting threads sleep and freed memory kept; call it before the first import of torch.

    Args:
        count: threads of PyTorch; None: as many as there are cores.
    """
    keep_memory()
    # Threads that wait by spinning make a step 50 times slower as soon as another process wants the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        import torch

        torch.set_num_threads(count)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next tensors, which it else gives back and takes anew, empty.

    Tensors beyond 32 MB are concerned: it is a third of the time of a long sequence (docs/performance.md). Other C
    libraries than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)
