"""What `miras` wants to reach on a GPU, and what was measured there: benchmarks/results/<device>.md.

    make bench-gpu                                   # or python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --quick    # the whole flow in seconds without a GPU; its numbers mean nothing

Errors of every engine against the token loop in float64, times of operations, times and memory of models, decoding. The
page is written anew after each case, and a case that fails is a row that says why.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import platform
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_page import Target, made_by, table
from torch import Tensor

from miras import explain, run
from miras.bench.decode import decode
from miras.bench.entries import autocast, build, step, useful_flops
from miras.bench.flops import layer_flops
from miras.bench.sizes import DTYPES, Sizes
from miras.bench.timing import Timing, alternate, machine_calls, machine_speed
from miras.memory import SwiGLU
from miras.rule import Rule
from miras.train.config import SIZES
from miras.train.files import write_text
from miras.train.progress import say
from miras.train.provenance import cpu
from miras.variants import variant

RESULTS = Path(__file__).parent / "results"
KERNELS = ("fla", "triton")
DEEP = ("yaad", "moneta", "memora")
GATED = "yaad, SwiGLU"
MATRIX = (
    *("linear_attention", "retnet", "gla", "mamba2", "deltanet", "gated_deltanet", "homing_deltanet", "kda", "comba"),
    *("rwkv7", "mesa"),
)
AT_TOKENS = "memora, token"
CHANNELS = "yaad, channels"
OPERATIONS = (*DEEP, GATED, AT_TOKENS, CHANNELS, "gated_deltanet", "kda")
MODELS = (*DEEP, "gated_deltanet", "transformer")
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        checked: rules whose errors are measured, see `rule_called`.
        check: on what; a length that is no multiple of the chunk.
        op: an operation, B T H d, forward and backward.
        model: a model; each length in `times` has a batch of `tokens` in all.
        equal: the length at which the memories shall be as fast as attention; beyond it they shall be faster.
        contexts: tokens read before the one that is decoded.
        rounds: how often a model is timed.
    """

    checked: tuple[str, ...]
    check: Sizes
    op: Sizes
    model: Sizes
    times: tuple[int, ...]
    tokens: int
    equal: int
    contexts: tuple[int, ...]
    rounds: int = 3

    def on(self, device: str) -> Scale:
        """The same on a device."""
        return replace(self, **{n: getattr(self, n).with_(device=device) for n in ("check", "op", "model")})


_340M = SIZES["340m"]
_SHAPE = Sizes(
    dim=_340M.dim, heads=_340M.heads, layers=_340M.layers, vocab=32_000, chunk=64, dtype="bfloat16", level="model"
)
FULL = Scale(
    checked=(*DEEP, GATED, AT_TOKENS, CHANNELS, *MATRIX),
    check=Sizes(batch=2, time=200, dim=128, heads=2, chunk=64),
    op=_SHAPE.with_(batch=4, time=8192, level="layer"),
    model=_SHAPE,
    times=(2048, 4096, 8192, 16_384, 32_768),
    tokens=32_768,
    equal=8192,
    contexts=(1024, 65_536, 1_048_576),
)
_TINY = Sizes(batch=1, time=24, dim=32, heads=2, layers=1, chunk=8, vocab=64, dtype="bfloat16")
QUICK = Scale(
    checked=("yaad", GATED, AT_TOKENS, CHANNELS, "gla", "gated_deltanet"),
    check=_TINY.with_(time=12),
    op=_TINY,
    model=_TINY.with_(level="model"),
    times=(16, 32),
    tokens=32,
    equal=16,
    contexts=(64, 128),
    rounds=1,
)


@dataclass
class Results:
    """Rows of the four parts.

    Attributes:
        scale: what is measured.
        write: called after each case.
        ceiling: FLOP/s of a matrix product in bfloat16.
    """

    scale: Scale
    write: Callable[[Results], None]
    ceiling: float
    checks: list[Row] = field(default_factory=list)
    ops: list[Row] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    decoded: list[Row] = field(default_factory=list)

    def add(self, rows: list[Row], case: Row, measure: Callable[[], Sequence[Row]]) -> None:
        """The rows that `measure` gives of a case, or one with the reason why it gives none."""
        say(" ".join(f"{word:,}" if isinstance(word, int) else word for word in case.values()))
        try:
            rows += [case | found for found in measure()]
        except Exception as error:  # an engine that fails here is a result, and the others are still to be measured
            traceback.print_exc()
            full = isinstance(error, torch.OutOfMemoryError)
            note = "out of memory" if full else f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(case | {"note": note})
        if self.scale.op.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        self.write(self)


# -- one rule on random tokens ----------------------------------------------------------------------------------------


def rule_called(name: str, chunk: int) -> Rule:
    """A variant, or one with another memory, `GATED`, its link at every token, `AT_TOKENS`, or gates per channel."""
    rule = variant(name.partition(", ")[0], chunk)
    assert isinstance(rule, Rule)
    if name == AT_TOKENS:
        return replace(rule, link_at="token")
    if name == CHANNELS:
        return replace(rule, inputs=replace(rule.inputs, alpha="channel"))
    return replace(rule, memory=SwiGLU()) if name == GATED else rule


def draw(rule: Rule, sizes: Sizes) -> dict[str, Tensor]:
    """q, k, v, gates and the initial memory ("memory." before a leaf's name), float32."""
    generator = torch.Generator().manual_seed(0)
    d, kept = sizes.head_dim, {gate.name for gate in rule.retention.gates}

    def normal(width: int) -> Tensor:
        return torch.randn(sizes.batch, sizes.time, sizes.heads, width, generator=generator)

    x = {"q": F.normalize(normal(d), dim=-1), "k": F.normalize(normal(d), dim=-1), "v": normal(d)}
    for gate in rule.gates:
        if gate.vector:
            x[gate.name] = F.normalize(normal(d), dim=-1)
            continue
        width = d if gate.name in kept and rule.inputs.alpha == "channel" else 1
        # alpha of about 0.9 forgets within the sequence.
        centre = 2.0 if gate.name in kept else gate.unsquash(gate.init)
        x[gate.name] = gate.squash(normal(width) + centre)
    initial = rule.initial(sizes.heads, d, d, generator)
    return x | {f"memory.{n}": w for n, w in initial.items()}


def leaves(x: dict[str, Tensor], sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same on the device, to take derivatives of."""
    return {n: t.to(sizes.device, dtype).requires_grad_() for n, t in x.items()}


def learn(rule: Rule, x: dict[str, Tensor], sizes: Sizes, engine: str) -> dict[str, Tensor]:
    """Outputs and the memory that is left, products in the dtype of `sizes`."""
    gates = {gate.name: x[gate.name] for gate in rule.gates}
    initial = {n.removeprefix("memory."): w for n, w in x.items() if n.startswith("memory.")}
    start = rule.init(initial, batch=sizes.batch)
    with autocast(sizes):
        y, state = run(rule, x["q"], x["k"], x["v"], gates, start, engine=engine)
    return {"y": y, **state.dual}


def able(rule: Rule, x: dict[str, Tensor], sizes: Sizes) -> tuple[list[str], str]:
    """The engines that can run the rule here, the preferred one first, and the one of plain PyTorch."""
    gates = {gate.name: x[gate.name] for gate in rule.gates}
    with autocast(sizes):
        said = explain(rule, gates, (x["k"].to(sizes.device), x["v"].to(sizes.device)))
    names = [name for name, word in said.items() if word in ("chosen", "possible")]
    return names, next(name for name in names if name not in KERNELS)


# -- errors -----------------------------------------------------------------------------------------------------------


def outcome(rule: Rule, x: dict[str, Tensor], sizes: Sizes, engine: str) -> dict[str, Tensor]:
    """Outputs, the last memory, and the gradients of a weighted sum of both, in float64 on a CPU."""
    found = learn(rule, x, sizes, engine)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(t.shape, generator=generator).to(t) for t in found.values())
    total = sum((t * w).sum() for t, w in zip(found.values(), weights, strict=True))
    grads = torch.autograd.grad(total, list(x.values()), allow_unused=True, materialize_grads=True)
    found |= {f"d {n}": grad for n, grad in zip(x, grads, strict=True)}
    return {n: t.detach().double().cpu() for n, t in found.items()}


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of the error over that of the value, tensor by tensor."""
    tiny = torch.finfo(torch.float64).tiny
    return {n: ((got[n] - x).norm() / x.norm().clamp_min(tiny)).item() for n, x in expected.items()}


def check(results: Results, name: str) -> None:
    """Errors of every engine that can run a rule."""
    sizes = results.scale.check
    rule = rule_called(name, sizes.chunk)
    drawn = draw(rule, sizes)
    exact = outcome(rule, leaves(drawn, sizes, torch.float64), sizes.with_(dtype="float32"), "recurrence")
    for dtype in DTYPES:
        case = sizes.with_(dtype=dtype)
        (engines, plain), errors = able(rule, drawn, case), {}
        for engine in dict.fromkeys(["recurrence", plain, *engines]):
            beside = {"recurrence": None, plain: "recurrence"}.get(engine, plain)
            row = {"name": name, "dtype": dtype, "engine": engine}
            results.add(results.checks, row, partial(error_rows, rule, drawn, case, engine, exact, errors, beside))


def error_rows(
    rule: Rule,
    drawn: dict[str, Tensor],
    sizes: Sizes,
    engine: str,
    exact: dict[str, Tensor],
    errors: dict[str, dict[str, float]],
    beside: str | None,
) -> list[Row]:
    """Errors of outputs and of gradients (the worst), and how many times those of another engine they are."""
    own = errors[engine] = apart(outcome(rule, leaves(drawn, sizes), sizes, engine), exact)
    row = {"forward": own["y"], "gradients": _largest(e for n, e in own.items() if n.startswith("d "))}
    if beside in errors:
        # With the rounding of float32 itself added, of which twice is 1e-6.
        row |= {"beside": beside, "times": _largest(e / (errors[beside][n] + 5e-7) for n, e in own.items())}
    return [row]


def _largest(values: Iterable[float]) -> float:
    return torch.tensor(list(values)).max().item()  # keeps NaN


# -- times ------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: str) -> float:
    """The median time of a call."""
    if device == "cpu":
        return alternate({"": call}, 1)[""].median
    testing = importlib.import_module("triton.testing")
    return testing.do_bench(call, warmup=100, rep=500, return_mode="median") / 1000


def product_speed(sizes: Sizes) -> float:
    """FLOP/s of a matrix product in the dtype of a case."""
    timings = {n: Timing(seconds=[seconds(call, sizes.device)]) for n, call in machine_calls(sizes).items()}
    return machine_speed(timings, sizes)["flops_per_second"]


def operate(results: Results, name: str) -> None:
    """One rule forward and backward by kernels and by plain PyTorch, without the layer around it."""
    sizes = results.scale.op
    rule = rule_called(name, sizes.chunk)
    x = leaves(draw(rule, sizes), sizes)
    engines, plain = able(rule, x, sizes)
    for engine in engines:
        if engine in (plain, *KERNELS):
            row = {"name": name, "engine": engine}
            results.add(results.ops, row, partial(op_rows, rule, x, sizes, engine, results))


def op_rows(rule: Rule, x: dict[str, Tensor], sizes: Sizes, engine: str, results: Results) -> list[Row]:
    """Time of an operation, and its useful FLOP/s as a part of the ceiling."""

    def call() -> None:
        y = learn(rule, x, sizes, engine)["y"]
        torch.autograd.grad(y, list(x.values()), torch.ones_like(y), allow_unused=True)

    parts = layer_flops(rule, sizes)
    took = seconds(call, sizes.device)
    row = {"ms": 1000 * took, "tokens_per_second": sizes.tokens / took}
    if parts is None:
        return [row]
    flops = (sum(parts.values()) - parts["maps"]) * sizes.tokens
    return [row | {"of_ceiling": flops / took / results.ceiling}]


def model_rows(name: str, sizes: Sizes, results: Results) -> list[Row]:
    """Forward and backward of a whole model."""
    call = step(build(name, sizes), sizes)
    call()  # chooses kernels and compiles them
    row = {}
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        row["peak"] = torch.cuda.max_memory_allocated()
    timing = alternate({name: call}, results.scale.rounds, 0, sizes.device)[name]
    row |= {"ms": 1000 * timing.median, "spread": timing.spread, "tokens_per_second": sizes.tokens / timing.median}
    flops = useful_flops(name, sizes)
    return [row if flops is None else row | {"of_ceiling": flops / timing.median / results.ceiling}]


def decode_rows(name: str, results: Results) -> list[Row]:
    """One token after each context, all of them in turn."""
    scale = results.scale
    return decode([name], scale.model, scale.contexts, 4 * scale.rounds, lambda label: None)


# -- the page ---------------------------------------------------------------------------------------------------------


def find(rows: Sequence[Row], number: str, **wanted: Any) -> float | None:
    """A number of the row that has these values."""
    return next((row.get(number) for row in rows if wanted.items() <= row.items()), None)


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, where both were measured."""
    return None if a is None or b is None else a / b


def targets(results: Results) -> list[Target]:
    """The lines of the first table, as far as they were measured."""
    scale, found = results.scale, []
    for dtype in DTYPES:
        worst = [r["times"] for r in results.checks if r["engine"] in KERNELS and r["dtype"] == dtype and "times" in r]
        what = f"error of a kernel in {dtype} against the plain engine's, the largest"
        found.append(Target(what, _largest(worst) if worst else None, 2.0, least=False))
    for name in DEEP:
        parts = [row["of_ceiling"] for row in results.ops if row["name"] == name and "of_ceiling" in row]
        what = f"{name.capitalize()}'s operation, chunk {scale.op.chunk}: part of the ceiling in bfloat16"
        found.append(Target(what, max(parts, default=None), 0.3, unit="%"))
    for name in DEEP[:2]:
        for time in (time for time in scale.times if time >= scale.equal):
            speed, peer = (find(results.models, "tokens_per_second", name=n, time=time) for n in (name, "transformer"))
            what = f"{name.capitalize()} against the Transformer, T = {time:,}: training tokens/s"
            found.append(Target(what, ratio(speed, peer), 1.0))
        memora, own = (find(results.models, "ms", name=n, time=scale.equal) for n in ("memora", name))
        what = f"Memora's time against {name.capitalize()}'s, T = {scale.equal:,}"
        found.append(Target(what, ratio(memora, own), 1.1, least=False))
    for name in DEEP:
        peak, peer = (find(results.models, "peak", name=n, time=scale.equal) for n in (name, "transformer"))
        what = f"{name.capitalize()}'s peak memory against the Transformer's, T = {scale.equal:,}"
        found.append(Target(what, ratio(peak, peer), 1.0, least=False))
        late, soon = (find(results.decoded, "ms", name=name, context=scale.contexts[i]) for i in (-1, 0))
        what = (
            f"{name.capitalize()}'s time of a decoded token after {scale.contexts[-1]:,} against {scale.contexts[0]:,}"
        )
        found.append(Target(what, ratio(late, soon), 1.1, least=False))
    return found


def cells(row: Row, *numbers: tuple[str, str, float]) -> list[str]:
    """Numbers of a row, (name, format, scale); empty where they were not measured."""
    return ["" if row.get(n) is None else format(scale * row[n], form) for n, form, scale in numbers]


def page(results: Results, made: str) -> str:
    """The page of results so far; `made` says how."""
    check, op, model = results.scale.check, results.scale.op, results.scale.model
    checks = [
        (
            *(row["name"], row["dtype"], row["engine"]),
            *cells(row, ("forward", ".1e", 1), ("gradients", ".1e", 1)),
            f"{row['times']:.2f} x {row['beside']}" if "times" in row else "",
            row.get("note", ""),
        )
        for row in results.checks
    ]
    speed = (("ms", ",.2f", 1), ("tokens_per_second", ",.0f", 1), ("of_ceiling", ".0f", 100))
    ops = [(row["name"], row["engine"], *cells(row, *speed), row.get("note", "")) for row in results.ops]
    speed = (*speed, ("spread", ".0f", 100), ("peak", ",.2f", 1e-9))
    models = [
        (row["name"], f"{row['time']:,}", str(row["batch"]), *cells(row, *speed), row.get("note", ""))
        for row in results.models
    ]
    late = (("context", ",", 1), ("ms", ".2f", 1), ("spread", ".0f", 100), ("state_bytes", ",.1f", 1e-6))
    decoded = [(row["name"], *cells(row, *late), row.get("note", "")) for row in results.decoded]
    return f"""# Targets on a GPU: {device_name(op.device)}

{table([target.row() for target in targets(results)], ("", "target", "measured", "", ""))}

## Errors

Root mean square of the error over that of the value, against the token loop in float64 on the same float32 inputs:
outputs; the worst of all gradients; and, of outputs, last memory and gradients, the largest ratio to the same error of
the plain engine (of the token loop where that is the plain engine itself). bfloat16: products under autocast, the rest
in float32. B = {check.batch}, T = {check.time}, H = {check.heads}, d = {check.head_dim}, chunk {check.chunk}.

{table(checks, ("rule", "products", "engine", "outputs", "gradients", "beside", ""))}

## Operations

`miras.run`, forward and backward, products in bfloat16: B = {op.batch}, T = {op.time:,}, H = {op.heads},
d = {op.head_dim}, chunk {op.chunk}. The ceiling is the rate of a matrix product in bfloat16 in this run,
{results.ceiling / 1e12:,.1f} TFLOP/s; FLOPs are the useful ones by `miras/bench/flops.py`. Medians of
`triton.testing.do_bench`.

{table(ops, ("rule", "engine", "ms", "tokens/s", "% of ceiling", ""))}

## Models

D = {model.dim}, {model.layers} layers, {model.heads} heads, {model.vocab:,} tokens, chunk {model.chunk},
{results.scale.tokens:,} tokens a step, bfloat16 under autocast; forward and backward, without the optimizer's step.
Attention is PyTorch's scaled_dot_product_attention. Peak memory: `torch.cuda.max_memory_allocated`, parameters and
gradients included.

{table(models, ("model", "T", "B", "ms", "tokens/s", "% of ceiling", "spread %", "peak GB", ""))}

## Decoding

One token, one sequence, the same models; the state of a long context by setting its position.

{table(decoded, ("model", "context", "ms/token", "spread %", "MB of state", ""))}

{made}.
"""


def device_name(device: str) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu()


def machine(device: str) -> list[str]:
    """The device, its driver, and the packages with kernels."""
    said = [device_name(device), platform.platform(terse=True)]
    if device == "cuda":
        said.append(f"CUDA {torch.version.cuda}")
        if shutil.which("nvidia-smi"):
            words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            said += [f"driver {word}" for word in subprocess.check_output(words, text=True).split()[:1]]
    for package in ("triton", "fla-core"):
        if importlib.util.find_spec(package.removesuffix("-core")):
            said.append(f"{package} {version(package)}")
    return said


def page_of(device: str, quick: bool) -> str:
    """Where the page goes if nobody says: results/h200.md for an NVIDIA H200; nowhere where numbers mean nothing."""
    if quick or device == "cpu":
        return "-"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().removeprefix("nvidia ")).strip("-")
    return str(RESULTS / f"{name}.md")


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure all parts; print and write the page."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once, for a check")
    parser.add_argument("--out", help="file for the page; - prints it only; left out: results/<device>.md")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "benchmarks/gpu.py needs an NVIDIA GPU and a PyTorch that was built for it.\n")
    scale = (QUICK if options.quick else FULL).on(options.device)
    out = options.out or page_of(options.device, options.quick)
    made = made_by(shlex.join(["python", "benchmarks/gpu.py", *given]), *machine(options.device))

    def write(results: Results) -> None:
        if out != "-":
            write_text(Path(out), page(results, made))

    results = Results(scale, write, product_speed(scale.op))
    for name in scale.checked:
        check(results, name)
    for name in OPERATIONS:
        operate(results, name)
    for time in scale.times:
        for name in MODELS:
            sizes = scale.model.with_(time=time, batch=scale.tokens // time)
            row = {"name": name, "time": time, "batch": sizes.batch}
            results.add(results.models, row, partial(model_rows, name, sizes, results))
    for name in MODELS:
        results.add(results.decoded, {"name": name}, partial(decode_rows, name, results))
    print(page(results, made))
    return results


if __name__ == "__main__":
    main()
