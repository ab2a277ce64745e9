"""Recall inside a sequence: of many pairs at once, at equal bytes of state, and of pairs of which some are wrong."""

from __future__ import annotations

from dataclasses import replace

from miras import bias
from miras.experiments.plan import Model, Scale, TaskExperiment, model, models
from miras.variants import variant, yaad

DEEP = ("moneta", "yaad", "memora")
LINEAR = ("retnet", "mamba2", "deltanet", "gated_deltanet")


def recall(scale: Scale) -> TaskExperiment:
    """Multi-query recall; linear memories get fewer and wider heads until their state is no smaller."""
    training = scale.scratch
    return TaskExperiment(
        "Multi-query associative recall",
        "Attention solves it, linear models are limited by the size of their state (zoology, arXiv 2312.04927).",
        {**models(*DEEP), **{name: _with_state(name, training.dim, training.heads) for name in LINEAR}},
        "mqar",
        scale.recall,
        training,
        scale.scratch_rates,
        scale.seeds,
        equal=False,
    )


def robustness(scale: Scale) -> TaskExperiment:
    """Yaad beside its twin with l_2, where a share of the pairs is wrong; trained on clean pairs."""
    twins = {
        "yaad": model("yaad"),
        "yaad with l_2": model(replace(yaad(), bias=bias.L2())),
        "yaad with l_2, clipped": model(replace(yaad(), bias=bias.L2(clip=True))),
        "yaad with l_1": model(replace(yaad(), bias=bias.L1(form="paper"))),
        **models("moneta", "memora", "gated_deltanet"),
    }
    return TaskExperiment(
        "Recall from corrupted pairs",
        "Huber's loss makes Yaad robust to extreme events (section 5.3).",
        twins,
        "noisy_recall",
        scale.noisy,
        scale.scratch,
        scale.scratch_rates,
        scale.seeds,
    )


def _with_state(name: str, dim: int, heads: int) -> Model:
    """A linear model as wide as it must be for one head a layer to hold the bytes that Yaad's heads hold."""
    wanted = yaad().state_bytes(heads, dim // heads, dim // heads, 1)
    width = dim
    while variant(name).state_bytes(1, width, width, 1) < wanted:
        width += 8
    return model(name, dim=width, heads=1)
