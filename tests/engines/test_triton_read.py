"""Fused reads, in Triton's interpreter, are those of plain PyTorch: outputs and the gradients of all that goes in."""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same

from miras import algorithm, bias, memory, retention
from miras.engines.triton import read as fused
from miras.engines.unroll import Learned, Read, linearised, read_chunks
from miras.rule import Rule, State
from miras.weights import Outer

D, CHUNKS, HEADS = 16, 2, 2


def rule(mem=None, gate=None, learner=None, chunk=16, **frame) -> Rule:
    mem = mem or memory.MLP(expansion=4)
    return Rule(mem, bias.L2(), gate or retention.L2(), learner or algorithm.GradientDescent(), chunk, **frame)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def problem(r: Rule, d_k=D, d_v=D, aligned=True):
    """Random chunks, with all that reads depend on as leaves: {name: tensor}, and what makes the arguments of them."""
    leaves, chunk = r.leaves(d_k, d_v), r.chunk
    given = {"q": F.normalize(draw(CHUNKS, HEADS, chunk, d_k), dim=-1).detach().requires_grad_()}
    bases = 1 + r.algorithm.slots
    for n, leaf in leaves.items():
        shape = leaf.rows, leaf.cols
        rows = draw(CHUNKS, HEADS, chunk, bases + chunk, 1).detach() / chunk
        rows[..., bases:, 0] = rows[..., bases:, 0].tril(0 if r.read_at == "after" else -1)
        given[f"rows {n}"] = rows.requires_grad_()
        given |= {
            f"{part} {n}": draw(CHUNKS, HEADS, *shape).detach().mul_(leaf.std).requires_grad_()
            for part in ("dual", *range(1, bases))
        }
        if not aligned:
            given[f"origin {n}"] = draw(CHUNKS, HEADS, *shape)
        if r.retention.to == "initial":
            given[f"home {n}"] = draw(HEADS, *shape).detach().mul_(leaf.std).requires_grad_()
        given |= {
            f"left {n}": draw(CHUNKS, HEADS, chunk, leaf.rows),
            f"right {n}": draw(CHUNKS, HEADS, chunk, leaf.cols),
        }
    given |= {n: draw(HEADS, size) for n, (size, _) in r.slow(d_k, d_v).items()}
    return leaves, given


def outputs(r: Rule, leaves, given, function):
    def of(part):
        return {n: given[f"{part} {n}"] for n in leaves if f"{part} {n}" in given}

    dual = of("dual")
    origin = of("origin") or dual
    slots = {n: tuple(given[f"{j} {n}"] for j in range(1, 1 + r.algorithm.slots)) for n in leaves}
    slow = {n: given[n] for n in r.slow(D, D)}
    state = State(dual, slots, origin, torch.zeros(CHUNKS, dtype=torch.int64), of("home"), slow)
    grad = {n: Outer(given[f"left {n}"], given[f"right {n}"]) for n in leaves}
    links = linearised(r, leaves, origin, of("home")) if r.link_at == "chunk" else {}
    read = Read(given["q"], of("rows"))
    return function(r, leaves, Learned(state, grad, links), read)


def assert_same_reads(r: Rule, tolerance=1e-10, **more):
    leaves, given = problem(r, **more)
    expected, got = (outputs(r, leaves, given, f) for f in (read_chunks, fused.read))
    assert_same(got, expected, tolerance, "y")
    u = torch.randn_like(expected)
    plain, ours = (torch.autograd.grad(y, list(given.values()), u) for y in (expected, got))
    for name, a, b in zip(given, ours, plain, strict=True):
        if name.startswith("rows"):
            a, b = (torch.cat([x[..., : -r.chunk, 0], x[..., -r.chunk :, 0].tril()], -1) for x in (a, b))
        assert_same(a, b, tolerance, f"gradient of {name}")


CASES = {
    "identity": rule(),
    "home": rule(gate=retention.L2(to="initial")),
    "momentum": rule(learner=algorithm.Momentum(), gate=retention.L2(to="initial")),
    "before": rule(read_at="before"),
    "gelu_tanh, no norm": rule(memory.MLP(activation="gelu_tanh", norm=False)),
    "silu, no residual": rule(memory.MLP(activation="silu", residual=False, expansion=3)),
    "a chunk of 11": rule(chunk=11),
    "two programs a chunk": rule(chunk=80, gate=retention.L2(to="initial")),
    "KL": rule(gate=retention.KL()),
    "KL to the initial memory": rule(gate=retention.KL(to="initial"), learner=algorithm.Momentum()),
    "Lq": rule(gate=retention.Lq()),
    "Lq, mirror": rule(gate=retention.Lq(q=3.0, link="mirror", to="initial")),
}


@pytest.mark.parametrize("r", CASES.values(), ids=CASES)
def test_reads_are_those_of_the_chunk_engine(r):
    assert_same_reads(r)
