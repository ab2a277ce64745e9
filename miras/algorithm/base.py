"""Axis 4, memory learning algorithm: how the memory is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from miras.errors import UsageError
from miras.gates import ETA, Gate
from miras.registry import Axis

Slots = tuple[Tensor, ...]


class Algorithm(Axis):
    """An optimiser of the memory: `init` makes its slots, `step` turns a gradient into a step.

    A final class is a frozen dataclass with the field `rate`: with "input" each matrix sees eta / (leaf.power slope0),
    the learning rate over the power of its input, so that one eta suits all matrices; with "none" it sees eta.
    """

    axis = "algorithm"
    rate: Literal["none", "input"]
    gates: ClassVar[tuple[Gate, ...]] = (ETA,)
    law: ClassVar[tuple[str, ...]] = ("eta_t {grad}",)  # step_t in plain characters, and what it is made of
    slots: ClassVar[int] = 0  # how many tensors of the state's shape it carries
    resets: ClassVar[bool] = False  # its slots are zero again where a chunk begins
    eta_limit: ClassVar[float] = 1.0  # largest eta at which a rule stays stable
    steps: int = 1  # gradient steps a token takes, each with a key and a value of its own

    @abstractmethod
    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """The step, to be subtracted in dual coordinates, and the next slots. Slots start at zero."""


class LinearAlgorithm(Algorithm):
    """Marker: `step` is linear in (grad, slots), so a chunk of steps is one matrix, found by probing it."""


def check_rate(name: str, rate: str) -> None:
    """Refuse a way of scaling the learning rate that does not exist."""
    if rate not in ("none", "input"):
        raise UsageError(f"{name}: rate must be 'none' or 'input', got {rate!r}.")
