"""Compiles the Triton kernels ahead of time for an H100 or H200 (sm_90), with no GPU, and says what came out.

    python benchmarks/kernels.py              # every variant, minutes
    python benchmarks/kernels.py --quick      # a few, seconds

Registers and bytes spilled of a thread, shared memory of a program, and matrix instructions: HGMMA, of 4 warps on tiles
of 64 rows, and HMMA, of one warp on smaller ones. Fails where a kernel spills more than a few addresses, wants more
shared memory than there is, or has no matrix instruction.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from miras.bias import Huber, Lp
from miras.engines.triton.learn import WARPS, compiled_for, learn_kernel
from miras.engines.triton.learn_back import learn_back_kernel
from miras.engines.triton.model import Model
from miras.retention import Lq
from miras.rule import Rule
from miras.variants import variant

SHARED = 232_448  # bytes that a program may have on sm_90
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = (learn_kernel, learn_back_kernel)
# Bytes that a thread may spill: addresses and the like, computed once a chunk and used once a pass.
SPILLED = 96


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

    @property
    def fits(self) -> bool:
        """Whether it is what it should be."""
        return self.spilled <= SPILLED and self.shared <= SHARED and self.hgmma + self.hmma > 0


def variants(quick: bool) -> Iterator[Variant]:
    """Models at every head size and chunk; other links, biases and channel gates at one."""
    names, sizes = ("yaad", "moneta", "memora", "titans"), [(d, c) for d in (32, 64, 128) for c in (16, 64, 128)]
    if quick:
        names, sizes = ("yaad",), [(64, 64)]
    for name in names:
        yield from (Variant(name, variant(name, c), d, c) for d, c in sizes)
    if quick:
        return
    yaad = variant("yaad", 64)
    yield Variant("yaad, channels", yaad, 64, 64, True)
    yield Variant("titans, channels", variant("titans", 64), 64, 64, True)
    yield Variant("mirror link", replace(yaad, retention=Lq(link="mirror", to="initial")), 64, 64)
    yield Variant("mixture Huber", replace(yaad, bias=Huber(form="mixture")), 64, 64)
    yield Variant("paper's l_p", replace(yaad, bias=Lp(form="paper")), 64, 64)
    yield Variant("chunk of 48", variant("yaad", 48), 64, 48)


def compiled(kernel: Any, case: Variant) -> Compiled:
    """One kernel of a rule in bfloat16, for sm_90."""
    leaves = case.rule.leaves(case.d, case.d)
    widths = (int(bool(case.rule.bias.gates)), 1)
    if case.channels:
        widths = tuple(case.d * w for w in widths)
    model = Model.of(case.rule, leaves)
    constants = compiled_for(case.chunk, case.d, leaves["w2"].rows, *widths, model, tl.bfloat16)
    names = kernel.arg_names
    kinds = {"chunks": "i32", "length": "i32", "first": "*i32", "count": "*i32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): x for n, x in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS, "num_stages": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used, code = (
            subprocess.run([TOOL, how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("--dump-resource-usage", "-sass")
        )
    registers, spilled = (int(re.search(rf"{word}:(\d+)", used)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(registers, spilled, built.metadata.shared, code.count("HGMMA."), code.count("HMMA."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only a few variants")
    bad = 0
    print("| rule | d | chunk | kernel | registers | spilled | shared | HGMMA | HMMA |\n" + "|---" * 9 + "|")
    for case in variants(parser.parse_args().quick):
        for kernel in KERNELS:
            found = compiled(kernel, case)
            bad += not found.fits
            name = kernel.__name__.removesuffix("_kernel")
            print(
                f"| {case.name} | {case.d} | {case.chunk} | {name} |",
                " | ".join(f"{x:,}" for x in found),
                "|",
                flush=True,
            )
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
