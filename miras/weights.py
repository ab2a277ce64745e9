"""Fast weights as matrices and as operators.

A memory touches a weight only through `mv` (W x) and `tmv` (W^T u), so one reading code serves the token loop, the
chunk engine and decoding, whether the weight is a plain tensor, one matrix per token, or a sum that is never written
out.

Shapes: `...` is (batch, head); C tokens; a matrix has o rows and i columns; gates have a last axis of 1 (one value per
head) or of the matrix' model-channel axis (one value per channel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from miras.decay import decay_between, decayed_scores, decayed_sum
from miras.products import matmul, matmul_add

ROWS, COLUMNS = -2, -1


class Leaf(NamedTuple):
    """What an axis may need to know about one matrix of a memory.

    Attributes:
        rows: o, the size of its output.
        cols: i, the size of its input.
        channel: the axis that carries model channels (`ROWS`, `COLUMNS`), along which channel gates act; None: no such
            axis.
        simplex: the axis that a softmax normalises.
        power: expected squared norm of its input.
        std: standard deviation of its initial entries; 0 means that it starts at zero and is not learned.
    """

    rows: int
    cols: int
    channel: int | None
    simplex: int
    power: float
    std: float

    @property
    def simplex_size(self) -> int:
        """Number of entries that one softmax normalises."""
        return self.rows if self.simplex == ROWS else self.cols


class Operator(Protocol):
    """One matrix per token, in whatever form."""

    def mv(self, x: Tensor) -> Tensor:
        """W_t x_t for each of the C tokens, [..., C, i] -> [..., C, o]."""
        ...


Weight = Tensor | Operator
Weights = Mapping[str, Weight]


def mv(weight: Weight, x: Tensor) -> Tensor:
    """W x for a weight in any form. A tensor without batch axis, [H, o, i], is shared by the batch."""
    if not isinstance(weight, Tensor):
        return weight.mv(x)
    if weight.dim() < x.dim():
        # One product over all rows of the batch; broadcasting would first copy the matrix for each of them.
        flat = x.transpose(0, 1).flatten(1, 2)
        return matmul(flat, weight.mT).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
    return matmul(x, weight.mT)


def mv_add(total: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """total + W x for a plain weight."""
    if total is not None and weight.dim() == x.dim():
        return matmul_add(total, x, weight.mT)
    return mv(weight, x) if total is None else total + mv(weight, x)


def tmv(weight: Weight, u: Tensor) -> Tensor:
    """W^T u for a weight that gradients are taken at; a chunk's reading weights have no transpose."""
    if isinstance(weight, Tensor):
        return matmul(u, weight)
    assert isinstance(weight, Scaled | PerToken)
    return weight.tmv(u)


def densified(weight: Weight) -> Tensor:
    """A weight in any form as matrices, [..., C, o, i], or [..., 1, o, i] where it is one for all tokens."""
    if isinstance(weight, Tensor):
        return weight.unsqueeze(-3)
    if isinstance(weight, PerToken):
        return weight.matrix
    assert isinstance(weight, Scaled | Unrolled | Decayed)
    return weight.dense()


class Outer(NamedTuple):
    """Per-token gradient of one matrix, sum_r left_{t,r} (x) right_{t,r}.

    left [..., C R, o], right [..., C R, i], the R = `terms` of a token side by side.
    """

    left: Tensor
    right: Tensor
    terms: int = 1

    def dense(self) -> Tensor:
        """[..., C, o, i]."""
        each = self.left.unsqueeze(-1) * self.right.unsqueeze(-2)
        return each if self.terms == 1 else each.unflatten(-3, (-1, self.terms)).sum(-3)

    def spread(self, coef: Tensor) -> Tensor:
        """Coefficients of tokens, [..., C, w], as those of all their terms."""
        return coef if self.terms == 1 else coef.repeat_interleave(self.terms, -2)

    def times(self, coef: Tensor, axis: int | None) -> Outer:
        """Each token's gradient times its coefficient, [..., C, 1 | channels], the channels along `axis`."""
        coef = self.spread(coef)
        if coef.shape[-1] > 1 and axis == COLUMNS:
            return self._replace(right=self.right * coef)
        return self._replace(left=self.left * coef)

    def beside(self, other: Outer) -> Outer:
        """The sum with another gradient of the same matrix."""
        left, right = (
            torch.cat([a.unflatten(-2, (-1, self.terms)), b.unflatten(-2, (-1, other.terms))], -2).flatten(-3, -2)
            for a, b in ((self.left, other.left), (self.right, other.right))
        )
        return Outer(left, right, self.terms + other.terms)


class PerToken(NamedTuple):
    """One materialised matrix per token, matrix [..., C, o, i]."""

    matrix: Tensor

    def mv(self, x: Tensor) -> Tensor:
        """See `Operator`."""
        return matmul(self.matrix, x.unsqueeze(-1)).squeeze(-1)

    def tmv(self, u: Tensor) -> Tensor:
        """W_t^T u_t for each of the C tokens, [..., C, o] -> [..., C, i]."""
        return matmul(self.matrix.mT, u.unsqueeze(-1)).squeeze(-1)


class Scaled(NamedTuple):
    """W_t = sum_j coef[t, j] (.) base_j, the coefficients along `axis` where they are per channel.

    bases: matrices [..., o, i] or, shared by the batch, [H, o, i]; coef [..., C, J, 1 | channels]; a coefficient that
    is always 1 is left out: bases beyond the J-th have none.
    """

    bases: tuple[Tensor, ...]
    coef: Tensor
    axis: int | None

    @property
    def _on_rows(self) -> bool:
        return self.coef.shape[-1] > 1 and self.axis == ROWS

    def _terms(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.coef.unbind(-2), self.bases, strict=False)

    def mv(self, x: Tensor) -> Tensor:
        """See `Operator`."""
        y = None
        for coef, base in self._terms():
            if self._on_rows:
                term = coef * mv(base, x)
                y = term if y is None else y + term
            else:
                y = mv_add(y, base, coef * x)
        for base in self.bases[self.coef.shape[-2] :]:
            y = mv_add(y, base, x)
        assert y is not None
        return y

    def tmv(self, u: Tensor) -> Tensor:
        """W_t^T u_t for each of the C tokens, [..., C, o] -> [..., C, i]."""
        x = None
        for coef, base in self._terms():
            term = tmv(base, coef * u) if self._on_rows else coef * tmv(base, u)
            x = term if x is None else x + term
        for base in self.bases[self.coef.shape[-2] :]:
            x = tmv(base, u) if x is None else x + tmv(base, u)
        assert x is not None
        return x

    def dense(self) -> Tensor:
        """[..., C, o, i]."""
        total = None
        for j, base in enumerate(self.bases):
            term = base.unsqueeze(-3)
            if j < self.coef.shape[-2]:
                term = along(self.coef[..., j, :], self.axis) * term
            total = term if total is None else total + term
        assert total is not None
        return total


class Unrolled(NamedTuple):
    """W_t = (bases)_t + sum_s coef[t, s] (.) left_s (x) right_s, never materialised: a C x C product instead.

    coef [..., C, C R, 1 | channels] for R terms a token, zero above the diagonal.
    """

    bases: Scaled
    grad: Outer
    coef: Tensor

    def mv(self, x: Tensor) -> Tensor:
        """See `Operator`."""
        left, right, _ = self.grad
        y = self.bases.mv(x)
        if self.coef.shape[-1] == 1:
            return matmul_add(y, self.coef[..., 0] * matmul(x, right.mT), left)
        if self.bases.axis == ROWS:
            return y + torch.einsum("...ts,...tso,...so->...to", matmul(x, right.mT), self.coef, left)
        return y + matmul(torch.einsum("...ti,...tsi,...si->...ts", x, self.coef, right), left)

    def dense(self) -> Tensor:
        """[..., C, o, i], the C steps of which weigh as much as the state each."""
        outer = self.grad._replace(terms=1).dense()
        if self.coef.shape[-1] == 1:
            return self.bases.dense() + torch.einsum("...ts,...soi->...toi", self.coef[..., 0], outer)
        pattern = "...tso,...soi->...toi" if self.bases.axis == ROWS else "...tsi,...soi->...toi"
        return self.bases.dense() + torch.einsum(pattern, self.coef, outer)


class Decayed(NamedTuple):
    """`Unrolled` for a decay per channel: coef[t, s] = -exp(rows_t - log_s) eta_s for s up to t + diagonal, else 0.

    rows, log [..., C, channels], see `decayed_scores`; eta [..., C, 1 | channels].
    """

    bases: Scaled
    grad: Outer
    rows: Tensor
    log: Tensor
    eta: Tensor
    diagonal: int

    def mv(self, x: Tensor) -> Tensor:
        """See `Operator`."""
        left, right, _ = self.grad
        y = self.bases.mv(x)
        if self.bases.axis == ROWS:
            return y - self.sums(matmul(x, right.mT), self.eta * left)
        return y - matmul(self.scores(x, self.eta * right), left)

    def scores(self, x: Tensor, right: Tensor) -> Tensor:
        """`decayed_scores` under this decay."""
        return decayed_scores(x, right, self.rows, self.log, self.diagonal)

    def sums(self, scores: Tensor, left: Tensor) -> Tensor:
        """`decayed_sum` under this decay."""
        return decayed_sum(scores, left, self.rows, self.log, self.diagonal)

    def dense(self) -> Tensor:
        """[..., C, o, i], the C steps of which weigh as much as the state each."""
        return Unrolled(self.bases, self.grad, self.coefficients()).dense()

    def coefficients(self) -> Tensor:
        """[..., C, C, channels], written out."""
        return -decay_between(self.rows, self.log, self.diagonal) * self.eta.unsqueeze(-3)


class Linearised(NamedTuple):
    """W_t = base + slope (.) centre(change_t): a link within a chunk. `centre` subtracts the mean along `simplex`.

    slope [..., 1 | o, 1 | i], constant along `simplex` where that is not None. Neither slope nor mean is ever applied
    to a matrix: along columns they act on x, along rows on the product.
    """

    base: Tensor
    slope: Tensor
    change: Unrolled | Decayed
    simplex: int | None

    def mv(self, x: Tensor) -> Tensor:
        """See `Operator`."""
        y = mv(self.base, x)
        if self.simplex == COLUMNS:
            x = x - x.mean(-1, keepdim=True)
        if self.slope.shape[-1] > 1:
            x = x * self.slope
        change = self.change.mv(x)
        if self.slope.shape[-1] == 1:
            change = change * self.slope.mT
        return y + (change - change.mean(-1, keepdim=True) if self.simplex == ROWS else change)


def along(gate: Tensor, axis: int | None) -> Tensor:
    """A gate [..., 1 | channels] made broadcastable against matrices [..., o, i] whose channels lie along `axis`."""
    return gate.unsqueeze(-2) if gate.shape[-1] > 1 and axis == COLUMNS else gate.unsqueeze(-1)
