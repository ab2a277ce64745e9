"""Recall inside a sequence: of many pairs at once, at equal bytes of state, and from what is wrong in part."""

from __future__ import annotations

from dataclasses import replace

from miras import bias, retention
from miras.experiments.plan import LINEAR, Scale, TaskExperiment, model, models
from miras.inputs import Inputs
from miras.memory import MLP
from miras.rule import Rule
from miras.variants import deltanet, gated_deltanet, memora, mneme, moneta, yaad


def recall(scale: Scale) -> TaskExperiment:
    """Multi-query recall at equal parameters and bytes of state, which linear memories have in one head."""
    task, training, rates = scale.recall
    rules = {"moneta": moneta(), "yaad": yaad(), "yaad, chunk 4": yaad(chunk=4), "memora": memora(), "mneme": mneme()}
    # Without chunks there is no second copy of the weights, so that the same bytes are fewer and wider heads.
    wide = training.heads // 2
    tokenwise = {
        "mneme, no chunks": mneme(chunk=1),
        "mneme, no chunks or retention": replace(mneme(chunk=1), retention=retention.NoRetention(to="initial")),
    }
    return TaskExperiment(
        "Multi-query associative recall",
        "Attention solves it, linear models are limited by the size of their state (zoology, arXiv 2312.04927).",
        {
            **{name: model(_as_large_as_a_matrix(rule, training.dim, training.heads)) for name, rule in rules.items()},
            **{n: model(_as_large_as_a_matrix(rule, training.dim, wide), heads=wide) for n, rule in tokenwise.items()},
            **{name: model(name, heads=1) for name in (*LINEAR, "homing_deltanet")},
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
        **models("moneta", "memora", "mneme", "gated_deltanet"),
        "mneme with l_2": model(replace(mneme(), bias=bias.L2())),
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


def regression(scale: Scale) -> TaskExperiment:
    """Yaad and a matrix, each beside a twin with another loss, where some readings are extreme; trained on clean ones.

    "Plain values" are as large as what was read; those of the presets are normed in each head.
    """
    task, training, rates = scale.readings
    rules = {"yaad": yaad(), "yaad with l_2": replace(yaad(), bias=bias.L2()), "moneta": moneta(), "memora": memora()}
    plain = {f"{name}, plain values": replace(rule, inputs=Inputs()) for name, rule in rules.items()}
    rules |= {"gated_deltanet": gated_deltanet()}
    rules |= {"gated_deltanet with Huber": replace(gated_deltanet(), bias=bias.Huber())}
    return TaskExperiment(
        "Regression from corrupted readings",
        "Huber's loss makes Yaad robust to extreme events (section 5.3).",
        {name: model(rule) for name, rule in {**rules, **plain}.items()},
        "regression",
        task,
        training,
        rates,
        scale.seeds,
    )


def _as_large_as_a_matrix(rule: Rule, dim: int, heads: int) -> Rule:
    """The rule with the expansion at which its heads hold the bytes of one matrix as wide as the stream."""
    assert isinstance(rule.memory, MLP)
    one, head = replace(rule.memory, expansion=1), dim // heads
    least = replace(rule, memory=one).state_bytes(heads, head, head, 1)
    return replace(rule, memory=replace(one, expansion=deltanet().state_bytes(1, dim, dim, 1) // least))
