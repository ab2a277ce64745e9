"""From tokens to logits on one page: a Llama-style stack whose attention is replaced by mixers, one per layer.

    x = embed(tokens);   x = x + mix(norm(x)), x = x + mlp(norm(x))  per block;   logits = norm(x) embed^T

Initialisation: linear maps and embeddings normal with std 0.02, those that write into the stream 0.02 / sqrt(2 layers);
norms 1; memories and gates as `MirasLayer` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.engines import Engine
from miras.errors import UsageError
from miras.layer import LayerState, MirasLayer
from miras.layout import Layout, layout
from miras.mixer import Mixer
from miras.pointwise import ShortConv
from miras.sources import Eraser, GateConstant, GateMaker, Sources, TimeStep

INIT_STD = 0.02


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_in x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.gate_in(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """One layer of the stack: a mixer, then a SwiGLU, each on the normalised stream and added to it."""

    def __init__(self, mixer: MirasLayer, dim: int, hidden: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(dim, eps=1e-6), mixer
        self.mlp_norm, self.mlp = nn.RMSNorm(dim, eps=1e-6), SwiGLU(dim, hidden)

    def forward(
        self, x: Tensor, state: LayerState | None, where: Layout, engine: str | Engine
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, D] and the layer's state -> x [B, T, D] and its state."""
        y, after = self.mixer(self.mixer_norm(x), state, where=where, engine=engine)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), after


class Backbone(nn.Module):
    """Tokens to normalised hidden states.

    Args:
        vocab: number of tokens.
        dim: size D of the stream.
        heads: heads of each mixer.
        hidden: hidden size of each SwiGLU.
        mixers: one per layer; hybrids are just lists.
        gates, gate_rank, conv, rope, context: see `MirasLayer`.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        heads: int,
        hidden: int,
        mixers: Sequence[Mixer],
        gates: Any = "head",
        gate_rank: int = 32,
        conv: int = 4,
        rope: bool = False,
        context: int = 2048,
    ) -> None:
        super().__init__()
        layers = [MirasLayer(dim, heads, m, None, gates, gate_rank, conv, rope, context) for m in mixers]
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(layer, dim, hidden) for layer in layers)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.engine: str | Engine = "auto"
        # Hugging Face's trainer sets these two.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None
        self.apply(lambda module: init_module(module, len(mixers)))

    def compile_layers(self) -> None:
        """Compile each layer, once for all that are alike: less to compile than the whole model, and as fast."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def forward(
        self, x: Tensor, states: Sequence[LayerState | None] | None = None, where: Layout | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Tokens int [B, T], or embeddings [B, T, D], and one state per layer -> hidden [B, T, D] and the states."""
        if states is not None and len(states) != len(self.blocks):
            raise UsageError(f"Backbone: expected {len(self.blocks)} states, one per layer, got {len(states)}.")
        where = where or layout(x.shape[0], x.shape[1], device=x.device)
        x = x if x.is_floating_point() else self.embed(x)
        after = []
        for i, block in enumerate(self.blocks):
            args = (x, None if states is None else states[i], where, self.engine)
            if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
                x, state = self._gradient_checkpointing_func(block.__call__, *args)
            else:
                x, state = block(*args)
            after.append(state)
        return self.norm(x), after


class Miras(nn.Module):
    """A language model in plain PyTorch: `Backbone` and an output layer that shares its embedding. Arguments alike."""

    def __init__(self, vocab: int, dim: int, heads: int, hidden: int, mixers: Sequence[Mixer], **options: Any) -> None:
        super().__init__()
        self.backbone = Backbone(vocab, dim, heads, hidden, mixers, **options)

    def forward(
        self, tokens: Tensor, states: Sequence[LayerState | None] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Tokens int [B, T] -> logits [B, T, vocab] and one state per layer."""
        hidden, after = self.backbone(tokens, states)
        return F.linear(hidden, self.backbone.embed.weight), after


@torch.no_grad()
def init_module(module: nn.Module, layers: int) -> None:
    """Initialise one module as the head of this file says."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    elif isinstance(module, MirasLayer | ShortConv | GateMaker | GateConstant | TimeStep | Eraser | Sources):
        module.reset_parameters()
    if isinstance(module, SwiGLU | MirasLayer):
        # Children come first in `apply`, so this is the last word on the maps that write into the stream.
        nn.init.normal_(module.out.weight, std=INIT_STD / math.sqrt(2 * layers))
