"""fla's own chunk kernels in Triton's interpreter, with float16 operands, against the token loop.

    TRITON_INTERPRET=1 PYTHONPATH=tests:tests/engines python tests/engines/interpreted_fla.py

A process of its own, for the interpreter is chosen before Triton is imported. Prints {case: {what: error}} as JSON, an
error being the norm of the difference over the norm. bfloat16 is silently wrong in the interpreter.
"""

import builtins
import json
import sys

import test_fla
import torch
import triton.language as tl
from cases import Tokens, call, draw_memory
from triton.runtime.autotuner import Autotuner

from miras.engines import fla


class Index(int):
    """A loop's counter: a tensor in a compiled kernel, a number in the interpreter."""

    def to(self, dtype):
        return self


def make_interpretable():
    """Take away what keeps the kernels from the interpreter: tuning, loop counters, a name that is bound too early."""
    Autotuner._bench = lambda self, *args, **kwargs: [1.0, 1.0, 1.0]
    for kernel in fla.KERNELS:
        fla.load(kernel.name)
    for module in [m for n, m in sys.modules.items() if n.startswith("fla.ops")]:
        module.range = lambda *bounds: map(Index, builtins.range(*map(int, bounds)))
        if hasattr(module, "gather"):
            module.gather = lambda *args, **kwargs: tl.gather(*args, **kwargs)
    fla._unavailable = lambda tokens: None


def outcome(rule, tokens, weights, slow, engine, cu_seqlens):
    leaves = {n: x.clone().requires_grad_() for n, x in (tokens.named() | weights).items()}
    gates = {n: leaves[n] for n in tokens.gates}
    state = rule.init({n: leaves[n] for n in weights}, slow)
    with torch.autocast("cpu", torch.float16, enabled=engine == "fla"):
        given = Tokens(leaves["q"], leaves["k"], leaves["v"], gates)
        y, after = call(rule, given, state, engine=engine, cu_seqlens=cu_seqlens)
    found = {"y": y, "memory": after.dual["w"]}
    torch.manual_seed(1)
    total = sum((x * torch.randn(x.shape)).sum() for x in found.values())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    if "h" in after.dual:
        found.pop("y")  # mesa_net reads in bfloat16, which the interpreter cannot; its gradients are right
    return found | {f"d {n}": grad for n, grad in zip(leaves, grads, strict=True)}


def errors(name, packed):
    torch.manual_seed(0)
    rule, channels, _ = test_fla.CASES[name]
    tokens = test_fla.draw_with(rule, channels, batch=1, time=70, heads=1, d_k=16).map(torch.Tensor.float)
    slow = {n: x.float() for n, x in draw_memory(rule, heads=1, d_k=16)[1].items()}
    weights = {"w": 0.3 * torch.randn(1 + packed, 1, 16, 16)}
    cu_seqlens = torch.tensor([0, 7, 70]) if packed else None
    loop, found = (outcome(rule, tokens, weights, slow, engine, cu_seqlens) for engine in ("recurrence", "fla"))
    return {n: ((found[n] - x).norm() / x.norm().clamp_min(1e-9)).item() for n, x in loop.items()}


if __name__ == "__main__":
    make_interpretable()
    # A pack once for each kernel.
    first = {kernel: name for name, (_, _, kernel) in reversed(test_fla.CASES.items())}
    result = {name: errors(name, False) for name in test_fla.CASES}
    print(json.dumps(result | {f"{name}, packed": errors(name, True) for name in first.values()}))
