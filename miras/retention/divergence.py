"""f-divergences on the scaled simplex."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from miras.errors import UsageError
from miras.gates import Gate
from miras.retention.base import Retention, SimplexRetention, check_to, mass
from miras.weights import Leaf

# Newton steps without derivatives. From where they start 8 leave nothing but rounding, whatever the spread of x.
STEPS = 9
# The least factor of one step: an entry that chi2 sets to zero must have a logarithm.
FLOOR = 1e-6


class Divergence(NamedTuple):
    """f by f' and g = (f')^{-1}, which is convex with g(0) = 1; g' as a function of g, and g'(0); the largest eta at
    which a rule stays stable, found as for `Bregman`.
    """

    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    slope0: float
    eta_limit: float


DIVERGENCES = {
    "kl": Divergence(torch.log, torch.exp, lambda g: g, 1.0, 0.125),
    "chi2": Divergence(lambda t: 2 * (t - 1), lambda x: (1 + x / 2).clamp_min(0), lambda g: g.sign() / 2, 0.5, 0.25),
    "reverse_kl": Divergence(lambda t: 1 - 1 / t, lambda x: 1 / (1 - x), torch.square, 1.0, 0.0625),
    "hellinger": Divergence(lambda t: 1 - t.rsqrt(), lambda x: (1 - x).pow(-2), lambda g: 2 * g.pow(1.5), 2.0, 0.0625),
}


def normaliser(f: Divergence, x: Tensor, prior: Tensor, axes: int | tuple[int, int]) -> Tensor:
    """Zeta such that sum prior g(x - zeta) = 1 along `axes`, where the prior adds up to 1, with its derivatives."""

    def step(zeta: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the sum exceeds 1, and how fast it falls."""
        g = f.inverse(x - zeta)
        return (prior * g).sum(axes, keepdim=True) - 1, (prior * f.slope(g)).sum(axes, keepdim=True)

    with torch.no_grad():
        # The sum is at least 1 at the mean of x, because g is convex, and where one term alone is 1. It is convex and
        # falls with zeta, so Newton's steps from there rise to the root, away from the pole that g may have.
        single = (x - f.derivative(1 / prior)).amax(axes, keepdim=True)
        zeta = torch.maximum((prior * x).sum(axes, keepdim=True), single)
        for _ in range(STEPS):
            excess, slope = step(zeta)
            zeta = zeta + excess / slope
        slope = step(zeta)[1]
    # One more from the root: its derivative is that of the implicit function.
    return zeta + step(zeta)[0] / slope


def _check_f(name: str, f: str) -> None:
    if f not in DIVERGENCES:
        raise UsageError(f"{name}: f must be one of {', '.join(DIVERGENCES)}, got {f!r}.")


@dataclass(frozen=True)
class FDivergence(SimplexRetention):
    """A_t = alpha_t A_{t-1} - step_t, W_t = (c/n) g(A_t - zeta_t), g = (f')^{-1} (arXiv 2504.13173 eq. 18 as FTRL).

    The weights of least f-divergence from the uniform simplex, along the simplex axis; zeta_t makes each slice add up
    to c, see `mass`. Eq. 18 itself diverges from W_{t-1} instead, see `LocalFDivergence`; only for "kl" is it the same.

    * `f="kl"`: g = exp, equal to `KL`.
    * `f="chi2"`: g = max(0, 1 + x/2), the projection onto the simplex. Entries become exactly zero.
    * `f="reverse_kl"`: g = 1/(1 - x), and `f="hellinger"`: g = 1/(1 - x)^2. Small entries stay alive, they shrink as
      1/|x| and 1/x^2 only; but a few entries soon hold most of the mass, those of a fresh memory already.

    Choose it as a relative of `KL`: "chi2" where weights shall become exactly zero, the last two where small ones shall
    stay alive. For "kl" itself choose `KL`, whose normaliser needs no search.

    Args:
        f: "kl", "chi2", "reverse_kl" or "hellinger".
        to: "zero" (the uniform simplex) or "initial".
    """

    f: Literal["kl", "chi2", "reverse_kl", "hellinger"] = "chi2"
    to: Literal["zero", "initial"] = "zero"

    def __post_init__(self) -> None:
        _check_f("FDivergence", self.f)
        check_to("FDivergence", self.to)

    @property
    def eta_limit(self) -> float:
        """See `Divergence`."""
        return DIVERGENCES[self.f].eta_limit

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        f = DIVERGENCES[self.f]
        # The largest entries are those of the largest weights: measured from there they lose no digits.
        x = dual - dual.detach().amax(leaf.simplex, keepdim=True)
        prior = x.new_full((), 1 / leaf.simplex_size)
        return mass(leaf) / leaf.simplex_size * f.inverse(x - normaliser(f, x, prior, leaf.simplex))

    def slope0(self, leaf: Leaf) -> float:
        return mass(leaf) / leaf.simplex_size * DIVERGENCES[self.f].slope0


@dataclass(frozen=True)
class LocalFDivergence(Retention):
    """W_t = W_{t-1} (.) g(-zeta_t - step_t), g = (f')^{-1} (arXiv 2504.13173 eq. 18).

    By its letter: zeta_t is one number per matrix, all of whose entries together add up to a constant. Carried as log
    W; not linear in it, so that with a step a token only the token loop runs it. A factor is at least 1e-6: what "chi2"
    sets to zero stays near zero. Nothing decays, because eq. 18 has no global term.

    Choose it to study eq. 18 as printed, on short sequences or with one step a chunk (`step_at="chunk"`), which alone
    is fast; `FDivergence` is the form that trains in parallel with a step a token.

    Args:
        f: as for `FDivergence`.
        to: "zero"; there is no decay that could have a target.
    """

    gates: ClassVar[tuple[Gate, ...]] = ()
    law: ClassVar[str] = "W_t = W_{t-1} (.) g(-zeta_t - {step})"

    f: Literal["kl", "chi2", "reverse_kl", "hellinger"] = "chi2"
    to: Literal["zero"] = "zero"

    def __post_init__(self) -> None:
        _check_f("LocalFDivergence", self.f)
        if self.to != "zero":
            raise UsageError(
                f"LocalFDivergence: to must be 'zero', got {self.to!r}: a step multiplies the weights themselves, which"
                " cannot be kept relative to the initial memory. Write FDivergence(to='initial')."
            )

    @property
    def eta_limit(self) -> float:
        """See `Divergence`."""
        return DIVERGENCES[self.f].eta_limit

    def primal(self, dual: Tensor, leaf: Leaf) -> Tensor:
        return self.slope0(leaf) * leaf.rows * leaf.cols * _softmax(dual)

    def retain(self, dual: Tensor, step: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        f = DIVERGENCES[self.f]
        factor = f.inverse(-step - normaliser(f, -step, _softmax(dual), (-2, -1)))
        return dual + factor.clamp_min(FLOOR).log()

    def slope0(self, leaf: Leaf) -> float:
        return mass(leaf) / leaf.simplex_size


def _softmax(dual: Tensor) -> Tensor:
    """Over all entries of a matrix."""
    return dual.flatten(-2).softmax(-1).view_as(dual)
