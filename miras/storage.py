"""States in files: a stream that stops here and goes on elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import overload

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from miras.attention import Attention, CacheState
from miras.errors import MirasError, UsageError
from miras.layer import LayerState, MirasLayer
from miras.mixer import Mixer
from miras.rule import Rule, State
from miras.state import BatchState, tensors

RULE = "a rule"
"""Whose state a file holds that does not say it: those of before layers' states could be written."""


@overload
def save_state(path: str | Path, of: Rule, state: State) -> None: ...
@overload
def save_state(path: str | Path, of: MirasLayer, state: LayerState) -> None: ...
def save_state(path: str | Path, of: Rule | MirasLayer, state: BatchState) -> None:
    """Write a state, its initial memory and slow parameters included, as safetensors with the rule's fingerprint.

    Args:
        path: file to write; it is replaced only once the new one is whole.
        of: the rule that the state belongs to, or the layer. A layer's other parameters are not in the file.
        state: the state.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    mixer, held = _mixer(of), state.mixer if isinstance(state, LayerState) else state
    about = {
        "rule": json.dumps(mixer.to_config()),
        "fingerprint": mixer.fingerprint,
        "holder": _holder(of),
        "aligned": json.dumps(isinstance(held, State) and held.aligned),
    }
    # A fresh state's dual and origin are one tensor, which the format does not take twice.
    save_file({name: x.detach().clone().contiguous() for name, x in tensors(state).items()}, part, about)
    os.replace(part, path)


@overload
def load_state(path: str | Path, of: Rule, device: str = "cpu") -> State: ...
@overload
def load_state(path: str | Path, of: MirasLayer, device: str = "cpu") -> LayerState: ...
def load_state(path: str | Path, of: Rule | MirasLayer, device: str = "cpu") -> BatchState:
    """Read what `save_state` wrote.

    Args:
        path: the file.
        of: the rule, or the layer, that is to go on.
        device: where to put the tensors.

    Raises:
        UsageError: there is no such file, or it holds the state of another rule or layer, which is then written out.
        MirasError: the file is not one of `save_state`.
    """
    if not Path(path).is_file():
        raise UsageError(f"load_state: there is no file {path}.")
    with safe_open(path, framework="pt", device=device) as file:
        about, mixer = file.metadata() or {}, _mixer(of)
        if "fingerprint" not in about:
            raise MirasError(f"load_state: {path} was not written by save_state.")
        if about["fingerprint"] != mixer.fingerprint:
            raise UsageError(
                f"load_state: {path} holds the state of another rule, {about['rule']}; "
                f"this one is {json.dumps(mixer.to_config())}."
            )
        if (written := about.get("holder", RULE)) != _holder(of):
            raise UsageError(f"load_state: {path} holds the state of {written}, asked for was that of {_holder(of)}.")
        found = {name: file.get_tensor(name) for name in file.keys()}
    aligned = json.loads(about["aligned"])
    if isinstance(of, MirasLayer):
        inner = _restored(mixer, _part(found, "mixer"), aligned)
        return LayerState(inner, found.get("conv"), found["position"])
    return _restored(mixer, found, aligned)


def _mixer(of: Rule | MirasLayer) -> Mixer:
    return of.rule if isinstance(of, MirasLayer) else of


def _holder(of: Rule | MirasLayer) -> str:
    """In words whose state it is, with what a layer's depends on besides its rule."""
    if not isinstance(of, MirasLayer):
        return RULE
    conv = "no convolution" if of.conv is None else f"a convolution over {of.conv.width} tokens"
    return f"a layer of {of.heads} heads of {of.head_dim} and {conv}"


def _part(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(f"{name}.")}


def _restored(mixer: Mixer, found: dict[str, Tensor], aligned: bool) -> State | CacheState:
    if isinstance(mixer, Attention):
        return CacheState(**found)
    assert isinstance(mixer, Rule)
    dual, slots = _part(found, "dual"), _part(found, "slots")
    by_leaf = {n: tuple(slots[f"{n}.{i}"] for i in range(mixer.algorithm.slots)) for n in dual}
    rest = {name: _part(found, name) for name in ("home", "slow", "pending", "recent")}
    return State(dual, by_leaf, _part(found, "origin"), found["offset"], aligned=aligned, **rest)
