"""Axis 2, attentional bias: what the memory is trained to do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from miras.gates import Gate
from miras.registry import Axis

# The smallest error that limits eta. A gradient that is a sign is steep at 0, where steps of a whole chunk jump to and
# fro and outer gradients explode (docs/log.md).
SMALL = 1 / 64


class Bias(Axis):
    """The inner loss L(y, v) of a prediction y = M(W, k) and a value v, given by its gradient in closed form.

    A final class is a frozen dataclass with at least the field `clip` (see `clipped`).
    """

    axis = "bias"
    gates: ClassVar[tuple[Gate, ...]] = ()
    eta_limit: ClassVar[float] = 1.0  # largest eta at which a rule stays stable
    clip: bool

    @abstractmethod
    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """L per token: y, v [..., C, d] -> [..., C]. For diagnostics and as the oracle of `grad`."""

    @abstractmethod
    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """dL/dy per token, [..., C, d]. Its derivative must be finite everywhere: the outer loop goes through it."""

    def clipped(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """What the update uses: `grad`, with `clip=True` shortened to norm sqrt(d) a token, u min(1, sqrt(d) / ||u||).

        An l_p gradient with p > 2 grows faster than the error; clipping keeps it bounded and rank one.
        """
        u = self.grad(y, v, gates)
        if not self.clip:
            return u
        limit = float(u.shape[-1])  # sqrt(d) squared
        # Clamping the squared norm from below, not the ratio from above, keeps the derivative finite at u = 0.
        return u * (limit / u.square().sum(-1, keepdim=True).clamp_min(limit)).sqrt()
