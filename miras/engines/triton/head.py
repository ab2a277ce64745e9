"""Device functions of what lies between the memory's matrices and the loss: residual, LN and bias.

    y = k + gamma n + beta,  n = (z - mean z) rstd,    u = back through LN of gamma g,  g = dL/dy, clipped

for z = W1 x. Tiles are [tokens, D]; gamma and beta [1, D].
"""

# Kernels are written in the language of Triton, whose values have other types than Python sees.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from miras.engines.triton.bias import gradient, gradient_back, shorten, shorten_back
from miras.engines.triton.parts import norm, norm_back, norm_back_back


@triton.jit
def _forward(z, k, v, gate, gamma, beta, D: tl.constexpr, MODEL: tl.constexpr):
    """y, n, rstd and g, which is not yet clipped."""
    y, n, rstd = z, z, z
    if MODEL.norm:
        n, rstd = norm(z, MODEL.eps, D)
        y = n * gamma + beta
    if MODEL.residual:
        y += k
    g = gradient(y, v, gate, D, MODEL)
    return y, n, rstd, g


@triton.jit
def surprise(z, k, v, gate, gamma, beta, D: tl.constexpr, MODEL: tl.constexpr):
    """The gradient u of the loss by z."""
    _, n, rstd, g = _forward(z, k, v, gate, gamma, beta, D, MODEL)
    if MODEL.clip:
        g = shorten(g, 1.0 * D)
    return norm_back(g * gamma, n, rstd, D) if MODEL.norm else g


@triton.jit
def surprise_back(cotangent, z, k, v, gate, gamma, beta, D: tl.constexpr, MODEL: tl.constexpr):
    """The cotangents of z, k, v, gate, gamma and beta from that of u, all of them [tokens, D]."""
    y, n, rstd, g = _forward(z, k, v, gate, gamma, beta, D, MODEL)
    clipped = shorten(g, 1.0 * D) if MODEL.clip else g
    to_g, to_z, to_gamma = cotangent, tl.zeros_like(z), tl.zeros_like(z)
    if MODEL.norm:
        to_w, to_z = norm_back_back(cotangent, clipped * gamma, n, rstd, D)
        to_g, to_gamma = to_w * gamma, to_w * clipped
    if MODEL.clip:
        to_g = shorten_back(to_g, g, 1.0 * D)
    to_y, to_v, to_gate = gradient_back(to_g, y, v, gate, D, MODEL)
    to_k = to_y if MODEL.residual else tl.zeros_like(z)
    if MODEL.norm:
        to_gamma += to_y * n
        to_z += norm_back(to_y * gamma, n, rstd, D)
    else:
        to_z = to_y
    return to_z, to_k, to_v, to_gate, to_gamma, to_y
