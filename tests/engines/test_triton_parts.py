"""Device functions of the kernels against PyTorch, in float64 in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import grad

from miras.engines.triton import parts
from miras.memory.activation import ACTIVATIONS
from miras.memory.deep import _layer_norm

SIZE = 16
EPS = tl.constexpr(0.01)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@triton.jit
def _activations(a, out, NAME: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(a + at)
    tl.store(out + at, parts.activation(x, NAME))
    tl.store(out + SIZE + at, parts.slope(x, NAME))
    tl.store(out + 2 * SIZE + at, parts.curvature(x, NAME))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_derivatives(name):
    a = torch.linspace(-6, 6, SIZE, dtype=torch.float64, requires_grad=True)
    out = torch.empty(3, SIZE, dtype=torch.float64)
    _activations[(1,)](a.detach(), out, name, SIZE)
    s = ACTIVATIONS[name].forward(a)
    (slope,) = grad(s.sum(), a, create_graph=True)
    (curvature,) = grad(slope.sum(), a)
    torch.testing.assert_close(out, torch.stack([s, slope, curvature]).detach(), **EXACT)


@triton.jit
def _norm(z, w, cotangent, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    n, rstd = parts.norm(tl.load(z + at), EPS, SIZE)
    w = tl.load(w + at)
    to_w, to_z = parts.norm_back_back(tl.load(cotangent + at), w, n, rstd, SIZE)
    tl.store(out + at, n)
    tl.store(out + SIZE * SIZE + at, parts.norm_back(w, n, rstd, SIZE))
    tl.store(out + 2 * SIZE * SIZE + at, to_w)
    tl.store(out + 3 * SIZE * SIZE + at, to_z)


def test_norm_and_its_derivatives():
    z, w, cotangent = torch.randn(3, SIZE, SIZE, dtype=torch.float64).unbind()
    out = torch.empty(4, SIZE, SIZE, dtype=torch.float64)
    _norm[(1,)](z, w, cotangent, out, SIZE)
    z.requires_grad_(), w.requires_grad_()
    one, zero = torch.ones(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    n, pullback = _layer_norm(z, one, zero, EPS.value)
    u = pullback(w)
    expected = torch.stack([n, u, *grad(u, (w, z), cotangent)]).detach()
    torch.testing.assert_close(out, expected, **EXACT)


@triton.jit
def _products(a, b, out, OPERAND: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a + at), tl.load(b + at)
    total = parts.product(a, b, OPERAND, out.dtype.element_ty)
    tl.store(out + at, parts.add_product(total, a, b, OPERAND))


@pytest.mark.parametrize("dtype", parts.OPERANDS, ids=str)
def test_products_round_their_operands_only(dtype):
    total = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = torch.randn(2, SIZE, SIZE, dtype=total).unbind()
    out = torch.empty_like(a)
    _products[(1,)](a, b, out, parts.OPERANDS[dtype], SIZE)
    a, b = (_rounded(x, dtype) for x in (a, b))
    torch.testing.assert_close(out, 2 * a @ b)


def _rounded(x, dtype):
    """As the interpreter casts, which cuts bfloat16 off."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32) if dtype == torch.bfloat16 else x.to(dtype).to(x)
