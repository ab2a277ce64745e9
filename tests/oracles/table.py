"""Which independent implementation each preset is held to.

    y, memory = ORACLES[name].call(inputs, **constants)

inputs {name: float64 tensor}: tokens' tensors [B, T, H, n], initial memories [B, H, o, i] or [H, o, i], vectors of a
head [H, n]. y is [B, T, H, d_v]; memory {name: [B, H, o, i]} is what is left after the last token. Both are
differentiable by torch, once, with respect to every input. Queries are not scaled; a token is written, then read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from oracles import fla_naive, numpy_loops, softmax_peer
from oracles.bridge import oracle
from oracles.numpy_loops import TOKENS
from torch import Tensor

Call = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Oracle(NamedTuple):
    """A row of the table.

    Attributes:
        by: the implementation, in one line.
        call: see above.
        inputs: names, those that the loop can do without in brackets; "log_alpha:k" may be per key channel.
        conventions: what had to be matched.
        peer: a second implementation, equal to 1e-12 with all its gradients (`test_oracles_agree.py`).
        constants: arguments of `call`, with values that a test may use.
        steps: k, v and eta have that many tokens for each query.
    """

    by: str
    call: Call
    inputs: str
    conventions: str
    peer: Call | None = None
    constants: Mapping[str, object] = MappingProxyType({})
    steps: int = 1

    def names(self, least: bool = False) -> list[str]:
        """Of all inputs, or of those that cannot be left out."""
        return [n.strip("[]").split(":")[0] for n in self.inputs.split() if not (least and n.startswith("["))]

    def draw(
        self, batch: int = 2, time: int = 13, heads: int = 2, d: int = 4, wider: int = 1, expansion: int = 2
    ) -> dict[str, Tensor]:
        """Random inputs; values are `wider` than keys wherever the model permits."""
        both = {"w1", "w2"} <= set(self.names()) and "log_alpha:k" in self.inputs  # one gate for channels of either
        d_v = d if both or {"h", "norm_scale"} & set(self.names()) else d + wider
        hidden, drawn = expansion * d_v, {}
        sizes = {"q": d, "k": d, "erase": d, "along": d, "ridge": d}
        sizes |= {"v": d_v, "log_beta": d_v, "norm_scale": d_v, "norm_shift": d_v}
        matrices = {"w": (d_v, d), "s": (d_v, d), "h": (d, d), "b": (d_v, 1), "b1": (d_v, 1), "b2": (hidden, 1)}
        matrices |= {"w1": (d_v, hidden), "w2": (hidden, d), "w3": (hidden, d)}
        for entry in self.inputs.split():
            name, _, channels = entry.strip("[]").partition(":")
            width = d if channels else sizes.get(name, 1)
            if name in TOKENS:
                shape = (batch, time * self.steps if name in ("k", "v", "eta") else time, heads, width)
            else:
                shape = (heads, *matrices.get(name, (width,)))
            drawn[name] = _value(name, shape)
        return drawn


def _value(name: str, shape: tuple[int, ...]) -> Tensor:
    normal, uniform = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    if name in ("q", "k", "erase"):
        return F.normalize(normal, dim=-1)
    if name.startswith("log_"):
        return -uniform
    if name in ("ridge", "delta"):
        return 0.5 + uniform
    if name == "norm_scale":
        return 1 + 0.2 * normal
    if name == "h":
        return torch.eye(shape[-1], dtype=torch.float64) + normal @ normal.mT
    if name in ("eta", "theta", "rho", "gamma", "dt", "rate"):
        return 0.1 + 0.4 * uniform
    return normal / 2 if name in ("along", "w1", "b", "b1", "b2", "norm_shift") else normal


LOOPS = {n: oracle(getattr(numpy_loops, n)) for n in numpy_loops.LOOPS}
BARE = "q k v eta log_alpha:k w1 w2"
DEEP = BARE + " norm_scale norm_shift"
MINI_BATCHES = (
    "eta belongs to the key, rho to the query; rho of the j-th token of a mini-batch is ttt-lm's learned 1/j, its eta "
    "base_lr sigmoid(.)/d; target v - k and output q + LN(f(q)) are those of the memory x + LN(f(x)); biases are "
    "columns [d, 1]; LN's eps is 1e-6 there, an argument here"
)
DECAYS = "`to`: decay to the initial memory (which is then subtracted from what is returned) or to zero"

ORACLES = {
    "linear_attention": Oracle(
        "fla naive_recurrent_linear_attn, in float64",
        fla_naive.linear_attention,
        "q k v [eta] w",
        "no normaliser (fla's layer has one by default); eta on the value",
        LOOPS["linear_attention"],
    ),
    "retnet": Oracle(
        "fla naive_recurrent_simple_gla, in float64",
        fla_naive.retnet,
        "q k v [eta] log_gamma w",
        "log_gamma [H, 1] is the head's constant log decay: log(1 - 2^(-5 - h)); fla's naive_retention has just these",
        LOOPS["retnet"],
    ),
    "lightning": Oracle(
        "fla naive_recurrent_simple_gla, in float64",
        fla_naive.retnet,
        "q k v [eta] log_gamma w",
        "as retnet; fla's lightning_attn has log_gamma = -8 h / H (1 - layer / layers)",
        LOOPS["retnet"],
    ),
    "gla": Oracle(
        "fla naive_recurrent_gla, in float64",
        fla_naive.gla,
        "q k v [eta] log_alpha:k w",
        "eta on the value",
        LOOPS["gla"],
    ),
    "mamba2": Oracle(
        "fla naive_recurrent_simple_gla, in float64",
        fla_naive.mamba2,
        "q k v dt rate w",
        "C, B, x, dt, -A are q, k, v, dt, rate [H, 1]; in gates: log_alpha = -rate dt, eta = dt; no D, no z",
        LOOPS["mamba2"],
    ),
    "hgrn2": Oracle(
        "fla naive_recurrent_gla, in float64",
        fla_naive.hgrn2,
        "q v [eta] log_alpha:k w",
        "the key is 1 - alpha",
        LOOPS["hgrn2"],
    ),
    "dfw": Oracle(
        "a NumPy token loop",
        LOOPS["dfw"],
        "q k v [eta] log_alpha:k log_beta w",
        "alpha decays key columns, beta value rows; with beta = 1 it is fla's gla",
    ),
    "deltanet": Oracle(
        "fla delta_rule_recurrence, in float64",
        fla_naive.deltanet,
        "q k v eta w",
        "eta is beta; nothing is normalised inside",
        LOOPS["deltanet"],
    ),
    "gated_deltanet": Oracle(
        "fla naive_recurrent_gated_delta_rule, in float64",
        fla_naive.gated_deltanet,
        "q k v eta log_alpha w",
        "eta is beta, log_alpha is g; the error at the decayed memory",
        LOOPS["gated_deltanet"],
    ),
    "homing_deltanet": Oracle(
        "fla naive_recurrent_gated_delta_rule with v - W_0 k for v and W_0 q added, in float64",
        fla_naive.homing_deltanet,
        "q k v eta log_alpha w",
        "as gated_deltanet; the initial memory is subtracted from what is returned",
        LOOPS["homing_deltanet"],
    ),
    "longhorn": Oracle(
        "a NumPy token loop",
        LOOPS["longhorn"],
        "q k v eta w",
        "the exact implicit step eta / (1 + eta |k|^2), not the diagonal one of the published code; with that step as "
        "its eta it is fla's delta rule",
    ),
    "rwkv7": Oracle(
        "fla dplr_recurrence, in float64",
        fla_naive.rwkv7,
        "q k v [eta] log_alpha:k erase along w",
        "erase = kk, along = a (.) kk, that is alpha = -erase, beta = along there; r is q; the error at the memory "
        "before decay; eta, which RWKV-7 has not, scales both terms",
        LOOPS["rwkv7"],
    ),
    "delta_product": Oracle(
        "fla naive_recurrent_gated_delta_product, in float64",
        fla_naive.delta_product,
        "q k v eta log_alpha w",
        "k, v, eta [B, n T, H, .], one decay before a token's n steps",
        LOOPS["delta_product"],
        steps=2,
    ),
    "ttt_linear": Oracle(
        "a NumPy token loop, equal to fla's chunk_ttt_linear_ref but for its read and learning rate",
        LOOPS["ttt_linear"],
        "q k v eta rho w b norm_scale norm_shift",
        MINI_BATCHES,
        constants={"chunk": 4},
    ),
    "ttt_mlp": Oracle(
        "a NumPy token loop",
        LOOPS["ttt_mlp"],
        "q k v eta rho w1 b1 w2 b2 norm_scale norm_shift",
        MINI_BATCHES + "; gelu by tanh; ttt-lm's first layer (W1, b1) is w2, b2 here",
        constants={"chunk": 4},
    ),
    "titans": Oracle(
        "a NumPy token loop, equal to titans-pytorch's NeuralMemory where that decays to zero at rate 'none'",
        LOOPS["titans"],
        DEEP + " theta",
        DECAYS + "; see titans_peer.py",
        constants={"chunk": 3, "to": "initial", "rate": "input"},
    ),
    "moneta": Oracle(
        "a NumPy token loop",
        LOOPS["moneta"],
        DEEP,
        DECAYS,
        constants={"chunk": 3, "to": "initial", "rate": "input"},
    ),
    "yaad": Oracle(
        "a NumPy token loop",
        LOOPS["yaad"],
        DEEP + " delta",
        DECAYS + "; the letter's loss is the loop yaad_mixture",
        constants={"chunk": 3, "to": "initial", "rate": "input"},
    ),
    "memora": Oracle(
        "a NumPy token loop",
        LOOPS["memora"],
        DEEP,
        DECAYS,
        constants={"chunk": 3, "to": "initial", "rate": "input"},
    ),
    "mneme": Oracle(
        "a NumPy token loop",
        LOOPS["mneme"],
        BARE + " delta",
        DECAYS,
        constants={"chunk": 3, "to": "initial", "rate": "input"},
    ),
    "transformer": Oracle(
        "PyTorch's SDPA with transformers' rotary positions",
        softmax_peer.attention,
        "q k v",
        "scale d^-0.5, positions from 0, pairs (j, j + d/2), base 10000; no memory is returned",
        LOOPS["attention"],
    ),
    "sliding_window": Oracle(
        "PyTorch's SDPA with transformers' rotary positions",
        softmax_peer.attention,
        "q k v",
        "as transformer; `window` counts the present token",
        LOOPS["attention"],
        constants={"window": 5},
    ),
    "comba": Oracle(
        "fla naive_chunk_comba, in float64",
        fla_naive.comba,
        "q k v eta log_alpha erase w",
        "erase is p, eta is beta; the error at the memory before decay (naive_recurrent_comba is wrong); q is already "
        "the layer's corrected q - d k",
        LOOPS["comba"],
    ),
    "kda": Oracle(
        "fla naive_recurrent_kda, in float64",
        fla_naive.kda,
        "q k v eta log_alpha:k w",
        "eta is beta; the error at the decayed memory",
        LOOPS["kda"],
    ),
    "mesa": Oracle(
        "fla naive_mesa_net_exact, in float64",
        fla_naive.mesa,
        "q k v eta log_alpha ridge w h",
        "w = G (sum of eta v k^T), h = H (sum of eta k k^T); ridge [H, d_k] is added to H's diagonal; d_v = d_k",
        LOOPS["mesa"],
    ),
    "atlas": Oracle(
        "a NumPy token loop, equal to titans-pytorch's NeuralMemory with spectral_norm_surprises",
        LOOPS["atlas"],
        "q k v eta log_alpha theta gamma w1 w2 norm_scale norm_shift",
        "gamma belongs to the token in the window, eta scales what has been orthogonalised (1 in titans-pytorch), eps "
        "is added to the Frobenius norm; with w for w1 and w2 the memory is linear; " + DECAYS,
        constants={"window": 3, "chunk": 1, "to": "zero"},
    ),
    "lact": Oracle(
        "a NumPy token loop",
        LOOPS["lact"],
        "q k v eta [theta] w1 w2 w3",
        "LaCT's w0, w1, w2 are w3, w1, w2; one eta for all three; one momentum a chunk, the mean of theta; memory "
        "returned before its rows are scaled; eps, 1e-5 there, is 0 in the comparison",
        constants={"chunk": 4},
    ),
}
