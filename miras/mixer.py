"""What mixes along the sequence: a `Rule` (a memory that learns) or `Attention` (a memory that lists)."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from typing import Any

from miras.gates import Gate
from miras.registry import Axis, from_config, to_config


class Mixer(Axis):
    """A map from queries, keys, values and gates to outputs with a batch-first state. Final: `Rule` and `Attention`."""

    axis = "mixer"

    @property
    @abstractmethod
    def gates(self) -> tuple[Gate, ...]:
        """The gates that `miras.run` expects."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """The four choices and the update, in words and formulas, under memory, bias, retention, algorithm, update; and
        what a layer's inputs to it are, where they are not all learned maps of their own, under inputs.
        """

    @abstractmethod
    def state_bytes(self, heads: int, d_k: int, d_v: int, tokens: int) -> int:
        """Bytes that one sequence's state takes after `tokens` tokens, in float32."""

    def to_config(self) -> dict[str, Any]:
        """The mixer as plain JSON-able values."""
        return to_config(self)

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration, kept in files of states: another rule's state is refused by it."""
        return hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode()).hexdigest()[:12]


def mixer_from_config(config: dict[str, Any]) -> Mixer:
    """The mixer that `Mixer.to_config` described; parts may also be given as objects.

    Raises:
        UsageError: unknown names or fields.
    """
    return from_config(Mixer, config)
