"""A rule: the four choices put together, and the paper's update, once.

    A_t = alpha_t A_{t-1} - step_t              step_t from the algorithm, of  grad_t = d L(M(W_o, k_t), v_t) / d W
    W_t = link(A_t)                             y_t = M(W_t, q_t)

W_o are the weights that the running chunk began with. Three named points turn this frame into known models: with a
matrix memory, l_2 bias, no retention, gradient descent and chunk 1 it is DeltaNet; with the dot product instead it is
linear attention; with a 2-layer MLP, l_2, decay and momentum it is Titans.

Vocabulary: `dual` A, `weights` W = link(A), `slots` the algorithm's own state, `origin` the dual at which a chunk's
gradients are taken, `offset` tokens of the running chunk already seen, `home` the learned initial dual.
Sizes: B batch, T time, H heads, D head size, C tokens of a chunk; a matrix has o rows and i columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from miras.algorithm import Algorithm
from miras.algorithm.base import Slots
from miras.bias import Bias
from miras.errors import UsageError
from miras.gates import Gate
from miras.memory import Memory
from miras.mixer import Mixer
from miras.registry import choices, from_config
from miras.retention import EuclideanRetention, Retention, SlopedRetention
from miras.state import BatchState
from miras.weights import Leaf, Outer, Weights, along

Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class State(BatchState):
    """State of a rule: everything needed to go on from any token.

    Attributes:
        dual: A, {leaf: [B, H, o, i]}; relative to `home` where the rule decays to the initial memory.
        slots: the algorithm's own tensors, {leaf: ([B, H, o, i], ...)}.
        origin: dual at which the running chunk's gradients are taken (a link cannot be inverted, so it is kept).
        offset: tokens of the running chunk already seen, int64 [B].
        home: learned initial dual, {leaf: [H, o, i]}; empty where the rule decays to zero.
        slow: the memory's slow parameters, {name: [H, n]}.
        aligned: every row is known to stand at the start of a chunk, without asking the device.
    """

    dual: dict[str, Tensor]
    slots: dict[str, Slots]
    origin: dict[str, Tensor]
    offset: Tensor
    home: dict[str, Tensor]
    slow: dict[str, Tensor]
    aligned: bool = False

    shared: ClassVar[tuple[str, ...]] = ("home", "slow")


@dataclass(frozen=True)
class Rule(Mixer):
    """memory x bias x retention x algorithm, and how chunks act.

    Args:
        memory: architecture, what stores.
        bias: attentional bias, the inner objective.
        retention: retention gate, what is kept.
        algorithm: memory learning algorithm.
        chunk: tokens whose gradients are all taken at the weights the chunk began with. Part of the function, not of
            its evaluation: decoding and every engine reproduce it exactly.
        gradient_at: "previous", at W_{t-1} (Titans, Comba, RWKV-7 and the paper), or "decayed", at alpha_t W_{t-1}
            (Gated DeltaNet, KDA). For any chunk: the origin itself is retained with no step before token t's gradient
            is taken there.
        link_at: where a nonlinear link acts inside a chunk. "token": W_t = link(A_t). "chunk": W_t = link(O) + slope(O)
            centre(A_t - O), the link itself only where chunks meet, so that no per-token weights are written out. None
            chooses "chunk" where the gate has a slope. With chunk 1 or an identity link there is no difference, and
            the field becomes "token".

    Raises:
        UsageError: a chunk below 1 or choices that do not go together, with the reason.
    """

    memory: Memory
    bias: Bias
    retention: Retention
    algorithm: Algorithm
    chunk: int = 1
    gradient_at: Literal["previous", "decayed"] = "previous"
    link_at: Literal["token", "chunk"] | None = None

    def __post_init__(self) -> None:
        for name, axis in (("memory", Memory), ("bias", Bias), ("retention", Retention), ("algorithm", Algorithm)):
            part: Any = getattr(self, name)
            if isinstance(part, dict):
                object.__setattr__(self, name, part := from_config(axis, part))
            if not isinstance(part, axis):
                raise UsageError(f"Rule: {name} must be one of miras.{name}, such as {_example(axis)}, got {part!r}.")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise UsageError(f"Rule: chunk must be a whole number of tokens, at least 1, got {self.chunk!r}.")
        if self.gradient_at not in ("previous", "decayed"):
            raise UsageError(f"Rule: gradient_at must be 'previous' or 'decayed', got {self.gradient_at!r}.")
        if self.gradient_at == "decayed" and not isinstance(self.retention, EuclideanRetention):
            raise UsageError(
                f"Rule: gradient_at='decayed' needs a retention whose link is the identity (NoRetention, L2); "
                f"{self.retention} has another. Write gradient_at='previous'."
            )
        object.__setattr__(self, "link_at", self._link_at())
        for leaf in self.leaves(8, 8).values():
            if self.retention.singular_at_zero and leaf.std == 0:
                raise UsageError(
                    f"Rule: {self.retention} is singular at a zero matrix, where {self.memory} starts. "
                    f"Write {type(self.memory).__name__}(start='learned')."
                )

    def _link_at(self) -> Literal["token", "chunk"]:
        if self.link_at not in (None, "token", "chunk"):
            raise UsageError(f"Rule: link_at must be 'token' or 'chunk', got {self.link_at!r}.")
        if self.chunk == 1 or isinstance(self.retention, EuclideanRetention):
            return "token"
        sloped = isinstance(self.retention, SlopedRetention)
        if self.link_at == "chunk" and not sloped:
            raise UsageError(
                f"Rule: {self.retention} has no slope, so it has no link_at='chunk'; write link_at='token'."
            )
        return self.link_at or ("chunk" if sloped else "token")

    # -- what the rule needs -----------------------------------------------------------------------------------------

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Gates of all axes. Within a chunk gradients are stale: a key repeated C times is stepped C eta times, so eta
        of a rule with chunk > 1 ranges to min(1, 16 / chunk), times the own limits of bias and retention.
        """
        own = self.bias.eta_limit * self.retention.eta_limit
        limit = min(1.0, 16 / self.chunk) * own if self.chunk > 1 else 1.0
        gates = self.bias.gates + self.retention.gates + self.algorithm.gates
        return tuple(replace(g, high=limit, init=g.init * limit) if g.name == "eta" else g for g in gates)

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        """The memory's matrices."""
        return self.memory.leaves(d_k, d_v)

    def channel_conflict(self, d_k: int, d_v: int) -> str | None:
        """Why alpha cannot be per channel, or None: it has to be constant along the axis a softmax normalises."""
        for name, leaf in self.leaves(d_k, d_v).items():
            if self.retention.on_simplex and leaf.channel == leaf.simplex:
                return (
                    f"{self.retention} needs alpha constant along the axis it normalises, the channels of matrix {name}"
                )
        return None

    # -- states ------------------------------------------------------------------------------------------------------

    def initial(self, heads: int, d_k: int, d_v: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A random initial memory in dual coordinates, {leaf: [H, o, i]}; zeros where the memory starts at zero."""
        weights = {}
        for name, leaf in self.leaves(d_k, d_v).items():
            std = leaf.std / self.retention.slope0(leaf)
            weights[name] = torch.randn(heads, leaf.rows, leaf.cols, generator=generator) * std
        return weights

    def initial_slow(self, heads: int, d_k: int, d_v: int) -> dict[str, Tensor]:
        """The memory's slow parameters at their initial values, {name: [H, n]}."""
        return {n: torch.full((heads, size), value) for n, (size, value) in self.memory.slow(d_k, d_v).items()}

    def init(self, weights: Mapping[str, Tensor], slow: Mapping[str, Tensor] | None = None, batch: int = 1) -> State:
        """A fresh state.

        Args:
            weights: the initial memory in dual coordinates, {leaf: [H, o, i]} for all rows or {leaf: [B, H, o, i]}.
            slow: the memory's slow parameters {name: [H, n]}; None: their initial values.
            batch: rows B, where the weights do not say it.
        """
        start = {n: w if w.dim() == 4 else w.expand(batch, *w.shape) for n, w in weights.items()}
        if slow is None:
            heads, w = next(iter(start.values())).shape[1], next(iter(start.values()))
            d_v, d_k = self._sizes(start)
            slow = {n: x.to(w) for n, x in self.initial_slow(heads, d_k, d_v).items()}
        home: dict[str, Tensor] = {}
        if self.retention.to == "initial":
            home, start = dict(weights), {n: torch.zeros_like(w) for n, w in start.items()}
        slots = {n: tuple(torch.zeros_like(w) for _ in range(self.algorithm.slots)) for n, w in start.items()}
        rows = next(iter(start.values()))
        offset = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        return State(start, slots, dict(start), offset, home, dict(slow), aligned=True)

    @staticmethod
    def _sizes(weights: Mapping[str, Tensor]) -> tuple[int, int]:
        """(d_v, d_k): the first matrix writes values, the last reads keys."""
        parts = list(weights.values())
        return parts[0].shape[-2], parts[-1].shape[-1]

    # -- the update, one leaf at a time ------------------------------------------------------------------------------

    def leaf_gates(self, leaf: Leaf, gates: Gates) -> dict[str, Tensor]:
        """The gates that one matrix sees, [..., 1 | channels], with alpha itself beside its logarithm.

        A matrix without a model-channel axis sees the mean of channel gates.
        """
        seen = {}
        for gate in self.retention.gates + self.algorithm.gates:
            value = gates[gate.name]
            seen[gate.name] = value.mean(-1, keepdim=True) if leaf.channel is None else value
        if "log_alpha" in seen:
            seen["alpha"] = seen["log_alpha"].exp()
        return seen

    def rate(self, leaf: Leaf) -> float:
        """What `Algorithm.rate` scales the learning rate of one matrix by."""
        return 1.0 if self.algorithm.rate == "none" else 1 / (leaf.power * self.retention.slope0(leaf))

    def gradient(
        self, weights: Weights, slow: Mapping[str, Tensor], k: Tensor, v: Tensor, gates: Gates
    ) -> dict[str, Outer]:
        """d L(M(W, k_t), v_t) / d W of every token as outer products; `weights` may be operators."""
        y, pullback = self.memory.vjp(weights, k, slow)
        return pullback(self.bias.clipped(y, v, gates))

    def update(self, dual: Tensor, slots: Slots, grad: Tensor, gates: Gates) -> tuple[Tensor, Slots]:
        """One token's step of one matrix, in dual coordinates.

        `grad` is that of the loss times `rate`, `gates` come from `leaf_gates`, broadcastable against the matrix.
        """
        step, slots = self.algorithm.step(grad, slots, gates)
        return self.retention.retain(dual, step, gates), slots

    def decay(self, origin: Tensor, gates: Gates) -> Tensor:
        """The origin retained with no step, where gradients are taken at the decayed memory."""
        return self.retention.retain(origin, torch.zeros_like(origin), gates)

    def full(self, dual: Mapping[str, Tensor], home: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The dual itself, from the one that is stored relative to `home`."""
        return {n: a + home[n] for n, a in dual.items()} if home else dict(dual)

    def link(
        self, dual: Mapping[str, Tensor], home: Mapping[str, Tensor], leaves: Mapping[str, Leaf]
    ) -> dict[str, Tensor]:
        """The weights W = link(A), materialised."""
        return {n: self.retention.primal(a, leaves[n]) for n, a in self.full(dual, home).items()}

    def read_weights(self, state: State, leaves: Mapping[str, Leaf]) -> Weights:
        """What a token reads with after its update: W_t by `link_at`."""
        if self.link_at == "token":
            return self.link(state.dual, state.home, leaves)
        assert isinstance(self.retention, SlopedRetention)
        weights = {}
        for n, origin in self.full(state.origin, state.home).items():
            base, slope = self.retention.linearise(origin, leaves[n])
            weights[n] = base + slope * self.retention.centre(state.dual[n] - state.origin[n], leaves[n])
        return weights

    # -- description -------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        names = {"memory": self.memory, "bias": self.bias, "retention": self.retention, "algorithm": self.algorithm}
        return {**{n: str(part) for n, part in names.items()}, "update": self.formula_of_update}

    @property
    def formula_of_update(self) -> str:
        """The update in one line of plain characters."""
        identity = isinstance(self.retention, EuclideanRetention)
        a = "W" if identity else "A"
        keep = "alpha_t " if self.retention.gates else ""
        past = (
            f"{a}_0 + {keep}({a}_{{t-1}} - {a}_0)" if self.retention.to == "initial" and keep else f"{keep}{a}_{{t-1}}"
        )
        at = "alpha_t W_{t-1}" if self.gradient_at == "decayed" else "W_{t-1}" if self.chunk == 1 else "W_chunk"
        surprise = f"eta_t grad L({at}; k_t, v_t)"
        line = f"{a}_t = {past} - " + ("S_t" if self.algorithm.slots else surprise)
        if self.algorithm.slots:
            line += f", S_t = theta_t S_{{t-1}} + {surprise}"
        return line if identity else line + ", W_t = link(A_t)"

    def state_bytes(self, heads: int, d_k: int, d_v: int, tokens: int) -> int:
        del tokens  # the point of a fixed-size memory
        copies = 1 + self.algorithm.slots + (0 if self.chunk == 1 else 1)
        return 4 * heads * copies * sum(leaf.rows * leaf.cols for leaf in self.leaves(d_k, d_v).values())


def token(gates: Gates, t: int | slice) -> dict[str, Tensor]:
    """The gates of one token or a slice of them, [..., C, n] -> [..., 1, n]."""
    where = slice(t, t + 1) if isinstance(t, int) else t
    return {n: g[..., where, :] for n, g in gates.items()}


def orient(gates: Gates, leaf: Leaf) -> dict[str, Tensor]:
    """One token's gates [..., 1, n] made broadcastable against that token's matrix [..., o, i]."""
    return {n: along(g.squeeze(-2), leaf.channel) for n, g in gates.items()}


def _example(axis: type) -> str:
    return ", ".join(f"{name}()" for name in list(choices(axis))[:3])
