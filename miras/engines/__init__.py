"""Running a mixer over tokens: one call, whichever engine evaluates it.

Every engine computes the function that `recurrence` defines. `plan` says which one runs, `explain` why not the others,
and `engine=` overrides the choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miras.attention import Attention, CacheState
from miras.engines import block, chunk, exact, fla, native, triton
from miras.errors import UsageError, near
from miras.gates import BETA, GAMMA, Gate, hole
from miras.layout import Layout, layout
from miras.mixer import Mixer
from miras.recurrence import recurrence
from miras.rule import Gates, Rule, State
from miras.weights import ROWS

Pair = tuple[Tensor, Tensor]


class Engine(NamedTuple):
    """A way to evaluate a rule.

    Attributes:
        name: for `engine=`.
        about: one line for people.
        refuses: (rule, gates or None, (k, v) or None) -> why it cannot run the rule, or None. Without keys and values
            they are taken to be on a CPU.
        run: (rule, state, q, k, v, gates, layout) -> (y, state).
        for_gpus: elsewhere it is only for tests, and never chosen by itself.
    """

    name: str
    about: str
    refuses: Callable[[Rule, Gates | None, Pair | None], str | None]
    run: Callable[..., tuple[Tensor, Any]]
    for_gpus: bool = False

    def reason(self, rule: Rule, gates: Gates | None, tokens: Pair | None) -> str | None:
        """Why it is not chosen by itself, or None."""
        unseen = self.for_gpus and tokens is not None and not tokens[1].is_cuda
        return self.refuses(rule, gates, None if unseen else tokens)


def _token_loop(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], where: Layout
) -> tuple[Tensor, State]:
    valid = None if where.dense else where.padded().valid
    q, k, v = (where.to_rows(x).transpose(1, 2) for x in (q, k, v))
    gates = {n: where.to_rows(g).transpose(1, 2) for n, g in gates.items()}
    y, state = recurrence(rule, state, q, k, v, gates, valid)
    return where.from_rows(y.transpose(1, 2)), state


# In order of preference.
ENGINES = (
    Engine("fla", "flash-linear-attention's kernel for this linear memory", fla.refuses, fla.run, True),
    Engine("native", "in the CPU's cache, in C++", native.refuses, native.run),
    Engine("exact", "exact parallel form of a linear memory at chunk 1, by tiles", exact.refuses, exact.run),
    Engine("block", "one step a chunk, its gradients in one pass", block.refuses, block.run),
    Engine("triton", "all chunks of a deep memory in one kernel", triton.refuses, triton.run, True),
    Engine("chunk", "a chunk at a time by matrix products", chunk.refuses, chunk.run),
    Engine("recurrence", "the definition, token by token", lambda *_: None, _token_loop),
)


def explain(rule: Rule, gates: Gates | None = None, tokens: Pair | None = None) -> dict[str, str]:
    """What each engine says of a rule (with these gates, keys and values), in order of preference: "chosen", "possible"
    or the reason why it cannot run it.
    """
    said = {}
    for engine in ENGINES:
        reason = engine.reason(rule, gates, tokens)
        said[engine.name] = reason or ("possible" if "chosen" in said.values() else "chosen")
    return said


def plan(rule: Rule, engine: str | Engine = "auto", gates: Gates | None = None, tokens: Pair | None = None) -> Engine:
    """The engine that runs a rule on more than one token.

    Args:
        rule: the rule.
        engine: a name, "auto" for the first that can run it, or an engine of one's own.
        gates: the gates it will get, where known: per-channel gates rule some engines out.
        tokens: the keys and values it will get, where known: kernels want them on CUDA and of certain sizes.

    Raises:
        UsageError: an unknown engine, or one that cannot run the rule, with the reason.
    """
    if isinstance(engine, Engine):
        return engine
    if engine == "auto":
        return next(e for e in ENGINES if e.reason(rule, gates, tokens) is None)
    for candidate in ENGINES:
        if candidate.name == engine:
            if reason := candidate.refuses(rule, gates, tokens):
                raise UsageError(f"engine {engine!r} cannot run this rule: {reason}. Write engine='auto'.")
            return candidate
    raise UsageError(
        f"engine is {engine!r}, which does not exist." + near(engine, [e.name for e in ENGINES] + ["auto"])
    )


def run(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor] | None = None,
    state: State | CacheState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    engine: str | Engine = "auto",
    validate: bool = False,
    where: Layout | None = None,
) -> tuple[Tensor, Any]:
    """Read a sequence and learn from it.

    Args:
        mixer: a `Rule` or `Attention`.
        q: queries [B, T, H, d_k].
        k: keys [B, T, H, d_k].
        v: values [B, T, H, d_v]. q and k may have fewer heads, each then serving a group of value heads. Of a rule with
            n steps a token, k, v and the gates of bias and algorithm have n T tokens.
        gates: {name: [B, T, H, 1] per head or [B, T, H, d] per channel}, one for each of `mixer.gates`: log_alpha <= 0,
            0 <= eta, 0 <= theta < 1, 0 < delta; those that are vectors are [B, T, H, d_k].
        state: where to go on from, as returned by the last call or by `rule.init(weights)`, N rows; None: from nothing,
            for memories that start at zero and for attention.
        mask: bool [B, T], false for padding on either side.
        cu_seqlens: int [N + 1], sequences packed into one row.
        engine: "auto" or a name of `miras.engines.ENGINES`, which all give the same numbers, or one of one's own.
        validate: check ranges and finiteness too, which waits for the device.
        where: the call's layout if already made (then mask and cu_seqlens are not looked at).

    Returns:
        y [B, T, H, d_v] in the dtype of v, zero at padding, and the state after the last token of each sequence.

    Raises:
        UsageError: shapes, dtypes, gates or a state that do not fit, with what was got and what was expected.
    """
    gates = dict(gates or {})
    steps = mixer.algorithm.steps if isinstance(mixer, Rule) else 1
    _check_tokens(q, k, v, steps)
    where = where or layout(q.shape[0], q.shape[1], mask, cu_seqlens, q.device)
    if q.shape[2] != v.shape[2] and isinstance(mixer, Rule):
        q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q, k))
    if isinstance(mixer, Attention):
        if gates or isinstance(state, State):
            raise UsageError("Attention: has no gates and continues only from a state of its own.")
        return mixer.attend(q, k, v, state, where)
    assert isinstance(mixer, Rule)
    _check_gates(mixer, gates, k, v, validate)
    if steps > 1:
        q, gates, where = _one_by_one(mixer, q, gates, where)
    # The state is at least float32, whatever the activations are in: decay of 0.9997 is 1.0 in bfloat16.
    dtype = torch.promote_types(v.dtype, torch.float32)
    start = state if state is not None else _zero_state(mixer, q, v, where.rows, dtype)
    before = _checked(mixer, start, q, v, where)
    if where.dense and q.shape[1] == 1 and engine == "auto":
        chosen = ENGINES[-1]
    else:
        chosen = plan(mixer, engine, gates, (k, v))
    inner = {"q": q, "k": k, "v": v, **gates}
    inner = {n: x.to(dtype) for n, x in inner.items()}
    recent: dict[str, Tensor] = {}
    if mixer.window > 1:
        inner, recent = _in_windows(mixer, inner, before, where)
    before = replace(before, recent={})  # engines see the window in their inputs
    y, after = chosen.run(mixer, before, inner.pop("q"), inner.pop("k"), inner.pop("v"), inner, where)
    return y[:, steps - 1 :: steps].to(v.dtype), replace(after, recent=recent)


def _one_by_one(
    rule: Rule, q: Tensor, gates: dict[str, Tensor], where: Layout
) -> tuple[Tensor, dict[str, Tensor], Layout]:
    """Several steps a token as that many tokens: the first one decays, the last one reads."""
    n = rule.algorithm.steps
    kept = {g.name for g in rule.retention.gates}
    first = torch.arange(q.shape[1] * n, device=q.device) % n == 0
    spread = {
        name: torch.where(first[:, None, None], g.repeat_interleave(n, 1), 0.0) if name in kept else g
        for name, g in gates.items()
    }
    return q.repeat_interleave(n, 1), spread, where.steps(n)


def _in_windows(
    rule: Rule, tokens: dict[str, Tensor], state: State, where: Layout
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a token's gradient is taken of, with that of the window's other tokens side by side along the last axis, and
    what the next call needs of them. Tokens before the first have the weight 0, and gates that no formula breaks at.
    """
    tokens, recent = dict(tokens), {}
    for name in ("k", "v", GAMMA.name, *(g.name for g in rule.bias.gates)):
        x = tokens[name]
        fill = 0.0 if name in ("k", "v", GAMMA.name) else hole(name)
        past = state.recent.get(name, x.new_full((where.rows, rule.window - 1, *x.shape[2:]), fill))
        seen, recent[name] = where.history(x, past)
        tokens[name] = seen.movedim(2, 3).flatten(-2)
    return tokens, recent


def _zero_state(rule: Rule, q: Tensor, v: Tensor, rows: int, dtype: torch.dtype) -> State:
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    if any(leaf.std for leaf in leaves.values()):
        raise UsageError(
            f"run: {rule.memory} starts from a learned memory, so it needs a state. "
            "Write state=rule.init(rule.initial(heads, d_k, d_v), batch=B)."
        )
    weights = {n: v.new_zeros(v.shape[2], leaf.rows, leaf.cols, dtype=dtype) for n, leaf in leaves.items()}
    return rule.init(weights, batch=rows)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
    got = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    written = "T" if steps == 1 else f"{steps} T"
    whole = q.dim() == k.dim() == v.dim() == 4 and k.shape[:2] == v.shape[:2]
    if not whole or k.shape != (q.shape[0], q.shape[1] * steps, *q.shape[2:]):
        raise UsageError(
            f"run: expected q [B, T, H, d_k], k [B, {written}, H, d_k] and v [B, {written}, H, d_v], {got}."
        )
    if v.shape[2] % q.shape[2] != 0 or 0 in v.shape or 0 in q.shape:
        raise UsageError(f"run: the heads of v must be a multiple of those of q and k, and no axis empty, {got}.")
    if not (q.dtype == k.dtype == v.dtype and v.dtype.is_floating_point):
        raise UsageError(f"run: q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")


def _check_gates(rule: Rule, gates: Mapping[str, Tensor], k: Tensor, v: Tensor, validate: bool) -> None:
    expected = {g.name: g for g in rule.gates}
    for name in gates:
        if name not in expected:
            raise UsageError(f"run: gate {name!r} is not one of this rule's." + near(name, list(expected)))
    for name, gate in expected.items():
        if name not in gates:
            raise UsageError(f"run: the rule needs gate {name!r} ({gate.meaning}); got {sorted(gates) or 'no gates'}.")
        time = v.shape[1] // rule.algorithm.steps if gate in rule.retention.gates else v.shape[1]
        shape, tokens = gates[name].shape, (v.shape[0], time, v.shape[2])
        if gate.vector:
            if shape != (*tokens, k.shape[-1]):
                raise UsageError(f"run: gate {name!r} must be a key, {[*tokens, k.shape[-1]]}, got {list(shape)}.")
            continue
        if shape[:-1] != tokens or shape[-1] not in (1, k.shape[-1], v.shape[-1]):
            raise UsageError(
                f"run: gate {name!r} must be {[*tokens, 1]} per head or {[*tokens, v.shape[-1]]} per channel, "
                f"got {list(shape)}."
            )
        if shape[-1] > 1:
            _check_channels(rule, gate, k.shape[-1], v.shape[-1], shape[-1])
        if validate:
            _check_range(gate, gates[name])
    if validate:
        _warn_of_overshoot(rule, gates, k)


def _check_channels(rule: Rule, gate: Gate, d_k: int, d_v: int, width: int) -> None:
    if not gate.channel:
        raise UsageError(f"run: gate {gate.name!r} is one number per head, got {width} channels.")
    if gate in rule.bias.gates:
        return
    if reason := rule.channel_conflict(d_k, d_v):
        raise UsageError(f"run: {reason}; give {gate.name} per head, [B, T, H, 1].")
    for name, leaf in rule.leaves(d_k, d_v).items():
        size = leaf.rows if (leaf.channel == ROWS) != (gate.name == BETA.name) else leaf.cols
        if leaf.channel is not None and size != width:
            raise UsageError(f"run: gate {gate.name!r} acts on the {size} channels of matrix {name}, got {width}.")


def _check_range(gate: Gate, value: Tensor) -> None:
    low, high = value.min().item(), value.max().item()
    # Written so that NaN fails.
    if not (gate.low <= low and high <= gate.high):
        raise UsageError(
            f"run: gate {gate.name!r} must lie in [{gate.low:g}, {gate.high:g}], got values from {low:g} to {high:g}."
        )


def _warn_of_overshoot(rule: Rule, gates: Mapping[str, Tensor], k: Tensor) -> None:
    step = gates["eta"].max().item() * rule.chunk * k.square().sum(-1).max().item()
    if step > 2:
        warnings.warn(
            f"run: eta chunk |k|^2 reaches {step:.2g}; beyond 2 a key repeated in a chunk is stepped past its value. "
            "Use a smaller eta or chunk, or keys of norm 1.",
            stacklevel=4,
        )


def _checked(rule: Rule, state: Any, q: Tensor, v: Tensor, where: Layout) -> State:
    """The state, if it is one of this rule, of these sizes and for these sequences."""
    if not isinstance(state, State):
        raise UsageError(f"run: a Rule continues from a State of its own, got {type(state).__name__}.")
    leaves = rule.leaves(q.shape[-1], v.shape[-1])
    expected = {n: [where.rows, v.shape[2], leaf.rows, leaf.cols] for n, leaf in leaves.items()}
    got = {n: list(a.shape) for n, a in state.dual.items()}
    if got != expected:
        raise UsageError(
            f"run: the state belongs to another rule, size or batch: expected matrices {expected}, got {got}."
        )
    slots = {n: len(s) for n, s in state.slots.items()}
    if any(n != rule.algorithm.slots for n in slots.values()) or bool(state.home) != (rule.retention.to == "initial"):
        raise UsageError(f"run: the state belongs to another rule than {rule.retention} with {rule.algorithm}.")
    return state
