"""How a report writes numbers and generated text."""

import unicodedata


def byte_size(count: float) -> str:
    """Write a number of bytes with three digits and a decimal unit: `3.15 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count) < 1000:
            return f"{count:.0f} {unit}" if count == round(count) else f"{three_digits(count)} {unit}"
        count /= 1000
    return f"{three_digits(count)} TB"


def three_digits(value: float) -> str:
    """Write `value` with three digits that count, or all digits before the point: `0.0123`, `1.20`, `12,345`."""
    if abs(value) >= 999.5:
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
