"""Recall inside a sequence: of many pairs at once, at equal bytes of state, and of pairs of which some are wrong."""

from __future__ import annotations

from dataclasses import replace

from miras import bias
from miras.experiments.plan import Scale, TaskExperiment, model, models
from miras.memory import MLP
from miras.rule import Rule
from miras.variants import memora, moneta, yaad

DEEP = {"moneta": moneta, "yaad": yaad, "memora": memora}
LINEAR = ("retnet", "mamba2", "deltanet", "gated_deltanet")


def recall(scale: Scale) -> TaskExperiment:
    """Multi-query recall at equal parameters and bytes of state."""
    task, training, rates = scale.recall
    # Two matrices of half the width in each of two heads hold what the one matrix of a linear memory holds. In chunks
    # there would be a second copy: the memory as it was when the chunk began.
    return TaskExperiment(
        "Multi-query associative recall",
        "Attention solves it, linear models are limited by the size of their state (zoology, arXiv 2312.04927).",
        {
            **{name: model(_square(rule(chunk=1)), heads=2) for name, rule in DEEP.items()},
            **{name: model(name, heads=1) for name in LINEAR},
        },
        "mqar",
        task,
        training,
        rates,
        scale.seeds,
    )


def robustness(scale: Scale) -> TaskExperiment:
    """Yaad beside its twin with l_2, where a share of the pairs is wrong; trained on clean pairs."""
    task, training, rates = scale.noisy
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
        task,
        training,
        rates,
        scale.seeds,
    )


def _square(rule: Rule) -> Rule:
    """The rule with a memory of square matrices."""
    assert isinstance(rule.memory, MLP)
    return replace(rule, memory=replace(rule.memory, expansion=1))
