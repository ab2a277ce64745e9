"""What deep memories share: the residual and the norm around their matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.errors import UsageError
from miras.memory.base import Memory, Pullback
from miras.weights import Weights


class Deep(Memory):
    """M(W, x) = x + LN(core(W, x)). A final class has the fields `residual`, to add x, `norm`, to apply LN, and `eps`,
    which LN adds to the variance. The scale and shift of LN are slow parameters.
    """

    residual: bool
    norm: bool
    eps: float

    @abstractmethod
    def core(self, weights: Weights, x: Tensor) -> Tensor:
        """The map between the residual and the norm, [..., C, d_k] -> [..., C, d_v]."""

    @abstractmethod
    def core_vjp(self, weights: Weights, x: Tensor) -> tuple[Tensor, Pullback]:
        """`core` and its pullback, as `vjp` is that of the memory."""

    @property
    def normalised(self) -> bool:
        return self.norm

    def slow(self, d_v: int) -> dict[str, tuple[int, float]]:
        return {"norm_scale": (d_v, 1.0), "norm_shift": (d_v, 0.0)} if self.norm else {}

    def check_residual(self, d_k: int, d_v: int) -> None:
        """Refuse to add keys to values of another size."""
        if self.residual and d_k != d_v:
            name = type(self).__name__
            raise UsageError(
                f"{name}: the residual needs d_k = d_v, got {d_k} and {d_v}; write {name}(residual=False)."
            )

    def read(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        y = self.core(weights, x)
        if self.norm:
            y = F.layer_norm(y, y.shape[-1:], eps=self.eps) * _row(slow["norm_scale"]) + _row(slow["norm_shift"])
        return x + y if self.residual else y

    def vjp(self, weights: Weights, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Pullback]:
        z, core_pullback = self.core_vjp(weights, x)
        y, to_core = self.around(z, x, slow)
        return y, lambda u: core_pullback(to_core(u))

    def around(self, z: Tensor, x: Tensor, slow: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x + LN(z), and the way back from it to z."""
        to_z: Callable[[Tensor], Tensor] = _same
        if self.norm:
            z, to_z = _layer_norm(z, _row(slow["norm_scale"]), _row(slow["norm_shift"]), self.eps)
        return (x + z if self.residual else z), to_z


def _same(u: Tensor) -> Tensor:
    return u


def _row(slow: Tensor) -> Tensor:
    """A slow vector [..., H, d] against tokens [..., H, C, d]."""
    return slow.unsqueeze(-2)


def _layer_norm(z: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """LN with its pullback: dz = (du - mean du - n mean(du n)) / std, du = scale u, n the normalised z.

    Both are PyTorch's fused operators, whose derivatives PyTorch knows too.
    """
    shape = z.shape[-1:]
    n, mean, rstd = torch.native_layer_norm(z, shape, None, None, eps)

    def pullback(u: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            u * scale, z, shape, mean, rstd, None, None, [True, False, False]
        )[0]

    return n * scale + shift, pullback
