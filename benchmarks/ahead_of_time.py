"""Compiles the Triton kernels ahead of time for an H100 or H200 (sm_90), with no GPU, and says what came out.

    python benchmarks/ahead_of_time.py              # every variant, minutes
    python benchmarks/ahead_of_time.py --quick      # a few, seconds

The engine itself is called, with a driver that has no GPU: what is compiled is what would be launched.

Registers and bytes spilled of a thread, shared memory of a program, and matrix instructions: HGMMA, of 4 warps on tiles
of 64 rows, and HMMA, of one warp on smaller ones. Fails where a kernel spills, wants more shared memory than there is,
or has no matrix instruction though it has products.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from miras.algorithm import Momentum
from miras.bias import Huber, Lp
from miras.engines.triton.engine import run
from miras.layout import layout
from miras.memory import SwiGLU
from miras.retention import Bregman, Lq
from miras.rule import Rule
from miras.train.files import write_text
from miras.train.provenance import commit
from miras.variants import variant

RESULTS = Path(__file__).parent / "results" / "kernels.md"
SHARED = 232_448  # bytes that a program may have on sm_90
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ELEMENTWISE = ("read_each_forward", "read_each_backward")
HEADS = 2  # of one Triton would make a special case


class NoGPU:
    """As much of a driver as compiling asks for."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Variant(NamedTuple):
    """A rule, its head size and chunk, and whether its gates are per channel."""

    name: str
    rule: Rule
    d: int
    chunk: int
    channels: bool = False


class Compiled(NamedTuple):
    """What came of a kernel."""

    registers: int
    spilled: int
    shared: int
    hgmma: int
    hmma: int

    def fits(self, kernel: str) -> bool:
        """Whether it is what it should be."""
        multiplies = self.hgmma + self.hmma > 0 or kernel in ELEMENTWISE
        return not self.spilled and self.shared <= SHARED and multiplies


def variants(quick: bool) -> Iterator[Variant]:
    """Models, and one with a gate, at every head size and chunk; other links, biases and channel gates at one; links at
    every token.
    """
    names, sizes = ("yaad", "moneta", "memora", "titans"), [(d, c) for d in (32, 64, 128) for c in (16, 64, 128)]
    if quick:
        names, sizes = ("yaad",), [(64, 64)]
    for name in names:
        yield from (Variant(name, variant(name, c), d, c) for d, c in sizes)
    yaad, memora = variant("yaad", 64), replace(variant("memora", 64), link_at="token")
    yield Variant("memora, token", memora, 64, 64)
    yield from (Variant("yaad, SwiGLU", replace(variant("yaad", c), memory=SwiGLU()), d, c) for d, c in sizes)
    if quick:
        return
    for name in ("moneta", "memora", "titans"):
        yield Variant(f"{name}, SwiGLU", replace(variant(name, 64), memory=SwiGLU()), 64, 64)
    for d, chunk in ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128)):
        yield Variant("yaad, channels", variant("yaad", chunk), d, chunk, True)
    yield Variant("memora, channels", variant("memora", 64), 64, 64, True)
    yield Variant("titans, channels", variant("titans", 64), 64, 64, True)
    yield Variant("yaad, SwiGLU, channels", replace(yaad, memory=SwiGLU()), 64, 64, True)
    yield Variant("mirror link", replace(yaad, retention=Lq(link="mirror", to="initial")), 64, 64)
    yield Variant("mixture Huber", replace(yaad, bias=Huber(form="mixture")), 64, 64)
    yield Variant("paper's l_p", replace(yaad, bias=Lp(form="paper")), 64, 64)
    yield Variant("logistic link", replace(yaad, retention=Bregman(to="initial")), 64, 64)
    yield Variant("chunk of 48", variant("yaad", 48), 64, 48)
    yield Variant("yaad, first order", replace(yaad, first_order=True), 64, 64)
    yield Variant("memora, token", memora, 32, 64)
    yield Variant("memora, token", memora, 128, 64)
    yield Variant("memora, token", replace(memora, chunk=128), 64, 128)
    yield Variant("memora, token, channels", memora, 64, 64, True)
    yield Variant("moneta, token", replace(variant("moneta", 64), link_at="token"), 64, 64)
    yield Variant("logistic, token", replace(memora, retention=Bregman(to="initial")), 64, 64)
    momentum = replace(memora, algorithm=Momentum(rate="input"))
    yield Variant("memora, token, momentum", momentum, 64, 64)
    yield Variant("memora, token, momentum", momentum, 128, 64)
    yield Variant("memora, token, SwiGLU", replace(memora, memory=SwiGLU()), 64, 64)
    yield Variant("memora, token, SwiGLU, momentum", replace(momentum, memory=SwiGLU()), 64, 64)
    yield Variant("L_4, token, SwiGLU", replace(memora, retention=Lq(to="initial"), memory=SwiGLU()), 64, 64)


def compiled(case: Variant) -> dict[str, Compiled]:
    """The kernels that the engine launches for a rule in bfloat16, both ways, each compiled and not run."""
    found: dict[str, Compiled] = {}
    launch = jit.JITFunction.run

    def compile_only(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        if name not in found:
            found[name] = _read(launch(kernel, *given, grid=grid, warmup=True, **named))

    driver.set_active(NoGPU())
    jit.JITFunction.run = compile_only
    try:
        q, k, v = (torch.zeros(1, 2 * case.chunk, HEADS, case.d, requires_grad=True) for _ in range(3))
        width = case.d if case.channels else 1
        gates = {g.name: torch.zeros(1, 2 * case.chunk, HEADS, width if g.channel else 1) for g in case.rule.gates}
        state = case.rule.init(case.rule.initial(HEADS, case.d, case.d))
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = run(case.rule, state, q, k, v, gates, layout(1, 2 * case.chunk))
            y.sum().backward()
    finally:
        jit.JITFunction.run = launch
    return found


def _read(built: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        used, code = (
            subprocess.run([TOOL, how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("--dump-resource-usage", "-sass")
        )
    registers, spilled = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(registers, spilled, built.metadata.shared, code.count("HGMMA."), code.count("HMMA."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only one rule and size, printed")
    quick, bad = parser.parse_args().quick, 0
    lines = ["| rule | d | chunk | kernel | registers | spilled | shared | HGMMA | HMMA |", "|---" * 9 + "|"]
    for case in variants(quick):
        for kernel, found in compiled(case).items():
            bad += not found.fits(kernel)
            numbers = " | ".join(f"{x:,}" for x in found)
            lines.append(f"| {case.name} | {case.d} | {case.chunk} | {kernel} | {numbers} |")
            print(lines[-1], flush=True)
    if not quick:
        about = f"`python benchmarks/ahead_of_time.py` at {commit() or 'unknown'}, triton {triton.__version__}."
        said = f"{about} Operands in bfloat16. No GPU was at hand: nothing here is a time."
        head = ["# Kernels, compiled for sm_90", "", said, ""]
        write_text(RESULTS, "\n".join([*head, *lines]) + "\n")
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main())
