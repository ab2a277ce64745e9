"""flash-linear-attention's naive references, in float64 and with our conventions.

fla's own tests hold its kernels to these files. They are pure torch, but `import fla.ops` needs Triton, so they are
loaded by path; and they compute in float32, whatever they are given, so `Double` reads float64 wherever they say
float32. Adapters clone (some references write to their arguments), transpose states ([d_k, d_v] there, [d_v, d_k]
here) and undo the scale d_k^-0.5 of queries.

An adapter takes inputs {name: tensor}, q k [B, T, H, d_k], v [B, T, H, d_v], gates [B, T, H, 1 | d_k], the initial
memory w [B, H, d_v, d_k] or [H, d_v, d_k], and returns y [B, T, H, d_v] and the last memory.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Inputs = dict[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]


@functools.cache
def load(op: str) -> ModuleType:
    """fla/ops/<op>/naive.py, without its package."""
    found = importlib.util.find_spec("fla")
    assert found is not None and found.submodule_search_locations, "pip install fla-core"
    path = Path(found.submodule_search_locations[0], "ops", op, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{op.replace('/', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Double(TorchFunctionMode):
    """Within it float32 means float64: as a method, an argument and the default of new tensors."""

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def doubled(x):
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(doubled, args), **{n: doubled(x) for n, x in (kwargs or {}).items()})


def _call(op: str, function: str, *args, **kwargs):
    with Double():
        args = [x.clone() if isinstance(x, Tensor) else x for x in args]
        kwargs = {n: x.clone() if isinstance(x, Tensor) else x for n, x in kwargs.items()}
        return getattr(load(op), function)(*args, **kwargs)


def _start(x: Inputs, name: str = "w") -> Tensor:
    """An initial memory as fla has it, [B, H, d_k, d_v]."""
    return x[name].expand(len(x["q"]), *x[name].shape[-3:]).mT


def _unscaled(q: Tensor) -> Tensor:
    return q * q.shape[-1] ** 0.5


def _head_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _written(x: Inputs) -> Tensor:
    """Where the reference has no learning rate, the value carries it."""
    return x["v"] * x["eta"] if "eta" in x else x["v"]


def linear_attention(x: Inputs) -> Result:
    y, s = _call(
        *("linear_attn", "naive_recurrent_linear_attn", x["q"], x["k"], _written(x)),
        scale=1.0,
        initial_state=_start(x),
        output_final_state=True,
        normalize=False,
    )
    return y, {"w": s.mT}


def retention(x: Inputs) -> Result:
    """RetNet with its own decays, 1 - 2^(-5 - h) in head h; from an empty memory, without the last one."""
    y = _call("retention", "naive_retention", *_head_first(_unscaled(x["q"]), x["k"], _written(x)))
    return y.transpose(1, 2), {}


def simple_gla(x: Inputs) -> Result:
    """One decay a head and token."""
    y, s = _call(
        *("simple_gla", "naive_recurrent_simple_gla", x["q"], x["k"], _written(x), x["log_alpha"][..., 0]),
        scale=1.0,
        initial_state=_start(x),
    )
    return y, {"w": s.mT}


def retnet(x: Inputs) -> Result:
    """`simple_gla` with a constant decay, log_gamma [H, 1]."""
    return simple_gla(x | {"log_alpha": x["log_gamma"].expand(*x["q"].shape[:3], 1)})


def mamba2(x: Inputs) -> Result:
    """`simple_gla` with a step dt [B, T, H, 1] that also decays, times rate [H, 1]."""
    return simple_gla(x | {"log_alpha": -x["rate"] * x["dt"], "eta": x["dt"]})


def gla(x: Inputs) -> Result:
    """One decay a key channel."""
    y, s = _call(
        *("gla", "naive_recurrent_gla", _unscaled(x["q"]), x["k"], _written(x), x["log_alpha"].expand_as(x["k"])),
        initial_state=_start(x),
        output_final_state=True,
    )
    return y, {"w": s.mT}


def hgrn2(x: Inputs) -> Result:
    """`gla` whose keys are 1 - alpha."""
    return gla(x | {"k": 1 - x["log_alpha"].exp()})


def deltanet(x: Inputs) -> Result:
    parts = _head_first(_unscaled(x["q"]), x["k"], x["v"], x["eta"])
    y, s = _call("delta_rule", "delta_rule_recurrence", *parts, initial_state=_start(x))
    return y.transpose(1, 2), {"w": s.mT}


def _gated(x: Inputs, log_decay: Tensor) -> dict[str, Any]:
    """What fla's gated delta rules are called with beside q, k, v."""
    rest = {"scale": 1.0, "initial_state": _start(x), "output_final_state": True}
    return {"beta": x["eta"][..., 0], "g": log_decay, **rest}


def gated_deltanet(x: Inputs) -> Result:
    y, s = _call(
        *("gated_delta_rule", "naive_recurrent_gated_delta_rule", x["q"], x["k"], x["v"]),
        **_gated(x, x["log_alpha"][..., 0]),
    )
    return y, {"w": s.mT}


def homing_deltanet(x: Inputs) -> Result:
    """Home is a linear map: the memory learns what that does not know of a value, and answers the rest."""
    home = x["w"]
    known, answered = (torch.einsum("hvk,bthk->bthv", home, x[n]) for n in ("k", "q"))
    y, memory = gated_deltanet(x | {"v": x["v"] - known, "w": torch.zeros_like(home)})
    return y + answered, memory


def kda(x: Inputs) -> Result:
    y, s = _call(
        *("kda", "naive_recurrent_kda", x["q"], x["k"], x["v"]),
        **_gated(x, x["log_alpha"].expand_as(x["k"])),
    )
    return y, {"w": s.mT}


def comba(x: Inputs, function: str = "naive_chunk_comba", **chunk) -> Result:
    """erase [B, T, H, d_k] is its p. `naive_recurrent_comba` decays before it erases: another model."""
    y, s = _call(
        *("comba", function, x["q"], x["k"], x["v"], x["erase"]),
        **_gated(x, x["log_alpha"][..., 0]),
        **chunk,
    )
    return y, {"w": s.mT}


def rwkv7(x: Inputs) -> Result:
    """DPLR, S = diag(exp log_alpha) S + k v^T + beta (alpha^T S), with alpha = -erase, beta = along."""
    along = x["along"] * x["eta"] if "eta" in x else x["along"]
    parts = (_unscaled(x["q"]), x["k"], _written(x), -x["erase"], along, x["log_alpha"].expand_as(x["k"]))
    y, s = _call("generalized_delta_rule/dplr", "dplr_recurrence", *_head_first(*parts), initial_state=_start(x))
    return y.transpose(1, 2), {"w": s.mT}


def delta_product(x: Inputs) -> Result:
    """k, v, eta are [B, n T, H, .]: n steps a token, one decay before them."""
    y, s = _call(
        *("gated_delta_product", "naive_recurrent_gated_delta_product", x["q"], x["k"], x["v"]),
        g=x["log_alpha"][..., 0],
        beta=x["eta"][..., 0],
        scale=1.0,
        initial_state=_start(x),
        output_final_state=True,
        num_householder=x["k"].shape[1] // x["q"].shape[1],
    )
    return y, {"w": s.mT}


def momentum(x: Inputs) -> Result:
    """M = theta M + eta k (k^T S - v)^T, S = alpha S - beta M with beta = 1 and the key as its own erase key."""
    start = {"initial_S": _start(x), "initial_M": _start(x, "s")}
    y, both = _call(
        *("momentum_delta_rule", "recurrent_momentum_delta_rule_ref", x["q"], x["k"], x["v"]),
        log_alpha=x["log_alpha"][..., 0],
        log_mu=x["theta"][..., 0].log(),
        p=x["k"],
        beta=torch.ones_like(x["eta"][..., 0]),
        eta=x["eta"][..., 0],
        scale=1.0,
        output_final_state=True,
        **start,
    )
    return y, {"w": both[0].mT, "s": both[1].mT}


def mesa(x: Inputs) -> Result:
    """By `torch.linalg.solve`, not by conjugate gradients. d_v = d_k; h, of keys only, is not transposed."""
    gates = (x["log_alpha"][..., 0], x["ridge"], x["eta"][..., 0])
    start = {"h_kk_init": _start(x, "h").mT, "h_kv_init": _start(x)}
    y, h, s = _call("mesa_net", "naive_mesa_net_exact", x["q"], x["k"], x["v"], *gates, **start)
    return y, {"w": s.mT, "h": h}


def ttt_linear(x: Inputs, chunk: int) -> Result:
    """W_j = W_0 - rho_j sum_{i <= j} grad l_i(W_0): the learning rate is the query row's, no key has one of its own.

    Reads z + LN(z), z = W_j q + b_j. A last mini-batch that is not full spoils the bias it returns.
    """
    y, s, b = _call(
        *("ttt", "chunk_ttt_linear_ref", x["q"], x["k"], x["v"], x["norm_scale"], x["norm_shift"], x["rho"]),
        scale=1.0,
        mini_batch_size=chunk,
        initial_state=_start(x),
        initial_state_bias=_start(x, "b"),
        output_final_state=True,
    )
    return y, {"w": s.mT, "b": b.mT}
