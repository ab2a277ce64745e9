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
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from miras.algorithm import Algorithm, Implicit, LeastSquares
from miras.algorithm.base import Slots
from miras.algorithm.least_squares import RIDGE
from miras.bias import Bias, Erase
from miras.errors import UsageError
from miras.gates import GAMMA, Gate
from miras.inputs import LEARNED, Inputs
from miras.memory import Memory
from miras.mixer import Mixer
from miras.registry import choices, from_config
from miras.retention import EuclideanRetention, Retention, SlopedRetention
from miras.rule.composition import conflicts, formula
from miras.state import BatchState
from miras.weights import COLUMNS, ROWS, Leaf, Outer, Weights, along

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
        pending: with `step_at="chunk"`, what the running chunk has gathered: {leaf: sum of eta grad} and the sum of
            "log_alpha"; else empty.
        recent: with a window, what is left of the last window - 1 tokens, {name: [B, window - 1, H, n]}; else empty.
    """

    dual: dict[str, Tensor]
    slots: dict[str, Slots]
    origin: dict[str, Tensor]
    offset: Tensor
    home: dict[str, Tensor]
    slow: dict[str, Tensor]
    aligned: bool = False
    pending: dict[str, Tensor] = field(default_factory=dict)
    recent: dict[str, Tensor] = field(default_factory=dict)

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
            its evaluation: decoding and every engine reproduce it exactly. Deep memories want more than 1 to be
            trained, or `first_order`: with 1 outer gradients of second order have no bounds (`docs/performance.md`).
        gradient_at: "previous", at W_{t-1} (Titans, Comba, RWKV-7 and the paper), or "decayed", at alpha_t W_{t-1}
            (Gated DeltaNet, KDA). For any chunk: the origin itself is retained with no step before token t's gradient
            is taken there.
        link_at: where a nonlinear link acts inside a chunk. "token": W_t = link(A_t). "chunk": W_t = link(O) + slope(O)
            centre(A_t - O), the link itself only where chunks meet, so that no per-token weights are written out. None
            chooses "chunk" where the gate has a slope. With chunk 1 or an identity link there is no difference, and
            the field becomes "token".
        window: tokens whose losses a token's gradient sums, itself and those before it, each weighted by its gate
            gamma (Atlas, arXiv 2505.23735).
        step_at: "token", the algorithm takes a step for every token, or "chunk", one for the sum of the chunk's eta_t
            grad_t at its last token, which then also decays by all of its tokens (LaCT, arXiv 2505.23884). With chunk 1
            the field becomes "token".
        read_at: "after", a token reads with the weights it has left behind, or "before", with those it has found.
        first_order: outer gradients do not flow through the weights at which inner gradients are taken. The function is
            the same, its derivative is a wrong one, which keeps its bounds at chunk 1. Otherwise it costs some quality
            and saves little time (`docs/performance.md`).
        inputs: how a layer makes gates, keys and queries for it; no part of the function.

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
    window: int = 1
    step_at: Literal["token", "chunk"] = "token"
    read_at: Literal["after", "before"] = "after"
    first_order: bool = False
    inputs: Inputs = LEARNED

    def __post_init__(self) -> None:
        for name, axis in (("memory", Memory), ("bias", Bias), ("retention", Retention), ("algorithm", Algorithm)):
            part: Any = getattr(self, name)
            if isinstance(part, dict):
                object.__setattr__(self, name, part := from_config(axis, part))
            if not isinstance(part, axis):
                raise UsageError(f"Rule: {name} must be one of miras.{name}, such as {_example(axis)}, got {part!r}.")
        if isinstance(self.inputs, dict):
            object.__setattr__(self, "inputs", Inputs(**{n: x for n, x in self.inputs.items() if n != "name"}))
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise UsageError(f"Rule: chunk must be a whole number of tokens, at least 1, got {self.chunk!r}.")
        if not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"Rule: window must be a whole number of tokens, at least 1, got {self.window!r}.")
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                raise UsageError(f"Rule: {name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}.")
        if self.chunk == 1:
            object.__setattr__(self, "step_at", "token")
        for conflict in conflicts(self):
            raise UsageError(f"Rule: {conflict}")
        object.__setattr__(self, "link_at", self._link_at())

    def _link_at(self) -> Literal["token", "chunk"]:
        if self.link_at not in (None, "token", "chunk"):
            raise UsageError(f"Rule: link_at must be 'token' or 'chunk', got {self.link_at!r}.")
        if self.chunk == 1 or self.step_at == "chunk" or isinstance(self.retention, EuclideanRetention):
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
        ranges to min(1, 16 / chunk), times the own limits of bias, retention and algorithm.
        """
        limit = min(1.0, 16 / self.chunk) * self.bias.eta_limit * self.retention.eta_limit * self.algorithm.eta_limit
        gates = self.bias.gates + self.retention.gates + self.algorithm.gates
        gates += (GAMMA,) if self.window > 1 else ()
        return tuple(replace(g, high=limit, init=g.init * limit) if g.name == "eta" else g for g in gates)

    def leaves(self, d_k: int, d_v: int) -> dict[str, Leaf]:
        """The memory's matrices, and the algorithm's own that is updated like them."""
        leaves = self.memory.leaves(d_k, d_v)
        return {**leaves, "h": self.algorithm.leaf(d_k)} if isinstance(self.algorithm, LeastSquares) else leaves

    def channel_conflict(self, d_k: int, d_v: int) -> str | None:
        """Why alpha cannot be per channel, or None: it has to be constant along the axis a softmax normalises."""
        if isinstance(self.algorithm, LeastSquares | Implicit):
            return f"{self.algorithm} is in closed form for gates that are one number"
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

    def slow(self, d_k: int, d_v: int) -> dict[str, tuple[int, float]]:
        """Slow parameters, {name: (size, initial value)}: the memory's, and the ridge of exact least squares."""
        own = {"ridge": (d_k, RIDGE)} if isinstance(self.algorithm, LeastSquares) else {}
        return {**self.memory.slow(d_v), **own}

    def initial_slow(self, heads: int, d_k: int, d_v: int) -> dict[str, Tensor]:
        """The slow parameters at their initial values, {name: [H, n]}."""
        return {n: torch.full((heads, size), value) for n, (size, value) in self.slow(d_k, d_v).items()}

    def init(self, weights: Mapping[str, Tensor], slow: Mapping[str, Tensor] | None = None, batch: int = 1) -> State:
        """A fresh state.

        Args:
            weights: the initial memory in dual coordinates, {leaf: [H, o, i]} for all rows or {leaf: [B, H, o, i]}.
            slow: the memory's slow parameters {name: [H, n]}; None: their initial values.
            batch: rows B, where the weights do not say it.
        """
        start = {n: w if w.dim() == 4 else w.expand(batch, *w.shape) for n, w in weights.items()}
        first = next(iter(start.values()))
        rows, heads, d_v, cols = first.shape
        if isinstance(self.algorithm, LeastSquares):
            start.setdefault("h", first.new_zeros(rows, heads, cols, cols))
        if slow is None:
            # Only a matrix memory has slow parameters of the keys' size, and its first matrix reads keys.
            slow = {n: x.to(first) for n, x in self.initial_slow(heads, cols, d_v).items()}
        home: dict[str, Tensor] = {}
        if self.retention.to == "initial":
            home, start = dict(weights), {n: torch.zeros_like(w) for n, w in start.items()}
        slots = {n: tuple(torch.zeros_like(w) for _ in range(self.algorithm.slots)) for n, w in start.items()}
        pending: dict[str, Tensor] = {}
        if self.step_at == "chunk":
            pending = {n: torch.zeros_like(w) for n, w in start.items()}
            pending["log_alpha"] = first.new_zeros(rows, heads, 1)
        offset = torch.zeros(rows, dtype=torch.int64, device=first.device)
        return State(start, slots, dict(start), offset, home, dict(slow), aligned=True, pending=pending)

    # -- the update, one leaf at a time ------------------------------------------------------------------------------

    def leaf_gates(self, leaf: Leaf, gates: Gates) -> dict[str, Tensor]:
        """The gates that one matrix sees, [..., 1 | channels], with alpha itself beside its logarithm.

        A matrix without a model-channel axis sees the mean of channel gates.
        """
        seen = {}
        for gate in self.retention.gates + self.algorithm.gates:
            value = gates[gate.name]
            seen[gate.name] = value.mean(-1, keepdim=True) if leaf.channel is None else value
        for name in [n for n in seen if n.startswith("log_")]:
            seen[name.removeprefix("log_")] = seen[name].exp()
        return seen

    def matrix_gates(self, leaf: Leaf, gates: Gates) -> dict[str, Tensor]:
        """One token's gates [..., 1, n] as one matrix sees them, broadcastable against it."""
        return orient(self.leaf_gates(leaf, gates), leaf)

    def rate(self, leaf: Leaf) -> float:
        """What `Algorithm.rate` scales the learning rate of one matrix by."""
        return 1.0 if self.algorithm.rate == "none" else 1 / (leaf.power * self.retention.slope0(leaf))

    def gradient(
        self, weights: Weights, slow: Mapping[str, Tensor], k: Tensor, v: Tensor, gates: Gates
    ) -> dict[str, Outer]:
        """d L(M(W, k_t), v_t) / d W of every token as outer products; `weights` may be operators.

        With a window, k, v, gamma and the bias' gates carry its tokens side by side along the last axis.
        """
        if self.window > 1:
            names = [g.name for g in self.bias.gates] + [GAMMA.name]
            k, v, *own = (
                x.unflatten(-1, (self.window, -1)).flatten(-3, -2) for x in (k, v, *(gates[n] for n in names))
            )
            gates = dict(zip(names, own, strict=True))
        if self.first_order:
            weights = {n: w.detach() for n, w in weights.items() if isinstance(w, Tensor)}
        y, pullback = self.memory.vjp(weights, k, slow)
        surprise = self.bias.clipped(y, v, gates)
        if self.window > 1:
            grad = pullback(surprise * gates[GAMMA.name])
            return {n: g._replace(terms=self.window) for n, g in grad.items()}
        grad = pullback(surprise)
        if isinstance(self.bias, Erase):
            stored, _ = self.memory.vjp(weights, gates["erase"], slow)
            _, remove = self.memory.vjp(weights, gates["along"] if self.bias.along == "own" else k, slow)
            grad = {n: g.beside(grad[n]) for n, g in remove(stored).items()}
        return grad

    def surprise(
        self,
        weights: Weights,
        slow: Mapping[str, Tensor],
        k: Tensor,
        v: Tensor,
        gates: Gates,
        leaves: Mapping[str, Leaf],
    ) -> dict[str, Outer]:
        """The gradients as the algorithm sees them."""
        if isinstance(self.algorithm, LeastSquares):
            return self.algorithm.statistics(k, v)
        grad = self.gradient(weights, slow, k, v, gates)
        for n, leaf in leaves.items():
            if isinstance(self.algorithm, Implicit):
                grad[n] = self.algorithm.shrink(grad[n], self.leaf_gates(leaf, gates))
            if (rate := self.rate(leaf)) != 1:
                grad[n] = grad[n]._replace(left=rate * grad[n].left)
        return grad

    def update(self, dual: Tensor, slots: Slots, grad: Tensor, gates: Gates) -> tuple[Tensor, Slots]:
        """One token's step of one matrix, in dual coordinates.

        `grad` comes from `surprise`, `gates` from `leaf_gates`, broadcastable against the matrix.
        """
        step, slots = self.algorithm.step(grad, slots, gates)
        return self.retention.retain(dual, step, gates), slots

    def gather(
        self, pending: Mapping[str, Tensor], grad: Mapping[str, Tensor], gates: Gates, leaves: Mapping[str, Leaf]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """With `step_at="chunk"`: what is gathered once a token's gradients [..., o, i] are in it, and the gates
        [..., 1, n] that the chunk's step would see if the token were its last: the decay of all tokens so far, and
        eta 1, since each gradient has had its own.
        """
        gathered = {n: pending[n] + self.matrix_gates(leaf, gates)["eta"] * grad[n] for n, leaf in leaves.items()}
        gathered["log_alpha"] = pending["log_alpha"] + gates.get("log_alpha", torch.zeros_like(gates["eta"])).squeeze(
            -2
        )
        at_end = {**gates, "eta": torch.ones_like(gates["eta"]), "log_alpha": gathered["log_alpha"].unsqueeze(-2)}
        return gathered, at_end

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

    def read(self, weights: Weights, q: Tensor, slow: Mapping[str, Tensor]) -> Tensor:
        """M(W_t, q_t): q [..., C, d_k] -> [..., C, d_v]."""
        if isinstance(self.algorithm, LeastSquares):
            q = self.algorithm.query(weights["h"], q, slow["ridge"])
        return self.memory.read(weights, q, slow)

    # -- description -------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        names = {"memory": self.memory, "bias": self.bias, "retention": self.retention, "algorithm": self.algorithm}
        changed = {n: word for n, word in vars(self.inputs).items() if word != getattr(LEARNED, n)}
        inputs = ", ".join(f"{n} {word}" for n, word in changed.items())
        return {**{n: str(part) for n, part in names.items()}, "update": self.formula_of_update, "inputs": inputs}

    @property
    def formula_of_update(self) -> str:
        """The update in one line of plain characters."""
        return formula(self)

    def state_bytes(self, heads: int, d_k: int, d_v: int, tokens: int) -> int:
        del tokens  # the point of a fixed-size memory
        copies = 1 + self.algorithm.slots + (self.chunk > 1) + (self.chunk > 1 and self.step_at == "chunk")
        entries = copies * sum(leaf.rows * leaf.cols for leaf in self.leaves(d_k, d_v).values())
        return 4 * heads * (entries + (self.window - 1) * (d_k + d_v + 1))


_WORDS = {"gradient_at": ("previous", "decayed"), "step_at": ("token", "chunk"), "read_at": ("after", "before")}


def token(gates: Gates, t: int | slice) -> dict[str, Tensor]:
    """The gates of one token or a slice of them, [..., C, n] -> [..., 1, n]."""
    where = slice(t, t + 1) if isinstance(t, int) else t
    return {n: g[..., where, :] for n, g in gates.items()}


def orient(gates: Gates, leaf: Leaf) -> dict[str, Tensor]:
    """One token's gates [..., 1, n] made broadcastable against that token's matrix [..., o, i]."""
    other = ROWS if leaf.channel == COLUMNS else COLUMNS
    return {n: along(g.squeeze(-2), other if n.endswith("beta") else leaf.channel) for n, g in gates.items()}


def _example(axis: type) -> str:
    return ", ".join(f"{name}()" for name in list(choices(axis))[:3])
