"""Linear memories by the Triton kernels of flash-linear-attention, where it is installed and the tensors are on a GPU.

Its kernels (fla-core >= 0.6) store the memory as keys x values, the transpose of ours, call eta beta and log_alpha g,
write a token and then read it. With S = W^T, e the erase key and every token written with k' = eta k:

    linear_attn       S_t = S_{t-1} + k' v^T                                       Dot
    simple_gla, gla   S_t = a S_{t-1} + k' v^T                                     a per head, per key channel
    delta_rule        S_t = S_{t-1} + k' (v - S_{t-1}^T k)^T                       L2
    gated_delta_rule  S_t = a S_{t-1} + k' (v - a S_{t-1}^T k)^T                   gradient at the decayed memory
    kda               the same with a per key channel
    comba             S_t = a S_{t-1} + k' (v - S_{t-1}^T e)^T                     gradient at the previous memory
    generalized_...   S_t = diag(a) S_{t-1} + b (S_{t-1}^T c)^T + k' v^T           whatever else erases (RWKV-7)
    mesa_net          y_t = S_t^T (H_t + ridge)^-1 q_t                             by 30 steps of conjugate gradients

A rule is matched by what it is, not by what it is called. Products take 16-bit operands, as autocast asks for: in
float32 some kernels refuse and the others round to TF32, so without autocast this engine refuses.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.algorithm import GradientDescent, Implicit, LeastSquares
from miras.bias import L2, Dot, Erase
from miras.engines import exact
from miras.layout import Layout
from miras.memory import Linear
from miras.products import operand_dtype
from miras.retention import EuclideanRetention
from miras.rule import Gates, Rule, State
from miras.weights import mv

INSTALLED = all(importlib.util.find_spec(name) for name in ("fla", "triton"))

Inputs = dict[str, Tensor]


class Kernel(NamedTuple):
    """A row of the table.

    Attributes:
        name: package and function in fla.ops.
        suits: (rule, names of the gates that are per channel) -> whether it computes the rule. The first row that suits
            is taken.
        arguments: (rule, tokens, gates and slow parameters by our names) -> by the kernel's.
        widest: largest d_k; None: any.
        states: our matrix and the kernel's argument for its initial value, in the order it returns the last ones.
    """

    name: str
    suits: Callable[[Rule, set[str]], bool]
    arguments: Callable[[Rule, Inputs], dict[str, Any]]
    widest: int | None = None
    states: tuple[tuple[str, str], ...] = (("w", "initial_state"),)


def _dot(rule: Rule, x: Inputs) -> dict[str, Any]:
    return {"q": x["q"], "k": x["eta"] * x["k"], "v": x["v"], "scale": 1.0}


def _delta(rule: Rule, x: Inputs) -> dict[str, Any]:
    return {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["eta"][..., 0], "scale": 1.0}


def _low_rank(rule: Rule, x: Inputs) -> dict[str, Any]:
    # To ask the decayed memory at e is to ask the memory at e decayed.
    erase = x["erase"] if _early(rule) else x["log_alpha"].exp() * x["erase"]
    rank_one = {"a": -erase, "b": x["eta"] * x["along"]}
    return {**_dot(rule, x), **rank_one, "gk": x["log_alpha"].expand_as(x["k"])}


def _mesa(rule: Rule, x: Inputs) -> dict[str, Any]:
    heads = {"g": x["log_alpha"][..., 0], "beta": x["eta"][..., 0], "lamb": F.softplus(x["ridge"])}
    return {"q": x["q"], "k": x["k"], "v": x["v"], **heads}


def _early(rule: Rule) -> bool:
    """Whether gradients are taken at a memory that is not decayed."""
    return rule.gradient_at == "previous" or not rule.retention.gates


KERNELS = (
    Kernel(
        "mesa_net.chunk_mesa_net",
        lambda rule, channels: isinstance(rule.algorithm, LeastSquares),
        _mesa,
        widest=128,
        states=(("h", "h_kk_init"), ("w", "h_kv_init")),
    ),
    Kernel(
        "linear_attn.chunk_linear_attn",
        lambda rule, channels: isinstance(rule.bias, Dot) and not rule.retention.gates,
        lambda rule, x: {**_dot(rule, x), "normalize": False},
    ),
    Kernel(
        "simple_gla.chunk_simple_gla",
        lambda rule, channels: isinstance(rule.bias, Dot) and "log_alpha" not in channels,
        lambda rule, x: {**_dot(rule, x), "g": x["log_alpha"][..., 0]},
    ),
    Kernel(
        "gla.chunk_gla",
        lambda rule, channels: isinstance(rule.bias, Dot),
        lambda rule, x: {**_dot(rule, x), "g": x["log_alpha"]},
    ),
    Kernel(
        "delta_rule.chunk_delta_rule",
        lambda rule, channels: isinstance(rule.bias, L2) and not rule.retention.gates and not channels,
        _delta,
        widest=256,
    ),
    Kernel(
        "gated_delta_rule.chunk_gated_delta_rule",
        lambda rule, channels: isinstance(rule.bias, L2) and not _early(rule) and not channels,
        lambda rule, x: {**_delta(rule, x), "g": x["log_alpha"][..., 0]},
        widest=256,
    ),
    Kernel(
        "kda.chunk_kda",
        lambda rule, channels: isinstance(rule.bias, L2) and not _early(rule) and channels == {"log_alpha"},
        lambda rule, x: {**_delta(rule, x), "g": x["log_alpha"]},
        widest=256,
    ),
    Kernel(
        "comba.chunk_comba",
        lambda rule, channels: rule.bias in (L2(), Erase(along="key")) and _early(rule) and not channels,
        lambda rule, x: {**_delta(rule, x), "p": x["erase"], "g": x["log_alpha"][..., 0]},
        widest=256,
    ),
    Kernel("generalized_delta_rule.chunk_dplr_delta_rule", lambda rule, channels: True, _low_rank, widest=256),
)
# Arguments that stay in float32; the others are operands of products.
GATES = ("g", "gk", "beta", "lamb")


def refuses(rule: Rule, gates: Gates | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> str | None:
    """Why this engine cannot run a rule (with these gates, keys and values), or None."""
    channels = exact.channel_gates(rule, gates)
    return _unsuited(rule, channels) or _unavailable(tokens) or _too_wide(rule, channels, tokens)


def _unsuited(rule: Rule, channels: set[str]) -> str | None:
    if rule.chunk != 1 or not isinstance(rule.memory, Linear):
        return f"it is for linear memories at chunk 1, not {rule.memory} at chunk {rule.chunk}"
    if not isinstance(rule.algorithm, GradientDescent | Implicit | LeastSquares) or rule.window > 1:
        return f"it has no kernel for {rule.algorithm} with window={rule.window}"
    if not isinstance(rule.bias, Dot | L2 | Erase) or rule.bias.clip:
        return f"it has no kernel for {rule.bias}"
    if not isinstance(rule.retention, EuclideanRetention):
        return f"its kernels decay one side of the memory, not as {rule.retention}"
    if reason := exact.off_home(rule):
        return reason
    if rule.first_order and not isinstance(rule.bias, Dot):
        return "its derivative is of second order"
    if rule.read_at == "before":
        return "its kernels read after they have written"
    return "it needs gates per head or per key channel" if channels and rule.memory.gated != "keys" else None


def _too_wide(rule: Rule, channels: set[str], tokens: tuple[Tensor, Tensor] | None) -> str | None:
    if tokens is None:
        return None
    kernel, (d_k, d_v) = _kernel(rule, channels), (x.shape[-1] for x in tokens)
    widest, square = kernel.widest or d_k, len(kernel.states) > 1
    if d_k <= widest and (d_k == d_v or not square):
        return None
    return f"{kernel.name} takes d_k up to {widest}{' and d_v = d_k' if square else ''}, not {d_k} and {d_v}"


def _kernel(rule: Rule, channels: set[str]) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.suits(rule, channels))


def _unavailable(tokens: tuple[Tensor, Tensor] | None) -> str | None:
    if tokens is None or not tokens[1].is_cuda:
        return "it needs tensors on a GPU"
    if not INSTALLED:
        return "it needs flash-linear-attention: pip install fla-core"
    if not torch.is_autocast_enabled("cuda"):
        return "its products are in 16 bits, so it needs torch.autocast('cuda', torch.bfloat16)"
    return None


def load(name: str) -> Callable[..., Any]:
    """A kernel by its `Kernel.name`; the first one imports fla, which takes seconds."""
    package, function = name.split(".")
    return getattr(importlib.import_module(f"fla.ops.{package}"), function)


def run(rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Gates, where: Layout) -> tuple[Tensor, State]:
    """Same contract as the chunk engine's `run`."""
    kernel = _kernel(rule, exact.channel_gates(rule, gates))
    x = _inputs(rule, {"q": q, "k": k, "v": v, **gates}, where)
    if state.home:
        q, erase, v = (x[name].transpose(1, 2) for name in ("q", "erase", "v"))
        x["v"] = exact.from_home(rule, state.home, erase, v).transpose(1, 2)
    dtype, low = q.dtype, operand_dtype(q)
    arguments = kernel.arguments(rule, x | state.slow)
    arguments = {n: a.to(low) if isinstance(a, Tensor) and n not in GATES else a for n, a in arguments.items()}
    start = {argument: _turned(n, state.dual[n]) for n, argument in kernel.states}
    cu_seqlens = F.pad(where.count.cumsum(0), (1, 0)) if where.packed else None
    y, *ends = load(kernel.name)(**arguments, **start, output_final_state=True, cu_seqlens=cu_seqlens)
    if state.home:
        y = y.to(dtype) + mv(state.home["w"], q).transpose(1, 2)
    last = dict(zip(dict(kernel.states), ends, strict=True))
    dual = {n: _turned(n, last[n]) for n in state.dual}
    return y.to(dtype), replace(state, dual=dual, origin=dual)


def _inputs(rule: Rule, x: Inputs, where: Layout) -> Inputs:
    """Tokens and gates with those that only some rules have, and nothing in the holes."""
    if not where.dense and not where.packed:
        # A token of zeros decays nothing, writes nothing and reads nothing: no need to take the padding out.
        valid = where.valid[..., None, None]
        x = {n: torch.where(valid, t, 0.0) for n, t in x.items()}
    x["eta"] = exact.step_size(rule, x["eta"], x["k"])
    return {"log_alpha": torch.zeros_like(x["eta"][..., :1]), "erase": x["k"], "along": x["k"], **x}


def _turned(name: str, matrix: Tensor) -> Tensor:
    """Between our memory, values x keys, and fla's; what has keys on both sides stays."""
    return matrix.mT.contiguous() if name == "w" else matrix
