"""How a report writes numbers and text."""

import math
import statistics
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import Literal, get_args

Form = Literal["digits", "fixed", "integer", "bytes", "percent"]
"""How numbers are written: three digits that count, three after the point, whole, as a size, as a share."""

FORMS = get_args(Form)


def written(value: float, form: Form) -> str:
    """Write a number."""
    if not math.isfinite(value):
        return str(value)
    if form == "bytes":
        return byte_size(value)
    return {"integer": f"{value:,.0f}", "fixed": f"{value:.3f}", "percent": f"{100 * value:.3g} %"}.get(
        form
    ) or three_digits(value)


def mean(values: Sequence[float]) -> float:
    """The mean, an integer where it is one, so that counts stay exact."""
    return statistics.mean(values) if all(map(math.isfinite, values)) else math.nan


def shown(text: str) -> str:
    """Text as HTML that says nothing but this text."""
    return escape(printable(text))


def byte_size(count: float) -> str:
    """Write a number of bytes with three digits and a decimal unit: `3.15 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count) < 1000:
            return f"{count:.0f} {unit}" if count == round(count) else f"{three_digits(count)} {unit}"
        count /= 1000
    return f"{three_digits(count)} TB"


def three_digits(value: float) -> str:
    """Write `value` with three digits that count, or all digits before the point: `0.0123`, `1.20`, `12,345`."""
    if value == 0 or abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Write a time to the second, or from two minutes on to the minute: `45 s`, `8 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def counted(count: int, noun: str) -> str:
    """Write `count` with its noun in the plural where needed: `1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: list[str]) -> str:
    """Join words as English does: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def printable(text: str) -> str:
    """Replace each character that does not print by U+FFFD.

    A model of bytes can emit anything: control characters that no HTML page may hold, lone surrogates that UTF-8
    cannot write, and marks that turn the direction of the text after them.
    """
    return "".join("\ufffd" if _unprintable(character) else character for character in text)


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Cs"} and character not in "\n\t"
