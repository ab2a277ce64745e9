"""MirasLayer, [B, T, D] -> [B, T, D]: projections, gates and norms around a mixer (arXiv 2504.13173, section 5.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miras.attention import Attention, CacheState, rotate
from miras.engines import Engine, run
from miras.errors import UsageError
from miras.layout import Layout, layout
from miras.mixer import Mixer
from miras.pointwise import GatedNorm, ShortConv, to_norm
from miras.rule import Rule, State
from miras.sources import Sources
from miras.state import BatchState


@dataclass(frozen=True)
class LayerState(BatchState):
    """State of a layer.

    Attributes:
        mixer: the mixer's own state.
        conv: the last inputs of the short convolution, [B, width - 1, channels]; None without one.
        position: tokens seen, int64 [B].
    """

    mixer: State | CacheState
    conv: Tensor | None
    position: Tensor


class MirasLayer(nn.Module):
    """A sequence layer around a mixer: q, k, v by linear maps, short convolution and SiLU, unit-norm q and k, the gates
    that the rule declares, the memory, a norm per head and an output gate. Around `Attention` only the linear maps
    stay.

    Args:
        dim: size D of input and output.
        heads: number of heads H.
        rule: a `Rule` or `Attention`.
        head_dim: size of each head; None: dim / heads.
        gates: "head", one value per head, or "channel", the paper's low-rank channel gates.
        gate_rank: rank of channel gates.
        conv: width of the short convolution; 0: none.
        rope: rotate q and k by their position before a `Rule` (`Attention` has its own switch).
        context: longest time constant that retention starts with, in tokens.

    Raises:
        UsageError: sizes or choices that do not go together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        rule: Mixer,
        head_dim: int | None = None,
        gates: Literal["head", "channel"] = "head",
        gate_rank: int = 32,
        conv: int = 4,
        rope: bool = False,
        context: int = 2048,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise UsageError(f"MirasLayer: dim must be a multiple of heads, got {dim} and {heads}; or write head_dim=.")
        if gates not in ("head", "channel"):
            raise UsageError(f"MirasLayer: gates must be 'head' or 'channel', got {gates!r}.")
        self.rule, self.heads, self.head_dim, self.rope = rule, heads, head_dim or dim // heads, rope
        inner = heads * self.head_dim
        self.keys, self.values = self._projected(rule)
        self.qkv = nn.Linear(dim, (1 + self.keys + self.values) * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.memory, self.slow, self.gates = nn.ParameterDict(), nn.ParameterDict(), nn.ModuleDict()
        self.conv = self.norm = self.out_gate = None
        if isinstance(rule, Attention):
            return
        assert isinstance(rule, Rule)
        size = rule.inputs.value_size if rule.inputs.value == "normed" else 0.0
        self.value_norm = size * math.sqrt(self.head_dim)
        if conv:
            unit = (1 + self.keys) * inner
            self.conv = ShortConv(self.qkv.out_features, conv, unit, self.head_dim, self.value_norm)
        self.norm = GatedNorm(self.head_dim, eps=1e-6)
        self.out_gate = nn.Linear(dim, inner, bias=False)
        self.gates = Sources(rule, dim, heads, self.head_dim, gates, gate_rank, context)
        for name, leaf in rule.leaves(self.head_dim, self.head_dim).items():
            if leaf.std:
                self.memory[name] = nn.Parameter(torch.empty(heads, leaf.rows, leaf.cols))
        for name, (size, _) in rule.slow(self.head_dim, self.head_dim).items():
            self.slow[name] = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    @staticmethod
    def _projected(rule: Mixer) -> tuple[int, int]:
        """Keys and values that are made of each token."""
        if not isinstance(rule, Rule):
            return 1, 1
        steps = rule.algorithm.steps
        return (0 if rule.inputs.key == "forgotten" else steps), steps

    def reset_parameters(self) -> None:
        """Draw the initial memory; see `Leaf.std`. Linear maps keep PyTorch's initialisation unless a model sets it."""
        if not isinstance(self.rule, Rule):
            return
        with torch.no_grad():
            for name, value in self.rule.initial(self.heads, self.head_dim, self.head_dim).items():
                if name in self.memory:
                    self.memory[name].copy_(value)
            for name, value in self.rule.initial_slow(self.heads, self.head_dim, self.head_dim).items():
                self.slow[name].copy_(value)

    def init(self, rows: int, like: Tensor) -> State:
        """A fresh state of the rule for `rows` sequences, on the device of `like`, at least float32."""
        assert isinstance(self.rule, Rule)
        dtype = torch.promote_types(like.dtype, torch.float32)
        weights = {n: w.to(dtype) for n, w in self.memory.items()}
        for name, leaf in self.rule.leaves(self.head_dim, self.head_dim).items():
            if name not in weights:
                weights[name] = torch.zeros(self.heads, leaf.rows, leaf.cols, dtype=dtype, device=like.device)
        return self.rule.init(weights, {n: x.to(dtype) for n, x in self.slow.items()}, rows)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        where: Layout | None = None,
        engine: str | Engine = "auto",
    ) -> tuple[Tensor, LayerState]:
        """Mix along the sequence.

        Args:
            x: [B, T, D].
            state: where to go on from, as the last call returned it; None: from the start.
            mask: bool [B, T], false for padding on either side.
            cu_seqlens: int [N + 1], sequences packed into one row.
            where: the call's layout if already made (then mask and cu_seqlens are not looked at).
            engine: see `miras.run`.

        Returns:
            y [B, T, D] and the state after the last token of each sequence.

        Raises:
            UsageError: an input of another size, or a state of another kind of layer.
        """
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features or x.shape[1] == 0:
            raise UsageError(f"MirasLayer: expected x [batch, time, {self.qkv.in_features}], got {list(x.shape)}.")
        where = where or layout(x.shape[0], x.shape[1], mask, cu_seqlens, x.device)
        if state is not None and state.position.shape[0] != where.rows:
            raise UsageError(
                f"MirasLayer: the state has {state.position.shape[0]} rows, the input {where.rows} sequences."
            )
        qkv, conv = self.qkv(x), None
        if self.conv is not None:
            qkv, conv = self.conv(qkv, None if state is None else state.conv, where)
        # Several keys and values of a token stand side by side as tokens of their own.
        parts = qkv.unflatten(-1, (-1, self.heads, self.head_dim)).split([1, self.keys, self.values], 2)
        q, k, v = (x.flatten(1, 2) for x in parts)
        seen = torch.zeros_like(where.count) if state is None else state.position
        if isinstance(self.rule, Attention):
            y, inner = run(self.rule, q, k, v, state=state and state.mixer, where=where)
        else:
            y, inner = self._remember(x, q, k, v, state, seen, where, engine)
        return self.out(y.flatten(-2)), LayerState(inner, conv, seen + where.count)

    def _remember(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        seen: Tensor,
        where: Layout,
        engine: str | Engine,
    ) -> tuple[Tensor, Any]:
        if self.conv is None:
            q, k = to_norm(q, 1.0), to_norm(k, 1.0)
            v = to_norm(v, self.value_norm) if self.value_norm else v
        position = seen[where.row] + where.rank.clamp_min(0)
        if self.rope:
            q, k = rotate(q, position), rotate(k, position.repeat_interleave(max(self.keys, 1), 1))
        q, k, gates = self.gates(x, q, k if self.keys else None, position)
        before = state.mixer if state is not None else self.init(where.rows, v)
        y, inner = run(self.rule, q, k, v, gates, before, where=where, engine=engine)
        assert self.norm is not None and self.out_gate is not None
        return self.norm(y, self.out_gate(x).unflatten(-1, (self.heads, -1))), inner


def layers_of(module: nn.Module) -> list[MirasLayer]:
    """The sequence layers of a model, in order."""
    return [part for part in module.modules() if isinstance(part, MirasLayer)]
