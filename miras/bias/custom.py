"""A loss that the user writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from miras.bias.base import Bias
from miras.errors import UsageError
from miras.registry import function_at


def log_cosh(y: Tensor, v: Tensor) -> Tensor:
    """Sum of log cosh r, r = y - v: least squares near 0 and linear far from it, with the gradient tanh r."""
    r = y - v
    return (r - F.logsigmoid(2 * r) - math.log(2)).sum()


@dataclass(frozen=True)
class Custom(Bias):
    """L = fn(y, v), any loss of one's own (arXiv 2504.13173 eq. 4); its gradient by automatic differentiation.

    The derivatives of `fn` up to the second must be finite everywhere, which the outer loop goes through: write
    (x^2 + eps)^(1/2), not |x|. A rule with chunks wants a curvature of about 1, that of `L2`.

    A configuration names the function as "package.module:function". Reading one imports that module, which runs its
    code, so read configurations with a `Custom` only from those whose code you would run.

    Choose it to try a loss that is not here yet; one worth keeping becomes a class with its gradient in closed form.

    Args:
        fn: (y, v) -> L for one token, both of shape [d], L a scalar tensor; or its name as above. A function that
            stands in no module, such as a lambda, works but cannot be saved.
        clip: shorten each token's gradient to norm sqrt(d).
    """

    fn: Callable[[Tensor, Tensor], Tensor] = log_cosh
    clip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.fn, str):
            object.__setattr__(self, "fn", function_at(self.fn))
        if not callable(self.fn):
            raise UsageError(f"Custom: fn must be a function (y, v) -> loss of one token, got {self.fn!r}.")

    def loss(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return _per_token(self.fn, y, v).reshape(y.shape[:-1])

    def grad(self, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return _per_token(grad(self.fn), y, v).reshape(y.shape)


def _per_token(fn: Callable[[Tensor, Tensor], Tensor], y: Tensor, v: Tensor) -> Tensor:
    """`fn` of each token, all leading axes as one."""
    return vmap(fn)(y.flatten(0, -2), v.expand_as(y).flatten(0, -2))
