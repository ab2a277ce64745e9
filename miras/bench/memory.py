"""Peak memory of one call in a process of its own, so that nothing that ran before counts.

On a GPU it is what PyTorch's allocator held at most; on a CPU the high-water mark of the resident set. Both over the
baseline after the imports, the construction and a short warm-up call, whose caches and thread stacks are so left out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from miras.bench.entries import Missing, build, chunk_of, step
from miras.bench.sizes import Sizes
from miras.errors import MirasError

WARM_TIME = 128
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HERE = "miras.bench.memory"


def high_water(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a call held at most, over what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _marked():
        # Where the system keeps no mark that can be reset, look often. (Imported here for what it brings along.)
        from miras.train.memory import PeakMemory

        with PeakMemory() as memory:
            call()
        return memory.so_far()
    _trim()
    RESET.write_text("5")
    before = psutil.Process().memory_info().rss
    call()
    return max(0, _mark() - before)


def _trim() -> None:
    """Give the system back what was freed, which a call could otherwise take without the resident set growing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of GNU's C library
    if trim is not None:
        trim(0)


def _marked() -> bool:
    """Whether the system keeps a mark that can begin anew."""
    try:
        RESET.write_text("5")
        return _mark() > 0
    except OSError:
        return False


def _mark() -> int:
    lines = [line.split() for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0][1]) if lines else 0


def peak_memory(name: str, sizes: Sizes, threads: int) -> int:
    """Bytes of one call of an entry, measured in a fresh process.

    Raises:
        MirasError: the process failed, with its last line; where the system killed it, that it was out of memory.
    """
    words = [sys.executable, "-m", HERE, json.dumps({"name": name, "threads": threads, "sizes": asdict(sizes)})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        raise MirasError("out of memory")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MirasError("out of memory" if "memory" in last.lower() else last)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def available(device: str = "cpu") -> int:
    """Bytes that are free."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    sizes = Sizes(**job["sizes"])
    module = build(job["name"], sizes)
    short = min(sizes.time, max(WARM_TIME, chunk_of(job["name"], sizes) or 0))
    step(module, sizes.with_(time=short))()
    module.zero_grad(set_to_none=True)
    print(json.dumps({"bytes": high_water(step(module, sizes), sizes.device)}))


if __name__ == "__main__":
    try:
        _main(json.loads(sys.argv[1]))
    except Missing as error:
        sys.exit(str(error))
