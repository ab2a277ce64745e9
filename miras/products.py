"""Matrix products whose operands are rounded as autocast says and whose sums keep the dtype of the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product whose operands follow autocast and whose result keeps the dtype of `a` (the state stays in float32)."""
    return torch.matmul(a, b).to(a.dtype)


def matmul_add(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b for batches of two axes, in one pass over the result where nothing has to be cast."""
    if total is None:
        return matmul(a, b)
    if torch.is_autocast_enabled(a.device.type):
        return total + matmul(a, b)
    flat = torch.baddbmm(total.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1))
    return flat.unflatten(0, total.shape[:2])


def operand_dtype(x: Tensor) -> torch.dtype:
    """What operands of products are rounded to where a tensor is: as autocast says, or the tensor's own dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Cast(NamedTuple):
    """How autocast was set, for a derivative that is computed outside of it."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Cast:
        """As it is set for a kind of device."""
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def again(self) -> torch.autocast:
        """A context with it set again."""
        return torch.autocast(self.device, self.dtype, self.enabled)
