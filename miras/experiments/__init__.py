"""The paper's experiments as functions of a scale, and what nobody has tested. `miras experiment` does them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from miras.errors import UsageError, near
from miras.experiments.ablations import chunk, eps, exponents, home, losses, parts, space, threshold
from miras.experiments.context import context
from miras.experiments.language_modelling import language_modelling
from miras.experiments.needle import haystack, needle
from miras.experiments.plan import SCALES as SCALES
from miras.experiments.plan import Experiment as Experiment
from miras.experiments.plan import Scale as Scale
from miras.experiments.plan import TextExperiment
from miras.experiments.recall import recall, regression, robustness

EXPERIMENTS: Mapping[str, Callable[[Scale], Experiment]] = {
    f.__name__: f
    for f in (
        language_modelling,
        needle,
        haystack,
        recall,
        robustness,
        regression,
        parts,
        home,
        losses,
        exponents,
        threshold,
        chunk,
        eps,
        space,
        context,
    )
}


def experiment(name: str, scale: str, seeds: int | None = None, only: Sequence[str] = ()) -> Experiment:
    """An experiment at a scale.

    Args:
        name: of the experiment.
        scale: of the experiment.
        seeds: how many; None: as many as the scale has.
        only: names of models to keep, beside the one that the others are compared with; none: all.

    Raises:
        UsageError: an unknown name, scale or model, said with the near ones.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"no experiment is called {name!r}." + near(name, EXPERIMENTS))
    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: there is no such scale." + near(scale, SCALES))
    plan = EXPERIMENTS[name](SCALES[scale])
    for model in only:
        if model not in plan.models:
            raise UsageError(f"--only {model!r}: {name} has no such model." + near(model, plan.models))
    if only:
        kept = {*only, plan.baseline} if isinstance(plan, TextExperiment) else {*only}
        plan = replace(plan, models={n: model for n, model in plan.models.items() if n in kept})
    return plan if seeds is None else replace(plan, seeds=seeds)
