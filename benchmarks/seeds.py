"""The demo's comparison over several seeds: mean and spread of validation bits per byte.

    python benchmarks/seeds.py --seeds 3 --out runs/seeds      # resumes where it stopped

Every run is a `miras train` of the demo's set-up; `--jobs` of them run side by side and share the cores. Writes
benchmarks/results/demo_seeds.md.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from miras.demo import FULL, MODELS, job, validation_text
from miras.train.config import TrainConfig
from miras.train.many import train_many
from miras.train.parameters import equal_hidden
from miras.train.provenance import commit, cpu

RESULTS = Path(__file__).parent / "results" / "demo_seeds.md"
BASELINES = ("gated_deltanet", "transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    args = parser.parse_args()
    hidden = equal_hidden({name: TrainConfig(model=name) for name in args.models})
    runs = [(name, seed) for seed in range(args.seeds) for name in args.models]
    args.out.mkdir(parents=True, exist_ok=True)
    validation_text(args.out / "data")
    jobs = [
        job(name, hidden[name], FULL, folder(args.out, name, seed), args.out / "data", seed, f"{name} {seed}")
        for name, seed in runs
    ]
    train_many(jobs, args.jobs)
    summaries = {run: json.loads((folder(args.out, *run) / "summary.json").read_text()) for run in runs}
    text = page(summaries, args.seeds, args.models)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def page(summaries: dict, seeds: int, models: list[str]) -> str:
    bits = {n: [summaries[n, s]["val_bits_per_byte"] for s in range(seeds)] for n in models}
    mean = {n: statistics.mean(b) for n, b in bits.items()}
    first = summaries[models[0], 0]
    threads = " or ".join(str(n) for n in sorted({s["threads"] for s in summaries.values()}))
    lines = [
        "# The demo over several seeds",
        "",
        f"Validation bits per byte after {FULL.steps} steps of 2,048 tokens ({first['data']['name']}, hash "
        f"`{first['data']['hash']}`), equal data and steps, parameters within 1 %.",
        f"`python benchmarks/seeds.py --seeds {seeds}`, {cpu()}, {threads} threads a run, commit {commit()}, "
        f"torch {first['versions']['torch']}.",
        "",
        "| model | parameters | mean | spread (max - min) | "
        + " | ".join(f"seed {s}" for s in range(seeds))
        + " | "
        + " | ".join(f"to {b}" for b in BASELINES if b in models)
        + " |",
        "|---" * (4 + seeds + sum(b in models for b in BASELINES)) + "|",
    ]
    for name in models:
        cells = [name, f"{summaries[name, 0]['parameters']:,}", f"{mean[name]:.3f}"]
        cells += [f"{max(bits[name]) - min(bits[name]):.3f}", *(f"{b:.3f}" for b in bits[name])]
        cells += [f"{mean[name] - mean[b]:+.3f}" for b in BASELINES if b in models]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
