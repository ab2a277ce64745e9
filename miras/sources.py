"""What a layer feeds its mixer beside queries, keys and values: the gates and vectors that a rule reads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.bias import Erase
from miras.errors import UsageError
from miras.gates import DELTA, ETA, RHO, Gate
from miras.pointwise import to_norm
from miras.rule import Rule

# exp(-3e-4) = 0.9997: what a memory that decays to zero can bear.
SLOW_DECAY = -3e-4
# Time constants of decay, in tokens, are spread over the heads from here up to the context length.
SHORTEST = 8.0
# Mamba2's time steps at the start, spread over the heads, and its rates (arXiv 2405.21060).
STEPS, RATES = (1e-1, 1e-3), (1.0, 16.0)


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


class GateConstant(nn.Module):
    """One gate that no input changes: squash(b), a learned number per head.

    Args:
        heads: number of heads.
        gate: what to make.
        init: value of each head at the start.
    """

    def __init__(self, heads: int, gate: Gate, init: list[float]) -> None:
        super().__init__()
        self.gate, self.init = gate, init
        self.bias = nn.Parameter(torch.empty(heads, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the initial values."""
        with torch.no_grad():
            self.bias.copy_(torch.tensor([self.gate.unsquash(x) for x in self.init])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, H, 1], at least float32."""
        value = self.gate.squash(self.bias.to(torch.promote_types(self.bias.dtype, torch.float32)))
        return value.expand(*x.shape[:2], *value.shape)


class TimeStep(nn.Module):
    """Mamba2's tied gates (arXiv 2405.21060): dt = softplus(W x + b), eta = dt, log alpha = -A dt, one A > 0 a head.

    Args:
        dim: size of the input.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim))
        self.bias, self.log_rate = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Time steps spread over the heads on a log scale, rates evenly."""
        heads = self.bias.shape[0]
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            step = torch.logspace(math.log10(STEPS[0]), math.log10(STEPS[1]), heads)
            self.bias.copy_(step.expm1().log())
            self.log_rate.copy_(torch.linspace(*RATES, heads).log())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, T, D] -> eta and log_alpha [B, T, H, 1]."""
        raw = F.linear(x.to(self.weight.dtype), self.weight)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        step = F.softplus(raw + self.bias.to(raw.dtype)).unsqueeze(-1)
        return {"eta": step, "log_alpha": -self.log_rate.to(raw.dtype).exp()[:, None] * step}


class Eraser(nn.Module):
    """The keys that `Erase` removes at and along, from a token's key.

    * RWKV-7 (`along="own"`): e = unit(s (.) k), b = a (.) e with a low-rank gate a in (0, 1) per channel.
    * Comba (`along="key"`): e = sigmoid(s) k with a number s per head.

    Args:
        dim: size of the input.
        heads: number of heads.
        head_dim: size of a key.
        along: see `Erase`.
        rank: rank of the gate.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, along: str, rank: int) -> None:
        super().__init__()
        own = along == "own"
        self.scale = nn.Parameter(torch.empty(heads, head_dim if own else 1))
        rate = Gate("erase rate", 0.0, 1.0, 0.5, True, "share of what stands at the erase key that is removed")
        self.rate = GateMaker(dim, heads, rate, head_dim, rank, [rate.init] * heads) if own else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The erase key is the key itself; of Comba, nearly."""
        nn.init.constant_(self.scale, 1.0 if self.rate is not None else 3.0)

    def forward(self, x: Tensor, k: Tensor) -> dict[str, Tensor]:
        """The layer's input [B, T, D] and keys [B, T, H, d] -> erase and along [B, T, H, d]."""
        if self.rate is None:
            return {"erase": torch.sigmoid(self.scale) * k}
        erase = to_norm(self.scale * k, 1.0)
        rate = self.rate(x).repeat_interleave(k.shape[1] // x.shape[1], 1)  # one for all keys of a token
        return {"erase": erase, "along": (rate * erase).to(erase.dtype)}


class Sources(nn.ModuleDict):
    """All gates and vectors of a rule, as its `inputs` say: the learned gates by name, and what else there is.

    Args:
        rule: the rule.
        dim: size of the layer's input.
        heads: number of heads.
        head_dim: size of each.
        per: "head" or "channel", for the gates that `rule.inputs` leaves to the layer.
        rank: rank of channel gates.
        context: longest time constant that retention starts with, in tokens.

    Raises:
        UsageError: channel gates where the rule has none.
    """

    def __init__(self, rule: Rule, dim: int, heads: int, head_dim: int, per: str, rank: int, context: int) -> None:
        super().__init__()
        self.rule, self.heads = rule, heads
        for gate in rule.gates:
            if gate.vector or gate.name == RHO.name or self._word(gate) not in ("layer", "head", "channel", "constant"):
                continue
            wide = gate.channel and (per if self._word(gate) == "layer" else self._word(gate)) == "channel"
            if wide and (reason := rule.channel_conflict(head_dim, head_dim)):
                raise UsageError(f"MirasLayer: {reason}; write gates='head'.")
            many = 1 if gate in rule.retention.gates else rule.algorithm.steps
            init = self._init(gate, context) * many
            if self._word(gate) == "constant":
                self[gate.name] = GateConstant(heads * many, gate, init)
            else:
                self[gate.name] = GateMaker(dim, heads * many, gate, head_dim if wide else 1, rank, init)
        self.tied = TimeStep(dim, heads) if rule.inputs.eta == "dt" else None
        self.eraser = None
        if isinstance(rule.bias, Erase):
            self.eraser = Eraser(dim, heads, head_dim, rule.bias.along, rank)
        has_rho = RHO in rule.gates
        self.read_factor = nn.Parameter(torch.empty(heads, rule.chunk)) if has_rho else None
        self.feedback = nn.Parameter(torch.empty(heads, 1)) if rule.inputs.query == "corrected" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """TTT reads the j-th token of a mini-batch with 1 / j; Comba's query begins uncorrected."""
        with torch.no_grad():
            if self.read_factor is not None:
                self.read_factor.copy_((1 / torch.arange(1, self.rule.chunk + 1)).expand_as(self.read_factor))
            if self.feedback is not None:
                self.feedback.zero_()

    def _word(self, gate: Gate) -> str:
        """What `rule.inputs` says of a gate."""
        if gate.name.startswith("log_"):
            return self.rule.inputs.alpha
        return {ETA.name: self.rule.inputs.eta, DELTA.name: self.rule.inputs.delta}.get(gate.name, "layer")

    def _init(self, gate: Gate, context: int) -> list[float]:
        """Initial value per head. Time constants of retention are spread over the heads, on a log scale up to the
        context, unless a normalised memory decays to zero: it becomes chaotic after a few thousand tokens of any real
        decay.
        """
        if not gate.name.startswith("log_"):
            return [gate.init] * self.heads
        if self.rule.memory.normalised and self.rule.retention.to == "zero":
            return [SLOW_DECAY] * self.heads
        step = (max(context, SHORTEST) / SHORTEST) ** (1 / max(self.heads - 1, 1))
        return [-1 / (SHORTEST * step**h) for h in range(self.heads)]

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor | None, position: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The queries, keys and gates that the rule reads.

        Args:
            x: the layer's input [B, T, D].
            q: queries [B, T, H, d].
            k: keys [B, n T, H, d] for n steps a token; None where they are made from the forgetting.
            position: place of each token in its sequence, int64 [B, T].
        """
        gates = {name: make(x) for name, make in self.items() if isinstance(make, GateMaker | GateConstant)}
        like = torch.zeros(
            *x.shape[:2], self.heads, 1, device=x.device, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        if self.tied is not None:
            gates |= self.tied(x)
        if self.rule.inputs.eta == "one":
            gates["eta"] = torch.ones_like(like)
        if self.rule.inputs.alpha in ("none", "retnet", "lightning"):
            gates["log_alpha"] = like + like.new_tensor(self._constant())[:, None]
        if self.read_factor is not None:
            gates["rho"] = self.read_factor.t()[position % self.rule.chunk].clamp_min(0).unsqueeze(-1).to(like.dtype)
        if self.rule.algorithm.steps > 1:
            kept = {gate.name for gate in self.rule.retention.gates}
            gates |= {n: self._of_steps(g) for n, g in gates.items() if n not in kept}
        if k is None:
            k = -torch.expm1(gates["log_alpha"]).to(q.dtype)
        if self.eraser is not None:
            gates |= self.eraser(x, k)
        if self.feedback is not None:
            q = q - self.feedback * k[:, self.rule.algorithm.steps - 1 :: self.rule.algorithm.steps]
        return q, k, gates

    def _of_steps(self, gate: Tensor) -> Tensor:
        """A gate of n steps, [B, T, H n, w], as that of n T tokens, [B, n T, H, w]; a constant is the same for all."""
        if gate.shape[2] == self.heads:
            return gate.repeat_interleave(self.rule.algorithm.steps, 1)
        return gate.unflatten(2, (self.heads, -1)).movedim(3, 2).flatten(1, 2)

    def _constant(self) -> list[float]:
        """Log decay per head: none, of RetNet log(1 - 2^(-5 - h)), of Lightning attention -8 h / H."""
        if self.rule.inputs.alpha == "none":
            return [0.0] * self.heads
        if self.rule.inputs.alpha == "retnet":
            return [math.log1p(-(2.0 ** (-5 - h))) for h in range(self.heads)]
        return [-8 * h / self.heads for h in range(self.heads)]
