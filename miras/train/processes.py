"""The processes of one run, as torchrun starts them: each has a part of every batch, the first one writes."""

from __future__ import annotations

import os


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first."""
    return os.environ.get("RANK", "0") == "0"
