"""Figure 3 of the paper: what a longer training context brings, at equal tokens."""

from __future__ import annotations

from miras.evaluate.tasks import Positions
from miras.experiments.plan import Scale, TextExperiment, model


def context(scale: Scale) -> TextExperiment:
    """The three, Gated DeltaNet and the Transformer at several training lengths; the loss far beyond them."""
    names = ("moneta", "yaad", "memora", "gated_deltanet", "transformer")
    lengths = scale.contexts
    called: dict[str, dict[float, str]] = {
        name: {length: f"{name}, {length:,}" for length in lengths} for name in names
    }
    return TextExperiment(
        "Training context",
        "Perplexity falls with the training context from 2K to 32K, and all three stay below the baselines (figure 3).",
        {called[name][length]: model(name, context=length) for length in lengths for name in names},
        scale.training,
        (scale.rate,),
        scale.seeds,
        called["gated_deltanet"][lengths[0]],
        {"positions": Positions(length=scale.far)},
        {"training context": called},
    )
