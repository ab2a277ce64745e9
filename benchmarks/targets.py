"""What `miras` wants to reach on a CPU, and what was measured: benchmarks/results/cpu.md.

    python benchmarks/targets.py --threads 1        # about ten minutes
    python benchmarks/targets.py --quick --out -    # tiny sizes, for a check; its numbers mean nothing

All entries of a part take turns in one run and medians are compared; peak memory is the median of three processes for
each. A ratio of times is "so many times as fast".
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from results_page import Target, made_by, table

from miras.bench.decode import decode
from miras.bench.entries import PEERS, build, chunk_of, step, useful_flops
from miras.bench.memory import available, peak_memory
from miras.bench.progress import Steps
from miras.bench.run import machine
from miras.bench.sizes import Sizes
from miras.bench.timing import Timing, alternate, machine_calls, machine_speed
from miras.errors import MirasError
from miras.hf import MirasConfig, MirasForCausalLM
from miras.process import keep_memory
from miras.train.bar import Bar
from miras.train.files import write_text

RESULTS = Path(__file__).parent / "results" / "cpu.md"
DEEP, PEER = ("yaad", "moneta", "memora"), "titans-pytorch"


@dataclass(frozen=True)
class Scale:
    """Sizes of everything, `layer` those of the targets; and how much is done."""

    layer: Sizes
    long: int
    model: Sizes
    model_times: tuple[int, ...]
    model_tokens: int
    contexts: tuple[int, int]
    chunks: tuple[int, int]
    rounds: int = 5
    memory: bool = True


FULL = Scale(Sizes(), 65_536, Sizes(level="model"), (256, 8192), 8192, (1024, 1_048_576), (64, 16))
TINY = Sizes(batch=1, time=32, dim=16, heads=2, layers=1)
QUICK = Scale(TINY, 64, TINY.with_(level="model"), (16, 32), 32, (64, 128), (8, 4))


@dataclass
class Measured:
    """Cases of one part: times, peaks, and why something is missing.

    Attributes:
        cases: {label: (entry, sizes)}.
        timings: by label, as far as they were measured.
        peaks: bytes by label, likewise.
        notes: what is missing, by label.
        ceiling: FLOP/s of the machine's own matrix product in the same run.
    """

    cases: Mapping[str, tuple[str, Sizes]]
    timings: dict[str, Timing] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    ceiling: float = 0.0

    def faster(self, label: str, than: str) -> float | None:
        """How many times as fast, by the tokens of each."""
        if label not in self.timings or than not in self.timings:
            return None
        return self.seconds(than) / self.seconds(label)

    def smaller(self, label: str, than: str) -> float | None:
        """Peak memory as a part of another's."""
        return self.peaks[label] / self.peaks[than] if {label, than} <= self.peaks.keys() else None

    def seconds(self, label: str) -> float:
        """Median seconds of one token."""
        return self.timings[label].median / self.cases[label][1].tokens

    def of_ceiling(self, label: str) -> float | None:
        """Useful FLOP/s as a part of the ceiling."""
        flops = useful_flops(*self.cases[label])
        if flops is None or label not in self.timings:
            return None
        return flops / self.timings[label].median / self.ceiling

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each case, for the second table."""
        rows = []
        for label, (name, sizes) in self.cases.items():
            chunk = chunk_of(name, sizes)
            where = (label, sizes.level, str(sizes.batch), f"{sizes.time:,}", "" if chunk is None else str(chunk))
            if (timing := self.timings.get(label)) is None:
                rows.append((*where, "-", "", "", "", "", self.notes.get(label, "")))
                continue
            part = self.of_ceiling(label)
            peak = f"{self.peaks[label] / 1e6:,.0f}" if label in self.peaks else ""
            numbers = (
                f"{1000 * timing.median:,.0f}",
                f"{100 * timing.spread:.0f} %",
                f"{1 / self.seconds(label):,.0f}",
            )
            rows.append((*where, *numbers, "" if part is None else f"{100 * part:.0f} %", peak, PASSES[sizes.backward]))
        return rows


PASSES = {True: "forward + backward", False: "forward"}
# Peak memory of one call differs by a tenth from process to process.
PROCESSES = 3
HEAD = ("case", "level", "B", "T", "chunk", "ms", "spread", "tokens/s", "of ceiling", "peak MB", "")


def measure(
    cases: Mapping[str, tuple[str, Sizes]], rounds: int, told: Callable[[str], None], memory: Sequence[str] = ()
) -> Measured:
    """Peak memory of the cases named, the median of some processes each, then the times of all in turn."""
    found, calls = Measured(cases), {}
    for label, (name, sizes) in cases.items():
        try:
            calls[label] = step(build(name, sizes), sizes)
            if label in memory:
                told(f"memory of {label}")
                peaks = (peak_memory(name, sizes, torch.get_num_threads()) for _ in range(PROCESSES))
                found.peaks[label] = median_low(peaks)
        except MirasError as error:
            found.notes[label] = str(error)
            calls.pop(label, None)
    any_sizes = next(iter(cases.values()))[1]
    found.timings = alternate(calls, rounds, 1, any_sizes.device, told, machine_calls(any_sizes))
    found.ceiling = machine_speed(found.timings, any_sizes)["flops_per_second"]
    return found


def layers(scale: Scale, told: Callable[[str], None]) -> tuple[Measured, list[Target]]:
    """Whole layers, forward and backward, beside the peers."""
    large, small = scale.chunks
    sizes = scale.layer.with_(chunk=large)
    cases = {
        **deep("", scale.layer, scale.chunks),
        "yaad, channel gates": ("yaad", sizes.with_(gates="channel")),
        "gated_deltanet": ("gated_deltanet", scale.layer),
        "transformer": ("transformer", scale.layer),
        "transformers": ("transformers", scale.layer),
        "sdpa": ("sdpa", scale.layer),
    }
    seen = measure(cases, scale.rounds, told, list(cases) if scale.memory else ())
    yaad = f"yaad, chunk {large}"
    return seen, [
        *against_titans(seen, {large: 2.0, small: 10.0}),
        Target(f"Yaad's fraction of the float32 ceiling, chunk {large}", seen.of_ceiling(yaad), 0.45, unit="%"),
        *(
            Target(
                f"{name.capitalize()}'s time against Yaad's, chunk {large}",
                seen.faster(yaad, f"{name}, chunk {large}"),
                1.3,
                least=False,
            )
            for name in DEEP[1:]
        ),
        Target(
            "Gated DeltaNet against transformers' in PyTorch: speed", seen.faster("gated_deltanet", "transformers"), 2.0
        ),
        Target("the same: peak memory", seen.smaller("gated_deltanet", "transformers")),
        Target(
            "Yaad with channel gates against head gates: time",
            seen.faster(yaad, "yaad, channel gates"),
            2.0,
            least=False,
        ),
        Target("Yaad against attention (SDPA between linear maps): speed", seen.faster(yaad, "sdpa")),
    ]


def plain(scale: Scale, told: Callable[[str], None]) -> tuple[Measured, list[Target]]:
    """The three and titans-pytorch as a program of one's own runs them, before this process is told to keep memory."""
    large, small = scale.chunks
    kind = ", plain process"
    seen = measure(deep(kind, scale.layer, scale.chunks), scale.rounds, told)
    return seen, against_titans(seen, {large: 2.0, small: 10.0}, kind, kind)


def rounded(scale: Scale, told: Callable[[str], None]) -> tuple[Measured, list[Target]]:
    """The same with bfloat16 operands, beside titans-pytorch in float32 and under the same autocast."""
    large, small = scale.chunks
    kind = ", bfloat16"
    cases = deep(kind, scale.layer.with_(dtype="bfloat16"), scale.chunks)
    cases |= {label: case for label, case in deep("", scale.layer, scale.chunks).items() if case[0] == PEER}
    seen = measure(cases, scale.rounds, told)
    return seen, [
        *against_titans(seen, {large: 3.0, small: 15.0}, kind),
        *against_titans(seen, {large: None, small: None}, kind, kind),
    ]


def deep(kind: str, sizes: Sizes, chunks: Sequence[int]) -> dict[str, tuple[str, Sizes]]:
    """The three and the peer at some chunks."""
    return {
        f"{name}{kind}, chunk {chunk}": (name, sizes.with_(chunk=chunk)) for chunk in chunks for name in (*DEEP, PEER)
    }


def against_titans(
    seen: Measured, bounds: Mapping[int, float | None], kind: str = "", peer_kind: str = ""
) -> list[Target]:
    """Speed of the three against the peer, with its bounds by chunk, and peak memory where it was measured."""
    targets = []
    for chunk, bound in bounds.items():
        peer = f"{PEER}{peer_kind}, chunk {chunk}"
        for name in DEEP:
            own = f"{name}{kind}, chunk {chunk}"
            targets.append(Target(f"{own.capitalize()}, against {peer}: speed", seen.faster(own, peer), bound))
            if seen.peaks:
                targets.append(Target("the same: peak memory", seen.smaller(own, peer), 0.25, least=False))
    return targets


def long(scale: Scale, told: Callable[[str], None]) -> tuple[Measured, list[Target]]:
    """Cost per token of a long sequence against a short one; forward alone where a graph would not fit."""
    short = scale.layer.with_(batch=1, chunk=scale.chunks[0])
    told("memory of a short sequence")
    need = peak_memory("yaad", short, torch.get_num_threads()) * scale.long / short.time if scale.memory else 0
    fits = need < 0.7 * available(short.device)
    short = short.with_(backward=fits)
    cases = {"yaad, short": ("yaad", short), "yaad, long": ("yaad", short.with_(time=scale.long))}
    seen = measure(cases, min(scale.rounds, 3), told, list(cases) if scale.memory else ())
    ratio = seen.seconds("yaad, long") / seen.seconds("yaad, short")
    note = PASSES[fits] if fits else f"forward alone: with a graph it would need {need / 1e9:.0f} GB"
    what = f"Yaad's time per token at T = {scale.long:,} against {short.time:,}"
    memory = seen.smaller("yaad, long", "yaad, short")
    share = None if memory is None else memory * short.time / scale.long
    return seen, [
        Target(what, ratio, 1.1, least=False, note=note),
        Target("the same: peak memory per token", share, 1.0, least=False),
    ]


def models(scale: Scale, told: Callable[[str], None]) -> tuple[Measured, list[Target]]:
    """A whole tiny model's tokens/s against the Transformer's."""
    cases = {}
    for time in scale.model_times:
        sizes = scale.model.with_(time=time, batch=max(1, scale.model_tokens // time), chunk=scale.chunks[0])
        cases |= {f"{name} model, T {time:,}": (name, sizes) for name in (*DEEP, "gated_deltanet", "transformer")}
    seen = measure(cases, scale.rounds, told)
    targets = []
    for time in scale.model_times:
        for name in DEEP:
            ratio = seen.faster(f"{name} model, T {time:,}", f"transformer model, T {time:,}")
            bound = 1.0 if time == scale.model_times[-1] else 1 / 3
            what = f"tiny {name.capitalize()} against the tiny Transformer, T = {time:,}: tokens/s"
            targets.append(Target(what, ratio, bound))
    return seen, targets


def decoding(scale: Scale, told: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Target]]:
    """One token of a tiny model after a short and after a long context."""
    rows = decode(
        [*DEEP, "gated_deltanet"], scale.model.with_(chunk=scale.chunks[0]), scale.contexts, 4 * scale.rounds, told
    )
    targets = []
    for name in DEEP:
        short, late = (row["ms"] for row in rows if row["name"] == name)
        what = (
            f"tiny {name.capitalize()}, ms per decoded token after {scale.contexts[1]:,} against {scale.contexts[0]:,}"
        )
        note = f"{late:.2f} against {short:.2f} ms"
        targets.append(Target(what, late / short, 1.1, least=False, note=note))
    return rows, targets


@torch.no_grad()
def generating(scale: Scale, told: Callable[[str], None]) -> list[Target]:
    """A token of `generate` against one step of each layer alone, from the same states."""
    sizes, calls, new = scale.model, {}, 32
    for name in DEEP:
        config = {"hidden_size": sizes.dim, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads}
        model: Any = MirasForCausalLM(MirasConfig(mixer=name, chunk=scale.chunks[0], **config)).eval()
        prompt = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
        states = model(prompt, use_cache=True).past_key_values.states()
        layers, one = [block.mixer for block in model.model.backbone.blocks], torch.randn(1, 1, sizes.dim)

        def steps(layers: Any = layers, states: Any = states, one: Any = one) -> None:
            for layer, state in zip(layers, states, strict=True):
                torch.no_grad()(layer)(one, state)

        def text(model: Any = model, prompt: Any = prompt, more: int = 1) -> None:
            model.generate(prompt, max_new_tokens=more, min_new_tokens=more, do_sample=False, pad_token_id=0)

        calls |= {f"{name}, layers": steps, f"{name}, one token": text}
        calls[f"{name}, more tokens"] = lambda text=text: text(more=1 + new)
    found = {name: timing.median for name, timing in alternate(calls, 2 * scale.rounds, told=told).items()}
    targets = []
    for name in DEEP:
        token = (found[f"{name}, more tokens"] - found[f"{name}, one token"]) / new
        layer = found[f"{name}, layers"]
        what = f"tiny {name.capitalize()}, a token of `generate` against one step of its layers: time"
        note = f"{1000 * token:.2f} against {1000 * layer:.2f} ms"
        targets.append(Target(what, token / layer, 1.5, least=False, note=note))
    return targets


def page(parts: Sequence[Measured], decoded: list[dict[str, Any]], targets: list[Target], command: str) -> str:
    """The page of results."""
    here, size = machine("cpu"), next(iter(parts[0].cases.values()))[1]
    model = next(iter(parts[-1].cases.values()))[1]
    cells = [
        (
            row["name"],
            f"{row['context']:,}",
            f"{row['ms']:.2f}",
            f"{100 * row['spread']:.0f} %",
            f"{row['state_bytes']:,}",
        )
        for row in decoded
    ]
    ceilings = ", ".join(f"{part.ceiling / 1e9:.0f}" for part in parts)
    peers = "\n".join(f"* {name}: {peer.about}" for name, peer in PEERS.items())
    return f"""# Targets on a CPU

Layers: B = {size.batch}, T = {size.time:,}, D = {size.dim}, H = {size.heads}, float32, forward and backward, the whole
layer; "bfloat16": parameters in float32 under autocast; "plain process": before glibc is told to keep freed memory, as
commands of `miras` tell it. Models: `tiny`, D = {model.dim}, {model.layers} layers. A line with no target is only
stated.

{table([target.row() for target in targets], ("", "target", "measured", "", ""))}

## What was measured

Medians of calls in turn; "spread" is the slowest less the fastest over the median. The ceiling is the rate of a float32
matrix product of 1,024 x 1,024 x 1,024 between the calls of the same part ({ceilings} GFLOP/s); FLOPs are the useful
ones by the formula of `miras/bench/flops.py`, what is computed again counts once. Peak memory: resident set of a
process of its own over its size before the call, the median of three processes. The ceiling of cases in bfloat16 is
that of a product in bfloat16.

{table([row for part in parts for row in part.rows()], HEAD)}

Peers:

{peers}

Decoding one token, one sequence, tiny model; the state of the long context by setting its position:

{table(cells, ("model", "context", "ms/token", "spread", "bytes of state"))}

{made_by(command, here["cpu"], f"threads: {here['threads']}")}.
"""


def main(arguments: Sequence[str] | None = None) -> list[Target]:
    """Measure all parts, print and write the page."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once, for a check")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process each")
    parser.add_argument("--out", default=str(RESULTS), help="file for the page; - prints it only")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    scale = replace(QUICK if options.quick else FULL, memory=not options.no_memory)
    scale = replace(scale, rounds=1 if options.quick else options.rounds)
    with Bar("measured") as bar:
        steps = Steps(bar, 300 if not options.quick else 150)
        parts, targets = [], []
        for part in (plain, layers, rounded, long, models):
            if part is layers:
                keep_memory()  # as the command line does
            measured, found = part(scale, steps)
            parts.append(measured)
            targets += found
        targets += generating(scale, steps)
        decoded, found = decoding(scale, steps)
    targets += found
    text = page(parts, decoded, targets, shlex.join(["python", "benchmarks/targets.py", *given]))
    print(text)
    if options.out != "-":
        write_text(Path(options.out), text)
    return targets


if __name__ == "__main__":
    main()
