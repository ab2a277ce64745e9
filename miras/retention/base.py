"""Axis 3, retention gate: what is kept."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from miras.errors import UsageError
from miras.gates import ALPHA, Gate
from miras.registry import Axis
from miras.weights import ROWS, Leaf

EPS = 1e-6


class Retention(Axis):
    """How the state takes a step, and how weights are read off it.

    The state A lives in dual coordinates; the memory reads W = link(A). A final class is a frozen dataclass with the
    field `to`: "zero" to decay to zero, "initial" to decay to the learned initial memory (A is then stored relative to
    it).
    """

    axis = "retention"
    to: Literal["zero", "initial"]
    gates: ClassVar[tuple[Gate, ...]] = (ALPHA,)
    on_simplex: ClassVar[bool] = False  # the link normalises along the simplex axis, where alpha must then be constant
    singular_at_zero: ClassVar[bool] = False  # at a zero matrix the link's slope is not finite, or it is 0
    law: ClassVar[str] = ""  # the update with {step} in it, where it is not A_t = alpha_t A_{t-1} - step_t
    eta_limit: ClassVar[float] = 1.0  # largest eta at which a rule stays stable

    @abstractmethod
    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        """The weights W = link(A), [..., o, i]."""

    @abstractmethod
    def retain(self, dual: Tensor, step: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """The next dual, from the present one and the algorithm's step (which is subtracted). `gates` holds alpha."""

    @abstractmethod
    def slope0(self, leaf: Leaf) -> float:
        """Slope of the link where the dual is constant: how much a step in dual coordinates moves the weights."""


class MirrorRetention(Retention):
    """Retention that is linear in dual coordinates, A_t = alpha_t A_{t-1} - step_t: a chunk of it is one product."""

    def retain(self, dual: Tensor, step: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return (gates["alpha"] * dual if "alpha" in gates else dual) - step


class SlopedRetention(MirrorRetention):
    """A mirror retention whose link has a chunk-wise linear form, `link_at="chunk"`.

    W_t = link(O) + slope(O) centre(A_t - O) within the chunk that began at O.
    """

    @abstractmethod
    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        """link(O) at the origin O of a chunk and its slope there, [..., 1 | o, 1 | i] with a 1; both differentiable."""

    def centre(self, dual: Tensor, leaf: Leaf) -> Tensor:
        """The part of a dual that the link sees: a softmax does not see a constant along its axis."""
        return dual - dual.mean(leaf.simplex, keepdim=True) if self.on_simplex else dual


class SimplexRetention(SlopedRetention):
    """A sloped retention whose weights are not negative and add up to `mass` in each slice along the simplex axis."""

    on_simplex: ClassVar[bool] = True

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        weights = self.primal(origin, leaf)
        return weights, fitted_slope(origin, weights, leaf.simplex, self.slope0(leaf))


class EuclideanRetention(MirrorRetention):
    """Dual and primal coordinates coincide, so that reads need no materialised weights."""

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return dual

    def slope0(self, leaf: Leaf) -> float:
        return 1.0


def mass(leaf: Leaf) -> float:
    """c, the sum of each slice of weights on a scaled simplex: see `KL`."""
    n = leaf.simplex_size
    return float(n) if leaf.simplex == ROWS else math.sqrt(n)


def unit(leaf: Leaf) -> float:
    """s, what entries of a matrix are measured in: their initial standard deviation, 1 where they start at zero."""
    return leaf.std or 1.0


def fitted_slope(origin: Tensor, weights: Tensor, axes: int | tuple[int, int], at_constant: float) -> Tensor:
    """Least squares of link(O) on O along `axes`, `at_constant` where O is constant; differentiable everywhere."""
    # O is centred first: differences of large means would leave nothing of a small variance.
    o = origin - origin.mean(axes, keepdim=True)
    variance = o.square().mean(axes, keepdim=True)
    covariance = (o * weights).mean(axes, keepdim=True)
    return (covariance + EPS * at_constant) / (variance + EPS)


def check_to(name: str, to: str) -> None:
    """Refuse a target of decay that does not exist."""
    if to not in ("zero", "initial"):
        raise UsageError(f"{name}: to must be 'zero' or 'initial', got {to!r}.")
