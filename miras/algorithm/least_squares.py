"""The exact minimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm.base import LinearAlgorithm, Slots, check_rate
from miras.errors import UsageError
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weight, densified


@dataclass(frozen=True)
class LeastSquares(LinearAlgorithm):
    """W_t = argmin_W sum_s decay eta_s ||W k_s - v_s||^2 + ||W||_ridge^2 = G_t (H_t + ridge)^-1 (arXiv 2506.05233).

    G_t = alpha_t G_{t-1} + eta_t v_t k_t^T and H_t = alpha_t H_{t-1} + eta_t k_t k_t^T (MesaNet), H carried as one more
    matrix; each query is solved for exactly. The ridge is a slow parameter per key channel, softplus of what is
    learned. For a matrix memory with the l_2 bias at chunk 1 and gates per head; `Rule` refuses others.

    Choose it where a matrix shall recall as well as a matrix can: every pair counts, in whatever order it came. The
    price is a second matrix of d_k x d_k and a linear system for every query; outliers count in full.

    Args:
        rate: must be "none": the exact solution has no step size.
    """

    law: ClassVar[tuple[str, ...]] = (
        "W_t = G_t (H_t + diag(ridge))^-1",
        "G_t = {keep}G_{t-1} + eta_t v_t k_t^T",
        "H_t = {keep}H_{t-1} + eta_t k_t k_t^T",
    )

    rate: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        check_rate("LeastSquares", self.rate)
        if self.rate != "none":
            raise UsageError("LeastSquares: rate must be 'none'; the exact solution has no step size.")

    def step(self, grad: Tensor, slots: Slots, gates: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        return gates["eta"] * grad, ()

    def leaf(self, d_k: int) -> Leaf:
        """The matrix H."""
        return Leaf(d_k, d_k, COLUMNS, ROWS, power=1.0, std=0.0)

    def statistics(self, k: Tensor, v: Tensor) -> dict[str, Outer]:
        """What a token adds to G (the matrix w) and H, negative as gradients are."""
        return {"w": Outer(-v, k), "h": Outer(-k, k)}

    def query(self, h: Weight, q: Tensor, ridge: Tensor) -> Tensor:
        """(H_t + diag(softplus(ridge)))^-1 q_t: q [..., C, i], ridge [H, i]."""
        with torch.autocast(q.device.type, enabled=False):
            matrix = densified(h) + torch.diag_embed(F.softplus(ridge)).unsqueeze(-3)
            return torch.linalg.solve(matrix, q.unsqueeze(-1)).squeeze(-1)


# softplus of it is 1.
RIDGE = 0.5413248546129181
