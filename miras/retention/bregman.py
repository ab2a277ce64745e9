"""Element-wise mirror descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from miras.errors import UsageError
from miras.registry import function_at
from miras.retention.base import SlopedRetention, check_to, fitted_slope, unit
from miras.weights import Leaf


class Potential(NamedTuple):
    """f by g = (f')^{-1}, in a unit in which g'(0) = 1; the largest eta at which a rule stays stable."""

    link: Callable[[Tensor], Tensor]
    eta_limit: float


# The limits are those at which a change of 1e-9 in the first of 2048 tokens and all outer gradients stay small.
POTENTIALS = {
    "logistic": Potential(lambda a: 4 * torch.sigmoid(a), 0.25),
    "hypentropy": Potential(lambda a: 2 * torch.sinh(a / 2), 0.5),
    "entropy": Potential(torch.exp, 0.0625),
}


@dataclass(frozen=True)
class Bregman(SlopedRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = s g(A_t / s), g = (f')^{-1} (arXiv 2504.13173 section 5.2, Bregman).

    Step and decay act on F'(W), F(W) = sum f(W_jl), element by element. s is the initial standard deviation of the
    matrix' entries (1 where it starts at zero), a change of unit only, so that A/s starts at order 1 and W at order s:

    * `potential="logistic"`: g = 4 sigmoid(a), the paper's sigmoid gate. Entries stay between 0 and 4 s.
    * `potential="hypentropy"`: g = 2 sinh(a/2) (arXiv 1902.01903). Entries of both signs; steps add to small ones
      and multiply large ones, so that few weights become large.
    * `potential="entropy"`: g = exp(a), exponentiated gradient. Entries stay positive: `KL` without its sum.
    * a function g of one's own, increasing, element by element, with a derivative at 0 that is not 0. It is saved and
      loaded by its name as the function of `bias.Custom` is, with the same caution.

    Choose it by the range that entries shall have: bounded ("logistic"), of both signs with few large ones
    ("hypentropy") or positive ("entropy"). Its limits on eta are those of stability; no model has been compared with it
    here.

    Args:
        potential: "logistic", "hypentropy", "entropy", or g, a function of a tensor.
        to: "zero" (entries s g(0): 2 s, 0, s) or "initial".
    """

    potential: str | Callable[[Tensor], Tensor] = "logistic"
    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        if isinstance(self.potential, str) and ":" in self.potential:
            object.__setattr__(self, "potential", function_at(self.potential))
        if not callable(self.potential) and self.potential not in POTENTIALS:
            raise UsageError(
                f"Bregman: potential must be one of {', '.join(POTENTIALS)} or a function, got {self.potential!r}."
            )
        check_to("Bregman", self.to)

    @property
    def _law(self) -> Potential:
        # A function that nobody has measured gets the smallest limit.
        own = min(p.eta_limit for p in POTENTIALS.values())
        return POTENTIALS[self.potential] if isinstance(self.potential, str) else Potential(self.potential, own)

    @property
    def eta_limit(self) -> float:
        """See `Potential`."""
        return self._law.eta_limit

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        s = unit(leaf)
        return s * self._law.link(dual / s)

    def slope0(self, leaf: Leaf) -> float:
        return 1.0 if isinstance(self.potential, str) else grad(self.potential)(torch.zeros(())).item()

    def linearise(self, origin: Tensor, leaf: Leaf) -> tuple[Tensor, Tensor]:
        weights = self.primal(origin, leaf)
        return weights, fitted_slope(origin, weights, (-2, -1), self.slope0(leaf))
