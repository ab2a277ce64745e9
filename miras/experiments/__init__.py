"""The paper's experiments as functions of a scale, and what nobody has tested. `miras experiment` does them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from miras.errors import UsageError, near
from miras.experiments.ablations import exponents, parts, space
from miras.experiments.context import context
from miras.experiments.language_modelling import language_modelling
from miras.experiments.needle import needle
from miras.experiments.plan import SCALES as SCALES
from miras.experiments.plan import Experiment as Experiment
from miras.experiments.plan import Scale as Scale
from miras.experiments.recall import recall, robustness

EXPERIMENTS: Mapping[str, Callable[[Scale], Experiment]] = {
    f.__name__: f for f in (language_modelling, needle, recall, robustness, parts, exponents, space, context)
}


def experiment(name: str, scale: str, seeds: int | None = None) -> Experiment:
    """An experiment at a scale; seeds: None as many as the scale has.

    Raises:
        UsageError: an unknown name or scale, said with the near ones.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"no experiment is called {name!r}." + near(name, EXPERIMENTS))
    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: there is no such scale." + near(scale, SCALES))
    plan = EXPERIMENTS[name](SCALES[scale])
    return plan if seeds is None else replace(plan, seeds=seeds)
