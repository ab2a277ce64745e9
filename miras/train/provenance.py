"""Where numbers come from: libraries, processor and commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import transformers

import miras


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide about numbers."""
    return {
        "miras": miras.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu() -> str:
    """The processor's name and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of the source tree that runs, with -dirty after changes; None outside a repository."""
    if shutil.which("git") is None:
        return None
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None
