"""A benchmark from a plan to plain values: peak memory one process each, then all entries timed in turn."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from miras.bench.decode import decode
from miras.bench.entries import PEERS, build, chunk_of, has_chunk, product_bytes, step, useful_flops
from miras.bench.memory import available, peak_memory
from miras.bench.profile import shares
from miras.bench.progress import Steps
from miras.bench.sizes import Sizes
from miras.bench.timing import Timing, alternate, machine_calls, machine_speed
from miras.errors import MirasError
from miras.train.bar import Bar
from miras.train.provenance import commit, cpu, versions

# A call that is expected to take longer, by what a shorter one took, is left out.
PATIENCE = 120.0
# Part of the free memory that a call may be expected to take.
SHARE = 0.8
# What is expected of a longer sequence is measured at this length, where it was not asked for.
PROBE = 2048


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        names: variants, files with a rule, and peers; see `miras.bench.entries`.
        sizes: of every case, but for what the next two vary.
        times: tokens of a sequence.
        chunks: tokens per chunk; None: each rule's own.
        rounds: how often each entry is timed.
        memory: measure peak memory, a process for each entry.
        contexts: contexts to time decoding at; none: no decoding.
        profiled: look where the time of each of our own entries goes.
    """

    names: tuple[str, ...]
    sizes: Sizes
    times: tuple[int, ...]
    chunks: tuple[int | None, ...]
    rounds: int = 5
    memory: bool = True
    contexts: tuple[int, ...] = ()
    profiled: bool = False

    def cases(self, time: int) -> list[tuple[str, Sizes]]:
        """The entries of one sequence length; what has no chunk comes once."""
        found = []
        for name in self.names:
            chunks = self.chunks if has_chunk(name) else self.chunks[:1]
            found += [(name, self.sizes.with_(time=time, chunk=chunk)) for chunk in dict.fromkeys(chunks)]
        return found

    @property
    def steps(self) -> int:
        """Calls and processes, for a progress bar."""
        each = self.memory + 1 + self.rounds + self.profiled
        calls = sum(len(self.cases(time)) * each for time in self.times)
        return calls + sum(name not in PEERS for name in self.names) * len(self.contexts) * (2 + self.rounds)


def bench(plan: Plan, command: str = "") -> dict[str, Any]:
    """Measure.

    Args:
        plan: what.
        command: how to do it again, for the record.

    Returns:
        JSON-able values: "command", "created", "commit", "versions", "machine", "setup", "speed" (of the machine, by
        sequence length), "rows", "decode". A row is {"name", "peer", "chunk", "time", "ms", "spread", "all_ms",
        "first_ms", "tokens_per_second", "useful_gflop", "traffic_gbyte", "of_ceiling", "peak_bytes", "against",
        "shares", "note"}; what was not measured is None, and the note says why.
    """
    rows: list[dict[str, Any]] = []
    speeds: dict[str, dict[str, float]] = {}
    with Bar("measured") as bar:
        steps = Steps(bar, plan.steps)
        for time in plan.times:
            found, speeds[str(time)] = _length(plan, time, rows, steps)
            rows += found
        own = [name for name in plan.names if name not in PEERS]
        decoded = decode(own, plan.sizes, plan.contexts, plan.rounds, steps) if plan.contexts else []
    return {
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions() | _peer_versions(plan.names),
        "machine": machine(plan.sizes.device),
        "setup": asdict(plan.sizes) | {"times": plan.times, "chunks": plan.chunks, "rounds": plan.rounds},
        "speed": speeds,
        "rows": rows,
        "decode": decoded,
    }


def _length(
    plan: Plan, time: int, before: list[dict[str, Any]], steps: Steps
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of one sequence length, and the machine's own speed at the same moment."""
    rows, calls = [], {}
    for name, sizes in plan.cases(time):
        row = _empty(name, sizes)
        rows.append(row)
        try:
            module = build(name, sizes)
            _check_fits(row, sizes, before)
            if plan.memory:
                steps(f"memory of {_key(row)}")
                row["peak_bytes"] = peak_memory(name, sizes, torch.get_num_threads())
            calls[_key(row)] = step(module, sizes)
        except MirasError as error:
            row["note"] = str(error)
            steps.skip(plan.memory + 1 + plan.rounds + plan.profiled)
    sizes = plan.sizes.with_(time=time)
    timings = alternate(calls, plan.rounds, 1, sizes.device, steps, machine_calls(sizes))
    speed = machine_speed(timings, sizes) if calls else {}
    for row in rows:
        key = _key(row)
        if key in calls:
            row |= _measured(row["name"], timings[key], sizes.with_(chunk=row["chunk"]), speed)
            if plan.profiled and not row["peer"]:
                steps(f"profile of {key}")
                row["shares"] = shares(calls[key])
    for row in rows:
        row["against"] = _against(row, rows, plan.sizes.level)
    return rows, speed


def _empty(name: str, sizes: Sizes) -> dict[str, Any]:
    numbers = (
        "ms",
        "spread",
        "all_ms",
        "first_ms",
        "tokens_per_second",
        "useful_gflop",
        "of_ceiling",
        "peak_bytes",
        "shares",
    )
    row: dict[str, Any] = {"name": name, "peer": name in PEERS, "chunk": chunk_of(name, sizes), "time": sizes.time}
    return row | dict.fromkeys(numbers) | {"against": {}, "note": ""}


def _key(row: dict[str, Any]) -> str:
    return row["name"] + ("" if row["chunk"] is None else f", chunk {row['chunk']}") + f", T {row['time']:,}"


def _measured(name: str, timing: Timing, sizes: Sizes, speed: dict[str, float]) -> dict[str, Any]:
    flops, moved, took = useful_flops(name, sizes), product_bytes(name, sizes), timing.median
    return {
        "ms": 1000 * took,
        "spread": timing.spread,
        "all_ms": [1000 * seconds for seconds in timing.seconds],
        "first_ms": 1000 * timing.first,
        "tokens_per_second": sizes.tokens / took,
        "useful_gflop": None if flops is None else flops / 1e9,
        "traffic_gbyte": None if moved is None else moved / 1e9,
        "of_ceiling": None if flops is None else flops / took / speed["flops_per_second"],
    }


def _against(row: dict[str, Any], rows: Iterable[dict[str, Any]], level: str) -> dict[str, float]:
    """How many times as fast as each peer of the same length, and chunk where the peer has one."""
    if row["ms"] is None or row["peer"]:
        return {}
    found = {}
    for other in rows:
        reference = other["peer"] or (level == "model" and other["name"] == "transformer" and other is not row)
        if reference and other["ms"] is not None and other["chunk"] in (None, row["chunk"]):
            found[other["name"]] = other["ms"] / row["ms"]
    return found


def _check_fits(row: dict[str, Any], sizes: Sizes, before: list[dict[str, Any]]) -> None:
    """Refuse what would take all memory or an afternoon, by what a shorter sequence took.

    Raises:
        MirasError: with what is expected.
    """
    shorter = [r for r in before if (r["name"], r["chunk"]) == (row["name"], row["chunk"]) and r["time"] < row["time"]]
    if shorter and shorter[-1]["ms"] is None:
        raise MirasError(shorter[-1]["note"])
    if shorter:
        factor = row["time"] / shorter[-1]["time"]
        if (seconds := factor * shorter[-1]["ms"] / 1000) > PATIENCE:
            raise MirasError(f"would take about {seconds:.0f} s a call")
        peak = shorter[-1]["peak_bytes"]
    elif sizes.time > 4 * PROBE:
        factor = sizes.time / PROBE
        peak = peak_memory(row["name"], sizes.with_(time=PROBE), torch.get_num_threads())
    else:
        return
    if peak is not None and factor * peak > SHARE * available(sizes.device):
        raise MirasError(
            f"would need about {factor * peak / 1e9:.0f} GB, {available(sizes.device) / 1e9:.0f} GB are free"
        )


def machine(device: str) -> dict[str, Any]:
    """The hardware in words and numbers."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu(), "gpu": gpu, "threads": torch.get_num_threads(), "system": platform.platform(terse=True)}


def _peer_versions(names: Iterable[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        if name in PEERS:
            try:
                found[PEERS[name].package] = version(PEERS[name].package)
            except PackageNotFoundError:
                continue
    return found
