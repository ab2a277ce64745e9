"""How a layer makes what a rule reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from miras.errors import UsageError

WORDS = {
    "alpha": ("layer", "head", "channel", "none", "retnet", "lightning", "dt"),
    "eta": ("layer", "head", "one", "dt"),
    "delta": ("layer", "constant"),
    "key": ("own", "forgotten"),
    "query": ("own", "corrected"),
    "value": ("own", "normed"),
}


@dataclass(frozen=True)
class Inputs:
    """What belongs to a model but not to its memory's update; `MirasLayer` reads it, `miras.run` does not.

    Args:
        alpha: retention: "layer", per head or channel as the layer is told; "head" and "channel", always so; "none", 1;
            constant per head as in RetNet, 1 - 2^(-5 - h), or in Lightning attention, exp(-8 h / H); "dt", Mamba2's
            exp(-A dt).
        eta: learning rate: "layer"; "head", always per head; "one"; "dt", Mamba2's time step.
        delta: threshold of `Huber`: "layer", a map of the token, or "constant", a learned number per head.
        key: "own", a map of the token, or "forgotten", 1 - alpha (HGRN2).
        query: "own", or "corrected", q - d k with a learned d per head (Comba).
        value: "own", a map of the token, or "normed", that over its root mean square in each head: the size of what a
            memory that ends in LN can write.
        value_size: root mean square of normed values, for memories that end in no LN: an inner gradient of W2 grows
            with its square beside one of W1.

    Raises:
        UsageError: another word, a tie of one gate alone, or a size of values that are not normed.
    """

    alpha: Literal["layer", "head", "channel", "none", "retnet", "lightning", "dt"] = "layer"
    eta: Literal["layer", "head", "one", "dt"] = "layer"
    delta: Literal["layer", "constant"] = "layer"
    key: Literal["own", "forgotten"] = "own"
    query: Literal["own", "corrected"] = "own"
    value: Literal["own", "normed"] = "own"
    value_size: float = 1.0

    def __post_init__(self) -> None:
        for name, known in WORDS.items():
            if getattr(self, name) not in known:
                raise UsageError(f"Inputs: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if (self.alpha == "dt") != (self.eta == "dt"):
            raise UsageError("Inputs: one time step makes both gates; write alpha='dt' and eta='dt'.")
        if self.key == "forgotten" and self.alpha != "channel":
            raise UsageError("Inputs: a key that is what was forgotten needs alpha='channel'.")
        if not 0 < self.value_size < math.inf or (self.value == "own" and self.value_size != 1):
            raise UsageError(
                "Inputs: value_size must be a number more than 0, and 1 unless value='normed'; "
                f"got {self.value_size!r} and {self.value!r}."
            )


# Every gate a map of its own.
LEARNED = Inputs()
