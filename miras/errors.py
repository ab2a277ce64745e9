"""The two ways in which a run fails on purpose. Anything else that is raised is a bug."""

import difflib
from collections.abc import Iterable


class MirasError(Exception):
    """A run that could not go on. The command line prints the message and leaves with ``exit_code``."""

    exit_code = 1


class UsageError(MirasError, ValueError):
    """What the user gave cannot be used. The message says what was got, what was expected and what to write."""

    exit_code = 2


class Diverged(MirasError):
    """A training whose loss is no longer finite."""

    exit_code = 3


def near(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``: the closest of ``choices``, or all of them.

    Returns:
        A sentence with a leading space, such as `` Did you mean 'yaad'?`` or `` Choose one of a, b, c.``.
    """
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Choose one of {', '.join(choices)}."
