"""Facts that the engines are built on: what cold memory costs, what recomputation costs and saves, what tiles do.

python benchmarks/probes.py --threads 1
python benchmarks/probes.py --threads 1 --compile     # compiled layers instead, some minutes
python benchmarks/probes.py --threads 1 --gradients   # which rules' outer gradients grow with the length
python benchmarks/probes.py --threads 1 --writes      # how much of a value fresh memories give back
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from miras import MirasLayer, Rule, bias, retention, run
from miras.algorithm import GradientDescent, Momentum
from miras.bench.memory import high_water
from miras.bench.timing import alternate
from miras.engines import chunk, unroll
from miras.lab import probe
from miras.memory import MLP
from miras.model import Miras
from miras.variants import pattern, variant

SIDE = 1 << 17  # numbers of a tensor of half a megabyte
PLENTY = 256  # so many of them are far beyond any cache
SEGMENT = 512  # tokens


def traffic(rounds: int) -> None:
    """An element-wise product of two tensors of 0.5 MB: hot into memory that is there, cold into fresh memory."""
    a, b, out = (torch.randn(SIDE) for _ in range(3))
    cold = list(torch.randn(PLENTY, SIDE))
    calls: dict[str, Callable[[], object]] = {
        "hot": lambda: [torch.mul(a, b, out=out) for _ in range(PLENTY // 2)],
        "cold": lambda: [x * y for x, y in zip(cold[::2], cold[1::2], strict=True)],
    }
    found = {name: 1e6 * t.median / (PLENTY // 2) for name, t in alternate(calls, rounds).items()}
    print(f"x * y of two 0.5 MB tensors: {found['hot']:.0f} us hot, {found['cold']:.0f} us cold into fresh memory")


def segments(rounds: int, time: int = 2048) -> None:
    """Yaad's layer, B = 2, D = 256, H = 4, chunk 64, whole and in segments whose activations are computed again."""
    torch.manual_seed(0)
    layer = MirasLayer(256, 4, variant("yaad", 64))
    x = torch.randn(2, time, 256, requires_grad=True)

    def whole() -> None:
        layer(x, engine="chunk")[0].square().mean().backward()

    def again() -> None:
        state, outputs = None, []
        for piece in x.split(SEGMENT, 1):
            y, state = checkpoint(layer, piece, state, engine="chunk", use_reentrant=False)
            outputs.append(y)
        torch.cat(outputs, 1).square().mean().backward()

    calls: dict[str, Callable[[], object]] = {"whole": whole, "segments": again}
    found = alternate(calls, rounds)
    for name, call in calls.items():
        ms, peak = 1000 * found[name].median, high_water(call) / 1e6
        print(f"Yaad forward and backward, {name}: {ms:.0f} ms, {peak:.0f} MB")


def scans(rounds: int) -> None:
    """A tiny model on 8 sequences of 256, chunk 16, by plain autograd and by `Scan`, which computes things again."""
    for name in ("yaad", "memora"):
        torch.manual_seed(0)
        model, tokens = Miras(257, 128, 4, 344, pattern(name, 4, 16)), torch.randint(256, (8, 256))
        model.backbone.engine = "chunk"

        def train(large: float, model: Miras = model, tokens: torch.Tensor = tokens) -> None:
            chunk.LARGE = large
            model(tokens)[0].logsumexp(-1).mean().backward()

        calls: dict[str, Callable[[], object]] = {"plain": lambda: train(math.inf), "scan": lambda: train(0.0)}
        found = {kind: 1000 * t.median for kind, t in alternate(calls, rounds).items()}
        print(f"tiny {name}, forward and backward: {found['plain']:.0f} ms, by Scan {found['scan']:.0f} ms")


def tiles(rounds: int) -> None:
    """The memory of Gated DeltaNet, B = 2, T = 2,048, 4 heads of 64: by tiles, and token by token in C++. With Huber's
    loss there are no tiles, with momentum no C++: beside it, a token at a time by PyTorch's operations.
    """
    delta, shape = variant("gated_deltanet"), (2, 2048, 4, 64)
    assert isinstance(delta, Rule)
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    gates = {"log_alpha": torch.full((*shape[:3], 1), -0.01).requires_grad_(), "eta": torch.rand(*shape[:3], 1) / 8}
    gates |= {"delta": torch.ones(*shape[:3], 1), "theta": torch.full((*shape[:3], 1), 0.9)}

    def train(rule: Rule, engine: str) -> None:
        keys = F.normalize(k, dim=-1)
        run(rule, q, keys, v, {g.name: gates[g.name] for g in rule.gates}, engine=engine)[0].sum().backward()

    for rule, engines in (
        (delta, ("exact", "native")),
        (replace(delta, bias=bias.Huber()), ("chunk", "native")),
        (replace(delta, algorithm=Momentum()), ("chunk", "exact")),
    ):
        calls: dict[str, Callable[[], object]] = {n: partial(train, rule, n) for n in engines}
        found = {name: f"{1000 * t.median:.0f} ms by {name}" for name, t in alternate(calls, rounds).items()}
        print(f"A matrix with {rule.bias}, {rule.algorithm}, forward and backward: {', '.join(found.values())}")


def coefficients(rounds: int) -> None:
    """The coefficients of 64 chunks of 64 tokens, 4 heads, forward and backward, token by token and in closed form."""
    rule = variant("yaad", 64)
    log = torch.full((64, 4, 64, 1), -0.003, requires_grad=True)
    eta = torch.full((64, 4, 64, 1), 0.1, requires_grad=True)

    def make(closed: bool) -> None:
        gates = {"log_alpha": log, "alpha": log.exp(), "eta": eta}
        found = unroll._per_head(rule, gates, None) if closed else unroll._by_tokens(rule, gates, None)
        (found.read.sum() + found.write.dual.sum()).backward()  # type: ignore[union-attr, operator]

    found = alternate({"tokens": lambda: make(False), "closed": lambda: make(True)}, rounds)
    tokens, closed = (1000 * found[name].median for name in ("tokens", "closed"))
    print(f"coefficients of 64 chunks of 64: {tokens:.1f} ms token by token, {closed:.1f} ms in closed form")


def compiled(rounds: int) -> None:
    """A tiny model on 8 sequences of 256, chunk 16, and the same with compiled layers."""
    for name in ("yaad", "gated_deltanet"):
        calls: dict[str, Callable[[], object]] = {}
        for kind in ("plain", "compiled"):
            torch.manual_seed(0)
            model, tokens = Miras(257, 128, 4, 344, pattern(name, 4, 16)), torch.randint(256, (8, 256))
            if kind == "compiled":
                model.backbone.compile_layers()

            def train(model: Miras = model, tokens: torch.Tensor = tokens) -> None:
                model(tokens)[0].logsumexp(-1).mean().backward()

            calls[kind] = train
        found = alternate(calls, rounds)
        plain, fast, first = (
            t * 1000 for t in (found["plain"].median, found["compiled"].median, found["compiled"].first)
        )
        print(f"tiny {name}: {plain:.0f} ms, compiled {fast:.0f} ms after a first step of {first / 1000:.0f} s")


def gradients() -> None:
    """Norms of all outer gradients of a fresh model of two layers of 64 channels, by rule and length."""
    times = 128, 512, 1024, 2048
    print("outer gradient norm at T =", *times)
    for layers, gate, learner in itertools.product((2, 3), (retention.L2, retention.KL), (GradientDescent, Momentum)):
        rule = Rule(MLP(layers, 2), bias.Huber(), gate(to="initial"), learner(rate="input"), 16)
        print(f"{layers} layers, {gate.__name__}, {learner.__name__}:", *_norms(rule, times))
    signs = bias.L1(), bias.L1(form="paper"), bias.Huber(form="mixture"), bias.Lp(p=1.2), bias.Lp(p=1.5)
    for loss in signs:
        rule = Rule(MLP(2, 2), loss, retention.L2(to="initial"), GradientDescent(rate="input"), 16)
        print(f"{loss}, eta up to {loss.eta_limit:.2g}:", *_norms(rule, times))


def _norms(rule: Rule, times: Sequence[int]) -> list[str]:
    norms = []
    for time in times:
        torch.manual_seed(0)
        model, tokens = Miras(257, 64, 2, 172, [rule, rule]), torch.randint(256, (2, time))
        F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        norms.append(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    return [f"{norm:.2g}" for norm in norms]


def writes(d: int = 32) -> None:
    """Cosine of what a fresh memory answers to its keys with their values, both less their means over all pairs, by the
    size of the values' entries and of the initial W1; gates as a fresh layer has them, chunk 16.
    """
    sizes = tuple(itertools.product((8, 64), (0.1, 0.5, 1.0)))
    print("pairs, size of values:", *sizes)
    for name in ("yaad", "moneta", "memora", "titans"):
        for spread in (1.0, 0.5, 0.3):
            rule = replace(variant(name), memory=MLP(spread=spread))
            print(f"{name}, W1 of {spread}:", *(f"{_written(rule, d, *size):.2f}" for size in sizes))
    for name in ("mneme", "gated_deltanet"):
        print(f"{name}:", *(f"{_written(variant(name), d, *size):.2f}" for size in sizes))


@torch.no_grad()
def _written(rule: Rule, d: int, pairs: int, size: float, heads: int = 64) -> float:
    torch.manual_seed(0)
    weights = rule.initial(heads, d, d)
    k, v = F.normalize(torch.randn(1, pairs, heads, d), dim=-1), size * torch.randn(1, pairs, heads, d)
    gates = {gate.name: torch.full((1, pairs, heads, 1), gate.init) for gate in rule.gates}
    _, state = run(rule, k, k, v, gates, rule.init(weights, rule.initial_slow(heads, d, d)))
    y = probe(rule, state, k.transpose(1, 2)).transpose(1, 2)
    return F.cosine_similarity(y - y.mean(1, True), v - v.mean(1, True), dim=-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--writes", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compile:
        compiled(options.rounds)
        return
    if options.gradients:
        gradients()
        return
    if options.writes:
        writes()
        return
    traffic(options.rounds)
    segments(options.rounds)
    scans(options.rounds)
    tiles(options.rounds)
    coefficients(options.rounds)


if __name__ == "__main__":
    main()
