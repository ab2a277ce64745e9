"""The whole product of memory x bias x retention x algorithm: each refused with a reason, or true to the contract.

    python benchmarks/product.py                 # all of it, about half an hour; writes benchmarks/results/product.md
    python benchmarks/product.py --shard 1/4     # a quarter, beside three others; the last to finish writes the table

The rules and the checks are those of the tests (`tests/cases.py`, `tests/contract.py`): engine = token loop in float64
for outputs, states and all outer gradients, in one call, cut in two and packed; causal; gradients finite and not zero;
a written pair recalled better; a step of training in float32 and one under bfloat16 autocast.

It may be stopped at any time and goes on where it stopped: each memory x retention is kept in a file. Rules that
failed are checked again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cases import ALGORITHMS, BIASES, MEMORIES, RETENTIONS, product  # noqa: E402
from contract import Errors, check, recall_not_promised  # noqa: E402

from miras.train.provenance import commit  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "product.md"
FOLDER = ROOT / "runs" / "product"


@dataclass
class Cell:
    """What came of one memory with one retention."""

    memory: str
    retention: str
    commits: list[str]
    passed: int = 0
    forward: float = 0.0
    gradients: float = 0.0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    excused: dict[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> Errors:
        return Errors(self.forward, self.gradients)


def measure(mem, gate, at: str, before: Cell | None = None) -> Cell:
    """Check every rule of a memory and a retention; those that passed before are not checked again."""
    begin, found = time.perf_counter(), product(mem, gate)
    if before is None or before.passed + len(before.failed) != len(found.cases):
        before = None
    cell = before or Cell(str(mem), str(gate), [])
    todo = [case for case in found.cases if before is None or str(case) in before.failed]
    cell.commits = list(dict.fromkeys([*cell.commits, at])) if todo else cell.commits
    cell.failed, worst = {}, cell.errors
    cell.refused = dict(Counter(refusal.kind for refusal in found.refusals))
    cell.frames = dict(Counter(refusal.kind for refusal in found.frames))
    reasons = (recall_not_promised(case.rule) for case in found.cases)
    cell.excused = dict(Counter(reason for reason in reasons if reason))
    for case in todo:
        try:
            worst = worst.worst(check(case))
            cell.passed += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:300]
            cell.failed[str(case)] = f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
    cell.forward, cell.gradients = worst
    cell.seconds += time.perf_counter() - begin
    return cell


def file_of(folder: Path, number: int) -> Path:
    """Where a cell is kept."""
    return folder / f"{number:03d}.json"


def load(path: Path) -> Cell | None:
    """A cell that was measured before, if it was."""
    return Cell(**json.loads(path.read_text())) if path.exists() else None


def save(cell: Cell, path: Path) -> None:
    """Keep a cell, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(cell), indent=1))
    part.replace(path)


def table(rows: Iterable[Sequence[object]], head: Sequence[str]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *([str(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(cells: Sequence[Cell], name: str) -> list[tuple[str, int]]:
    """Reasons with their counts, the most frequent first."""
    return sum((Counter(getattr(cell, name)) for cell in cells), Counter()).most_common()


def summary(cells: Sequence[Cell], axis: str) -> str:
    """A table with a row for each memory or each retention."""
    rows = []
    for name in dict.fromkeys(getattr(cell, axis) for cell in cells):
        own = [cell for cell in cells if getattr(cell, axis) == name]
        worst = Errors(max(c.forward for c in own), max(c.gradients for c in own))
        rows.append((f"`{name}`", *numbers(own), f"{worst.forward:.0e}", f"{worst.gradients:.0e}"))
    return table(rows, (axis, *COUNTS, *ERRORS))


COUNTS, ERRORS = ("passed", "failed", "refused"), ("worst forward", "worst gradient")


def numbers(cells: Sequence[Cell]) -> tuple[int, int, int]:
    """Rules passed and failed, choices refused."""
    return (
        sum(c.passed for c in cells),
        sum(len(c.failed) for c in cells),
        sum(sum(c.refused.values()) for c in cells),
    )


def page(cells: Sequence[Cell], command: str) -> str:
    """The tables, with what they were measured on."""
    passed, failed, refused = numbers(cells)
    whole = len(MEMORIES) * len(RETENTIONS)
    each = [
        (f"`{c.memory}`", f"`{c.retention}`", *numbers([c]), f"{c.forward:.0e}", f"{c.gradients:.0e}") for c in cells
    ]
    classes = len({type(a) for a in ALGORITHMS})
    failures = "".join(f"* `{rule}`: {said}\n" for c in cells for rule, said in c.failed.items())
    failures = f"\n## What fails\n\n{failures}" if failures else ""
    commits = ", ".join(dict.fromkeys(at for c in cells for at in c.commits))
    so_far = "" if len(cells) == whole else f"\n\nSo far: {len(cells)} of {whole} pairs of memory and retention."
    return f"""# The product

**{passed} rules keep the contract, {failed} do not, {refused} choices are refused at construction.**{so_far}

They are {len(MEMORIES)} memories x {len(BIASES)} biases x {len(RETENTIONS)} retentions x {classes} algorithms, each
choice once: the {len(ALGORITHMS)} instances of the algorithms and the frames (chunk, gradient_at, link_at, window,
step_at, read_at, gates per head or channel) are taken in turn.

The contract, on a problem of two rows of 9 tokens in float64: engine = token loop to 1e-9 of the largest entry, for
outputs, the final state and the outer gradients of q, k, v, every gate, W_0 and the slow parameters; the same cut in
two (from the middle of a chunk) and, forward, packed; causal; each of those gradients finite and not zero; the error
of a pair lower after it was written; a step of a layer's training in float32 and one under bfloat16 autocast, in which
everything is finite and every parameter moves. Errors are the worst over the rules of a row, engine against token loop.

## By memory

{summary(cells, "memory")}

## By retention

{summary(cells, "retention")}

## Why choices are refused

{table(((f"{n}", reason) for reason, n in counted(cells, "refused")), ("choices", "reason"))}

Frames passed over on the way to one that goes with the same choice (the one without "Rule" by the tests, not the
library):

{table(((f"{n}", reason) for reason, n in counted(cells, "frames")), ("frames", "reason"))}

Where it is not promised, a pair that was written is only checked to be recalled differently:

{table(((f"{n}", reason) for reason, n in counted(cells, "excused")), ("rules", "reason"))}
{failures}
## Memory and retention

{table(each, ("memory", "retention", *COUNTS, *ERRORS))}

`{command}`, commit {commits}, torch {torch.__version__}, {platform.machine()}
with {os.cpu_count()} cores, {torch.get_num_threads()} threads, {sum(c.seconds for c in cells):.0f} s.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where finished cells are kept")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the tensors are too small for more")
    parser.add_argument("--out", default=str(RESULTS), help="file for the table; - prints it only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Cell]:
    """Check the cells of a shard, print a line for each, and write the table of all that are there."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    torch.set_num_threads(options.threads)
    # PyTorch says once that a norm in bfloat16 has no fused kernel.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    part, parts = map(int, options.shard.split("/"))
    pairs = [(mem, gate) for mem in MEMORIES for gate in RETENTIONS]
    mine, at, begin = range(part - 1, len(pairs), parts), commit() or "unknown", time.perf_counter()
    for done, number in enumerate(mine, 1):
        path = file_of(options.folder, number)
        save(cell := measure(*pairs[number], at, None if options.again else load(path)), path)
        print(
            f"{done}/{len(mine)} {cell.memory} {cell.retention}: {cell.passed} passed, {len(cell.failed)} failed, "
            f"{sum(cell.refused.values())} refused, worst {cell.forward:.0e} and {cell.gradients:.0e}, "
            f"{cell.seconds:.0f} s; {time.perf_counter() - begin:.0f} s in all",
            flush=True,
        )
    cells = [cell for n in range(len(pairs)) if (cell := load(file_of(options.folder, n))) is not None]
    text = page(cells, shlex.join(["python", "benchmarks/product.py", *given]))
    if options.out == "-":
        print(f"\n{text}")
    else:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text)
    return cells


if __name__ == "__main__":
    sys.exit(1 if any(cell.failed for cell in main()) else 0)
