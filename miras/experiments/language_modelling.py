"""Table 2 of the paper: language modelling by architecture."""

from __future__ import annotations

from miras.evaluate.tasks import Positions
from miras.experiments.plan import Scale, TextExperiment, models

LINEAR = ("retnet", "mamba2", "deltanet", "gated_deltanet")


def language_modelling(scale: Scale) -> TextExperiment:
    """Moneta, Yaad and Memora beside a Transformer, linear RNNs, TTT and Titans."""
    return TextExperiment(
        "Language modelling by architecture",
        "All three are below Transformer++, RetNet, Mamba2, DeltaNet, TTT and Gated DeltaNet in perplexity (table 2), "
        "but for Memora, which by the table loses to Gated DeltaNet on WikiText at 340M and 760M.",
        models("moneta", "yaad", "memora", "titans", "mneme", "ttt_mlp", *LINEAR, "transformer"),
        scale.training,
        scale.rates,
        scale.seeds,
        "gated_deltanet",
        {"positions": Positions(length=scale.far)},
    )
