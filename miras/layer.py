"""MirasLayer, [B, T, D] -> [B, T, D]: projections, gates and norms around a mixer (arXiv 2504.13173, section 5.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.attention import Attention, CacheState, rotate
from miras.engines import run
from miras.errors import UsageError
from miras.gates import Gate
from miras.layout import Layout, layout, take
from miras.mixer import Mixer
from miras.rule import Rule, State
from miras.state import BatchState

# exp(-3e-4) = 0.9997: what a memory that decays to zero can bear.
SLOW_DECAY = -3e-4
# Time constants of decay, in tokens, are spread over the heads from here up to the context length.
SHORTEST = 8.0


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


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `width` tokens of each sequence, then SiLU.

    Args:
        channels: number of channels.
        width: tokens seen, the present one included.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform as PyTorch's own convolutions are."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))

    def forward(self, x: Tensor, state: Tensor | None, where: Layout) -> tuple[Tensor, Tensor]:
        """x [B, T, C], the last width - 1 inputs of each sequence [N, width - 1, C] -> y [B, T, C], the next state."""
        if state is None:
            state = x.new_zeros(where.rows, self.width - 1, x.shape[-1])
        state = state.to(x.dtype)
        if where.dense:
            past = torch.cat([state, x], 1)
            # As a channels-last 2-D convolution: several times as fast on a CPU as conv1d or shifted products.
            image = past.mT.unsqueeze(2).contiguous(memory_format=torch.channels_last)
            y = F.conv2d(image, self.weight.t()[:, None, None], groups=x.shape[-1])
            return F.silu(y.squeeze(2).mT), past[:, where.length :]
        source = torch.cat([x.flatten(0, 1), state.flatten(0, 1)])
        y = torch.zeros_like(x)
        for lag, weight in enumerate(self.weight.flip(0)):
            token = torch.where(where.valid, where.place(where.row, where.rank - lag, self.width - 1), -1)
            y = y + take(source, token) * weight
        rows = torch.arange(where.rows, device=x.device)[:, None]
        last = where.count[:, None] + torch.arange(1 - self.width, 0, device=x.device)
        return F.silu(y), take(source, where.place(rows, last, self.width - 1))


class GateMaker(nn.Module):
    """One gate from the layer's input: squash(x A B + b) per channel, of low rank, or squash(x A + b) per head.

    Args:
        dim: size of the input.
        heads: number of heads.
        gate: what to make.
        channels: channels of each head; 1 for one value per head.
        rank: rank of the map to channels (the paper has 32 or 64).
        init: value of each head at the start.
    """

    def __init__(self, dim: int, heads: int, gate: Gate, channels: int, rank: int, init: list[float]) -> None:
        super().__init__()
        self.gate, self.heads, self.init = gate, heads, init
        self.down = nn.Linear(dim, rank, bias=False) if channels > 1 else None
        self.weight = nn.Parameter(torch.empty(heads * channels, rank if channels > 1 else dim))
        self.bias = nn.Parameter(torch.empty(heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights small against the bias, so that a fresh layer's gates are near their initial values."""
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.bias.copy_(torch.tensor([self.gate.unsquash(x) for x in self.init])[:, None].expand_as(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, H, 1 | channels], at least float32."""
        x = x.to(self.weight.dtype)  # a model loaded in bfloat16 keeps its gates in float32
        raw = F.linear(x if self.down is None else self.down(x), self.weight)
        raw = raw.unflatten(-1, (self.heads, -1)).to(torch.promote_types(raw.dtype, torch.float32))
        return self.gate.squash(raw + self.bias.to(raw.dtype))


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
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.memory, self.slow, self.gates = nn.ParameterDict(), nn.ParameterDict(), nn.ModuleDict()
        self.conv = self.norm = self.out_gate = None
        if isinstance(rule, Attention):
            return
        assert isinstance(rule, Rule)
        if gates == "channel" and (reason := rule.channel_conflict(self.head_dim, self.head_dim)):
            raise UsageError(f"MirasLayer: {reason}; write gates='head'.")
        self.conv = ShortConv(3 * inner, conv) if conv else None
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.out_gate = nn.Linear(dim, inner, bias=False)
        for gate in rule.gates:
            channels = self.head_dim if gates == "channel" and gate.channel else 1
            self.gates[gate.name] = GateMaker(dim, heads, gate, channels, gate_rank, self._gate_init(gate, context))
        for name, leaf in rule.leaves(self.head_dim, self.head_dim).items():
            if leaf.std:
                self.memory[name] = nn.Parameter(torch.empty(heads, leaf.rows, leaf.cols))
        for name, (size, _) in rule.slow(self.head_dim, self.head_dim).items():
            self.slow[name] = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    def _gate_init(self, gate: Gate, context: int) -> list[float]:
        """Initial value per head. Time constants of retention are spread over the heads, on a log scale up to the
        context, unless a normalised memory decays to zero: it becomes chaotic after a few thousand tokens of any real
        decay.
        """
        assert isinstance(self.rule, Rule)
        if gate.name != "log_alpha":
            return [gate.init] * self.heads
        if self.rule.memory.normalised and self.rule.retention.to == "zero":
            return [SLOW_DECAY] * self.heads
        step = (max(context, SHORTEST) / SHORTEST) ** (1 / max(self.heads - 1, 1))
        return [-1 / (SHORTEST * step**h) for h in range(self.heads)]

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
        engine: str = "auto",
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
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
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
        engine: str,
    ) -> tuple[Tensor, Any]:
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        if self.rope:
            position = seen[where.row] + where.rank.clamp_min(0)
            q, k = rotate(q, position), rotate(k, position)
        gates = {name: make(x) for name, make in self.gates.items()}
        before = state.mixer if state is not None else self.init(where.rows, v)
        y, inner = run(self.rule, q, k, v, gates, before, where=where, engine=engine)
        assert self.norm is not None and self.out_gate is not None
        return self.norm(y) * F.silu(self.out_gate(x)).unflatten(-1, (self.heads, -1)), inner
