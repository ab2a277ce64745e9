"""A matrix memory of features of the key."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from miras.errors import UsageError
from miras.memory.base import Memory, Pullback
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weights, mv


@dataclass(frozen=True)
class Polynomial(Memory):
    """M(W, x) = W phi(x), all monomials to degree p, phi(x).phi(y) = sum_n (x.y)^n / n! / c (arXiv 2505.23735).

    n runs from 1 to p, and c = sum_n 1 / n! makes phi of a unit vector a unit vector, so that steps are those of
    `Linear`, which degree 1 is; without a constant among the features, keys that are orthogonal stay so. Of d key
    channels there are d (d + 3) / 2 features of degree 2 and about d^3 / 6 of degree 3: more associations fit, in a
    larger state. Channel gates act on the values (rows of W).

    Choose it where a matrix is too small for what has to be associated and a state that many times larger is
    affordable: it is linear in its weights, so it learns as `Linear` does.

    Args:
        degree: 1, 2 or 3.
        start: "zero" or "learned", as for `Linear`.
    """

    degree: int = 2
    start: Literal["zero", "learned"] = "zero"

    def __post_init__(self) -> None:
        if self.degree not in (1, 2, 3):
            raise UsageError(f"Polynomial: degree must be 1, 2 or 3, got {self.degree!r}.")

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        features = sum(math.comb(d_k + n - 1, n) for n in range(1, self.degree + 1))
        return {"w": Leaf(d_v, features, ROWS, COLUMNS, power=1.0, std=float(self.start == "learned"))}

    def slow(self, d_v: int) -> dict[str, tuple[int, float]]:
        return {}

    @property
    def normalised(self) -> bool:
        return False

    def features(self, x: Tensor) -> Tensor:
        """Phi, [..., d] -> [..., features]."""
        parts = [x]
        for n in range(2, self.degree + 1):
            index, scale = (t.to(x.device) for t in _monomials(x.shape[-1], n))
            parts.append(scale.to(x.dtype) * reduce(torch.mul, (x.index_select(-1, i) for i in index)))
        return torch.cat(parts, -1) / math.sqrt(sum(1 / math.factorial(n) for n in range(1, self.degree + 1)))

    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        return mv(weights["w"], self.features(x))

    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        phi = self.features(x)
        return mv(weights["w"], phi), lambda u: {"w": Outer(u, phi)}


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a tensor that is kept must not belong to the inference that happened to come first
def _monomials(size: int, degree: int) -> tuple[Tensor, Tensor]:
    """The factors of each monomial x_i x_j .., i <= j <= .., int64 [degree, N], and its scale float64 [N].

    (x.y)^n / n! = sum over exponents a of x^a y^a / a!, so the scale is 1 / sqrt(a!).
    """
    factors = list(combinations_with_replacement(range(size), degree))
    repeats = [math.prod(math.factorial(count) for count in Counter(f).values()) for f in factors]
    return torch.tensor(factors).T.contiguous(), torch.tensor(repeats, dtype=torch.float64).rsqrt()
