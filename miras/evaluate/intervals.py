"""Means over seeds and how sure one may be of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them a series is exact to three digits.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.95996


def interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of independent measurements, by Student's t; 0 for less than two."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0
    return student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
