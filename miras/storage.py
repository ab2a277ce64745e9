"""States in files: a stream that stops here and goes on elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from miras.errors import MirasError, UsageError
from miras.rule import Rule, State
from miras.state import tensors


def save_state(path: str | Path, rule: Rule, state: State) -> None:
    """Write a state, its initial memory and slow parameters included, as safetensors with the rule's fingerprint.

    Args:
        path: file to write; it is replaced only once the new one is whole.
        rule: the rule that the state belongs to.
        state: the state.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    about = {
        "rule": json.dumps(rule.to_config()),
        "fingerprint": rule.fingerprint,
        "aligned": json.dumps(state.aligned),
    }
    # A fresh state's dual and origin are one tensor, which the format does not take twice.
    save_file({name: x.detach().clone().contiguous() for name, x in tensors(state).items()}, part, about)
    os.replace(part, path)


def load_state(path: str | Path, rule: Rule, device: str = "cpu") -> State:
    """Read what `save_state` wrote.

    Args:
        path: the file.
        rule: the rule that is to go on.
        device: where to put the tensors.

    Raises:
        UsageError: there is no such file, or it holds the state of another rule, which is then written out.
        MirasError: the file is not one of `save_state`.
    """
    if not Path(path).is_file():
        raise UsageError(f"load_state: there is no file {path}.")
    with safe_open(path, framework="pt", device=device) as file:
        about = file.metadata() or {}
        if "fingerprint" not in about:
            raise MirasError(f"load_state: {path} was not written by save_state.")
        if about["fingerprint"] != rule.fingerprint:
            raise UsageError(
                f"load_state: {path} holds the state of another rule, {about['rule']}; "
                f"this one is {json.dumps(rule.to_config())}."
            )
        found = {name: file.get_tensor(name) for name in file.keys()}

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(f"{name}.")}

    dual, slots = part("dual"), part("slots")
    by_leaf = {n: tuple(slots[f"{n}.{i}"] for i in range(rule.algorithm.slots)) for n in dual}
    aligned = json.loads(about["aligned"])
    rest = {"pending": part("pending"), "recent": part("recent")}
    return State(dual, by_leaf, part("origin"), found["offset"], part("home"), part("slow"), aligned, **rest)
