"""Table 3 of the paper: a needle in a haystack, of language models and of models that learn nothing else."""

from __future__ import annotations

from dataclasses import replace

from miras.evaluate.tasks import TASKS, Needle
from miras.experiments.plan import Scale, TaskExperiment, TextExperiment, models

CLAIM = "92 to 93 % on average up to 8K tokens, Gated DeltaNet 76 %, TTT 66 %, DeltaNet 58 %, Mamba2 52 % (table 3)."


def needle(scale: Scale) -> TextExperiment:
    """RULER's three single needles, at and beyond the training length."""
    tasks = {}
    for name in ("passkey", "needle_number", "needle_uuid"):
        task = TASKS[name]
        assert isinstance(task, Needle)
        tasks[name] = replace(task, lengths=scale.lengths)
    return TextExperiment(
        "A needle in a haystack",
        CLAIM,
        models("moneta", "yaad", "memora", "ttt_mlp", "mamba2", "deltanet", "gated_deltanet", "transformer"),
        scale.training,
        scale.rates,
        scale.seeds,
        "gated_deltanet",
        tasks,
    )


def haystack(scale: Scale) -> TaskExperiment:
    """The same needles by models that learn to look for them at one length and are asked at longer ones."""
    task, training, rates = scale.haystack
    names = ("moneta", "yaad", "memora", "mamba2", "deltanet", "gated_deltanet", "homing_deltanet", "transformer")
    return TaskExperiment(
        "A needle in a haystack, learned", CLAIM, models(*names), "haystack", task, training, rates, scale.seeds
    )
