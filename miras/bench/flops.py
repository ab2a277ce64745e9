"""Useful floating-point operations and bytes by formula, per token.

Counted are matrix products, a multiplication with its addition as 2; element-wise work is not. A backward pass has two
products for each of the forward pass, but of first order one for predict and pullback, whose weights are constants to
it. What an engine computes again counts once.

The forward pass of a layer of size D with H heads of d, inner size I = H d:

    maps      2 D I (1 + keys + values) for q, k, v, 2 I D out, 2 D I output gate, twice the entries of the gates' maps

A head's memory with matrices of o x i, in all P entries, P_k of them in matrices that read the key, in chunks of C:

    predict   2 P                 M(W_o, k)
    pullback  2 (P - P_k)         the gradient through the outer matrices
    step      2 P (1 + slots)     sum of the chunk's outer products, for the dual and each slot of the algorithm
    read      2 P bases           bases = 1 + slots, + 1 with a home or a link that is linearised at the chunk's origin
    pairs     2 (o + i) (C + 1)/2 for each matrix: scores with the chunk's earlier tokens and their sum

Slots are those that a chunk hands on; the ones that are zero again where a chunk begins are no matrices to it.

An MLP of expansion e has P = 2 e d^2, P_k = e d^2, a SwiGLU P = 3 e d^2, P_k = 2 e d^2. With chunk 1 the weights are
written out after each token: bases is 1 and there are no pairs; so with `link_at="token"` and a link that is no
identity. Several steps a token, windows and `Erase` multiply predict, pullback, step and pairs by their number. A
gradient at the decayed memory needs predict and pullback once more for a home.

Attention: the maps, and 4 I (T + 1)/2 for scores and sum, with a window 4 I times the mean number of tokens seen.

`dense=True` counts the masked half of pairs too (C for (C + 1)/2), as PyTorch's `FlopCounterMode` does, and where each
token's weights are written out, 2 P C for the chunk engine's sum of them.

Bytes are those of the same products, each taking its operands from memory and leaving its result there, 4 bytes a
number: a matrix is moved once a chunk, vectors once a token. It is what the products cost without a cache, and without
the element-wise passes between them. At chunk 1 there is none: the engine for it works on tiles of its own.
"""

from __future__ import annotations

import torch

from miras.algorithm import LeastSquares, LinearAlgorithm
from miras.attention import Attention
from miras.bench.sizes import Sizes
from miras.bias import Erase
from miras.layer import MirasLayer
from miras.memory import MLP, Linear, SwiGLU
from miras.mixer import Mixer
from miras.retention import EuclideanRetention, MirrorRetention, TwoSided
from miras.rule import Rule

BACKWARD = 2.0
"""Products of the backward pass for one of the forward pass."""

NUMBER = 4
"""Bytes of a float32."""


def layer_flops(mixer: Mixer, sizes: Sizes, dense: bool = False) -> dict[str, float] | None:
    """FLOPs of one token of a layer by part, or None where there is no formula.

    Args:
        mixer: a `Rule` with the memory `MLP`, `SwiGLU` or `Linear`, or `Attention`.
        sizes: dim, heads, time, gates, and whether there is a backward pass; the chunk is the rule's own.
        dense: count the masked half of pair products too.
    """
    parts = _attention(mixer, sizes, dense) if isinstance(mixer, Attention) else _memory(mixer, dense, sizes)
    if parts is None:
        return None
    constant = ("predict", "pullback") if isinstance(mixer, Rule) and mixer.first_order else ()
    parts = {"maps": _maps(mixer, sizes), **parts}
    return {name: (_passes(sizes) - sizes.backward * (name in constant)) * count for name, count in parts.items()}


def model_flops(mixers: list[Mixer], sizes: Sizes, hidden: int, vocab: int) -> float | None:
    """FLOPs of one token of a model: layers, of the forward pass a SwiGLU's 6 D hidden each, the logits' 2 D vocab."""
    found = [layer_flops(mixer, sizes) for mixer in mixers]
    if any(parts is None for parts in found):
        return None
    layers = sum(sum(parts.values()) for parts in found if parts)
    return layers + _passes(sizes) * (6 * sizes.dim * hidden * len(mixers) + 2 * sizes.dim * vocab)


def layer_bytes(mixer: Mixer, sizes: Sizes) -> dict[str, float] | None:
    """Bytes of one token of a layer by part, or None where there is no formula; a backward pass moves twice as many."""
    if not isinstance(mixer, Rule) or not _known(mixer) or mixer.chunk == 1:
        return None
    leaves, chunk = _shapes(mixer, sizes), mixer.chunk
    slots, bases = _slots(mixer), _bases(mixer)

    def products(shapes: list[tuple[int, int]], passes: float = 1) -> float:
        return sum(passes * o * i / chunk + o + i for o, i in shapes)

    parts = {
        "predict": products(leaves),
        "pullback": products(_outer(mixer, sizes)),
        # The old matrix, and the new one.
        "step": (1 + slots) * products(leaves, 2),
        "read": bases * products(leaves),
        "pairs": sum(2 * (o + i + chunk) for o, i in leaves),
    }
    parts = {name: sizes.heads * count for name, count in parts.items()}
    # Each map's matrix once a call; x three times, q, k, v, gate, y in and out.
    parts = {"maps": _maps(mixer, sizes) / 2 / sizes.tokens + 9 * sizes.dim, **parts}
    return {name: _passes(sizes) * NUMBER * count for name, count in parts.items()}


def _passes(sizes: Sizes) -> float:
    """Forward, and backward if there is one, in units of the forward pass."""
    return 1 + BACKWARD * sizes.backward


def _maps(mixer: Mixer, sizes: Sizes) -> float:
    gates = "head" if isinstance(mixer, Attention) else sizes.gates
    with torch.device("meta"):
        layer = MirasLayer(sizes.dim, sizes.heads, mixer, gates=gates)  # type: ignore[arg-type]
    # Biases and rates of gates are no products, the short convolution is element-wise work.
    maps = [p for n, p in layer.named_parameters() if n.endswith("weight") and not n.startswith(("norm", "conv"))]
    return 2.0 * sum(p.numel() for p in maps)


def _attention(mixer: Attention, sizes: Sizes, dense: bool) -> dict[str, float]:
    time, window = sizes.time, min(mixer.window or sizes.time, sizes.time)
    seen = (window * (window + 1) / 2 + (time - window) * window) / time
    return {"pairs": 4.0 * sizes.dim * (time if dense else seen)}


def _known(rule: Rule) -> bool:
    return (
        type(rule.memory) in (MLP, SwiGLU, Linear)
        and isinstance(rule.algorithm, LinearAlgorithm)
        and not isinstance(rule.algorithm, LeastSquares)
        and isinstance(rule.retention, MirrorRetention | TwoSided)
        and rule.step_at == "token"
    )


def _shapes(rule: Rule, sizes: Sizes) -> list[tuple[int, int]]:
    return [(leaf.rows, leaf.cols) for leaf in rule.leaves(sizes.head_dim, sizes.head_dim).values()]


def _outer(rule: Rule, sizes: Sizes) -> list[tuple[int, int]]:
    """The matrices that do not read the key: all but the last, or, where that has a gate, the last two."""
    return _shapes(rule, sizes)[: -2 if isinstance(rule.memory, SwiGLU) else -1]


def _slots(rule: Rule) -> int:
    """Slots that outlast a chunk."""
    return 0 if rule.algorithm.resets else rule.algorithm.slots


def _bases(rule: Rule) -> int:
    """Matrices that a read combines."""
    if rule.chunk == 1:
        return 1
    linearised = not isinstance(rule.retention, EuclideanRetention)
    if linearised and rule.link_at == "token":
        return 1
    return 1 + _slots(rule) + (linearised or rule.retention.to == "initial")


def _memory(mixer: Mixer, dense: bool, sizes: Sizes) -> dict[str, float] | None:
    if not isinstance(mixer, Rule) or not _known(mixer):
        return None
    shapes, chunk = _shapes(mixer, sizes), mixer.chunk
    entries, outer = (sum(o * i for o, i in matrices) for matrices in (shapes, _outer(mixer, sizes)))
    erase = isinstance(mixer.bias, Erase)
    times = mixer.algorithm.steps * mixer.window * (2 if erase else 1)
    seen = chunk if dense else (chunk + 1) / 2
    # At the decayed memory the home is a matrix of its own.
    anchors = 2 if mixer.gradient_at == "decayed" and mixer.retention.to == "initial" and chunk > 1 else 1
    written_out = mixer.link_at == "token" and not isinstance(mixer.retention, EuclideanRetention)
    pair = 2 * entries * dense if written_out else sum(2 * (o + i) for o, i in shapes)
    parts = {
        "predict": 2 * entries * anchors * times,
        "pullback": 2 * outer * anchors * times,
        "step": 2 * entries * (1 + _slots(mixer)) * times,
        "read": 2 * entries * _bases(mixer),
        "pairs": pair * seen * times if chunk > 1 else 0,
    }
    return {name: float(sizes.heads * count) for name, count in parts.items()}
