"""Axis 1, memory architecture: what stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from miras.registry import Axis
from miras.weights import Leaf, Outer, Weights

Pullback = Callable[[Tensor], dict[str, Outer]]


class Memory(Axis):
    """A map M(W, x) from keys to values whose fast weights W are matrices.

    Because every fast weight is a matrix, a token's gradient of each is an outer product, and no memory needs to know
    which loss it is trained with: the bias hands it dL/dy, `vjp` turns that into factors.
    """

    axis = "memory"

    @abstractmethod
    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        """The matrices by name, for keys of size `d_k` and values of size `d_v`.

        Raises:
            UsageError: sizes that this architecture cannot have.
        """

    @abstractmethod
    def slow(self, d_v: int) -> dict[str, tuple[int, float]]:
        """Slow parameters, {name: (size, initial value)}: learned by the outer loop only, one vector per head."""

    @property
    @abstractmethod
    def normalised(self) -> bool:
        """Whether scaling W1 leaves the output as it is: decay to zero then raises the effective inner step."""

    @abstractmethod
    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        """M(W, x): x [..., C, d_k] -> [..., C, d_v], touching the weights only through `mv`."""

    @abstractmethod
    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        """M(W, x) and its pullback, which maps dL/dy [..., C, d_v] to {name: Outer}, one outer product a token."""
