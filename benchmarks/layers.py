"""Speed and memory of one layer of each variant: forward and backward, side by side in one run.

    python benchmarks/layers.py --time 2048 --dim 256 --heads 4

Variants take turns (A B C A B C ...) and medians are reported, because other work on the machine then falls on all
alike. `ceiling` is the machine's own rate for a 1024 x 1024 x 1024 product in float32, measured in the same run.
"""

import argparse
import resource
import statistics
import time

import torch

from miras import MirasLayer
from miras.variants import VARIANTS, variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--time", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--gates", choices=("head", "channel"), default="head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.time, args.dim)
    layers = {n: MirasLayer(args.dim, args.heads, variant(n, args.chunk), gates=args.gates) for n in VARIANTS}
    times = {n: [] for n in layers}
    for turn in range(args.rounds + 1):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x)[0].square().mean().backward()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    print(
        f"B={args.batch} T={args.time} D={args.dim} H={args.heads} chunk={args.chunk} gates={args.gates}, float32, "
        f"{args.threads} threads, forward and backward; ceiling {ceiling():.0f} GFLOP/s"
    )
    print("| layer | ms | tokens/s | of transformer |\n|---|---|---|---|")
    base = statistics.median(times["transformer"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {1000 * median:.0f} | {args.batch * args.time / median:,.0f} | {base / median:.2f} |")
    print(f"peak resident memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def ceiling(size: int = 1024, rounds: int = 10) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


if __name__ == "__main__":
    main()
