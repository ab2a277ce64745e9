"""Table 2 of the paper: language modelling by architecture."""

from __future__ import annotations

from miras.evaluate.tasks import Positions
from miras.experiments.plan import LINEAR, Scale, TextExperiment, models


def language_modelling(scale: Scale) -> TextExperiment:
    """Moneta, Yaad and Memora beside a Transformer, linear RNNs, TTT, Titans and two models of our own."""
    return TextExperiment(
        "Language modelling by architecture",
        "All three are below Transformer++, RetNet, Mamba2, DeltaNet, TTT and Gated DeltaNet in perplexity (table 2), "
        "but for Memora, which by the table loses to Gated DeltaNet on WikiText at 340M and 760M.",
        models("moneta", "yaad", "memora", "titans", "mneme", "ttt_mlp", *LINEAR, "homing_deltanet", "transformer"),
        scale.training,
        scale.rates,
        scale.seeds,
        "gated_deltanet",
        {"positions": Positions(length=scale.far)},
    )
