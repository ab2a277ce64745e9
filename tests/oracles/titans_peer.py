"""lucidrains' titans-pytorch, `NeuralMemory`, told our queries, keys, values, gates and initial memory.

What was matched (titans-pytorch 0.5.5), and how:

* Its projections and gates are replaced by look-ups into the tensors given; its norms in front of them by nothing. The
  sequence it is handed holds the tokens' numbers from 1; 0 is the empty token it pads queries with. All else is its
  own: the memory network, gradients by `torch.func`, the two associative scans, the renewal of weights, the read.
* Loss: mean over d of (M(k) - v)^2, ours 1/2 sum. Its learning rate is therefore eta d / 2, one for both matrices: ours
  is `rate="none"`.
* Decay: W_t = (1 - sigmoid(.)) W_{t-1} + m_t, to zero. Ours is alpha, and `to="zero"`.
* Momentum: m_t = sigmoid(.) m_{t-1} - grad; ours is theta, S = -m, with no factor on the gradient but eta.
* Chunks: its `batch_size` is our chunk, the tokens whose gradients are taken at the same weights. Its `chunk_size` is a
  number of tokens whose gradients are summed to one step with one decay and one momentum; we have 1. (With more, token
  t reads W_{floor((t + 1) / chunk_size)}; with 1 that is: written, then read.)
* Memory: x + LN(gelu(x A) B) (1 + gamma), with A = W2^T, B = W1^T and erf's gelu. There gamma is learned in the inner
  loop too; here it is taken out of its parameters and is our slow scale, less 1. It has no shift.
* Atlas: `spectral_norm_surprises` orthogonalises m by Muon's quintic, over max(|m|_F, 1e-7), and nothing scales it
  afterwards, so eta is 1; the window's tokens are the `num_kv_per_token` pairs that one token may store, gamma their
  learning rates, 0 before the first token.
* Heads: one at a time, for the scale is one tensor for all that it runs. Queries are not gated, heads not mixed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.neural_memory import NeuralMemory, NeuralMemState
from torch import Tensor, nn


class LookUp(nn.Module):
    """A projection whose answer for token t of a row is known: answers [B, T, n]."""

    def __init__(self, answers: Tensor, shape: str = "tokens") -> None:
        super().__init__()
        self.answers = F.pad(answers, (0, 0, 1, 0))
        self.shape = shape

    def forward(self, numbers: Tensor) -> Tensor:
        found = self.answers[:, numbers[0, :, 0].long()]
        return {"tokens": found, "steps": found.flatten(1), "orders": found[None]}[self.shape]


def titans(inputs: dict[str, Tensor], chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Momentum, l_2, decay to zero, rate "none". See `bridge.oracle` for shapes; a `norm_shift` must be zero."""
    return _all_heads(inputs | {"gamma": inputs["eta"]}, chunk, 1, False)


def atlas(inputs: dict[str, Tensor], chunk: int, window: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Titans with the gradient of a window's loss, orthogonalised; eta must be 1."""
    assert (inputs["eta"] == 1).all(), "titans-pytorch scales gradients, not what has been orthogonalised"
    return _all_heads(inputs, chunk, window, True)


def _all_heads(inputs, chunk, window, orthogonal) -> tuple[Tensor, dict[str, Tensor]]:
    assert "norm_shift" not in inputs or not inputs["norm_shift"].any(), "titans-pytorch's norm has no shift"
    heads = [_head(inputs, chunk, window, orthogonal, h) for h in range(inputs["q"].shape[2])]
    return torch.stack([y for y, _ in heads], 2), {n: torch.stack([m[n] for _, m in heads], 1) for n in ("w1", "w2")}


def _head(inputs, chunk: int, window: int, orthogonal: bool, h: int) -> tuple[Tensor, dict[str, Tensor]]:
    (batch, time, _, d), w1, w2 = inputs["q"].shape, inputs["w1"], inputs["w2"]
    w1, w2 = (w[:, h] if w.dim() == 4 else w[h].expand(batch, -1, -1) for w in (w1, w2))

    # `NeuralMemory` tries the network in float32 when it is made.
    network = ResidualNorm(d, MemoryMLP(d, depth=2, expansion_factor=w1.shape[-1] / d))
    del network.norm.gamma
    network.norm.gamma = torch.zeros(d)
    memory = NeuralMemory(
        d,
        chunk_size=1,
        batch_size=chunk,
        num_kv_per_token=window,
        spectral_norm_surprises=orthogonal,
        model=network,
        mem_model_norm_add_residual=False,
        adaptive_step_transform=lambda step: step,
    ).double()
    network.norm.gamma = inputs["norm_scale"][h] - 1

    def recent(x: Tensor) -> Tensor:
        """The last tokens of each token's window, [B, T, window n]."""
        return F.pad(x, (0, 0, window - 1, 0)).unfold(1, window, 1).transpose(-1, -2).flatten(2)

    token = {n: inputs[n][:, :, h] for n in ("q", "k", "v", "log_alpha", "theta", "gamma")}
    memory.store_norm = memory.retrieve_norm = nn.Identity()
    memory.to_queries = LookUp(token["q"])
    memory.to_keys, memory.to_values = LookUp(recent(token["k"])), LookUp(recent(token["v"]))
    memory.to_adaptive_step = LookUp(recent(token["gamma"] * d / 2), "steps")
    memory.to_decay_factor = LookUp(torch.logit(-torch.expm1(token["log_alpha"])))
    memory.to_momentum = LookUp(torch.logit(token["theta"]), "orders")

    names = memory.memory_model_parameter_names  # the first matrix reads keys
    start = NeuralMemState(0, TensorDict(dict(zip(names, (w2.mT, w1.mT), strict=True))), None, None, None)
    numbers = torch.arange(1, time + 1, dtype=torch.float64)[:, None].expand(batch, time, d)
    y, state = memory(numbers, state=start)
    last = state.states[0]
    return y, {"w1": last[names[1]].mT, "w2": last[names[0]].mT}
