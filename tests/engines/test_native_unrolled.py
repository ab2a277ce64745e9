"""The coefficients of chunks in C++ are those that running the rule's update makes, forwards and backwards."""

from dataclasses import replace

import pytest
import torch
from cases import assert_same
from kernel_cases import MOMENTARY, YAAD

from miras.engines import unroll
from miras.engines.native import build
from miras.engines.native.unrolled import unrolled

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("rule", [YAAD, MOMENTARY], ids=["descent", "momentum"])
@pytest.mark.parametrize("read_at", ["after", "before"])
@pytest.mark.parametrize("holes", [False, True])
def test_coefficients(rule, read_at, holes):
    rule = replace(rule, read_at=read_at)
    leaf = rule.leaves(16, 16)["w1"]
    gates = {g.name: torch.rand(3, 2, 5, 1, dtype=torch.float64) for g in rule.gates}
    gates = {n: (-x if n.startswith("log_") else x).requires_grad_() for n, x in gates.items()}
    keep = torch.rand(3, 5) > 0.4 if holes else None
    expected = unroll.all_coefficients(rule, {"w1": leaf}, gates, keep)["w1"]
    ends = torch.cat([expected.write.dual.unsqueeze(-3), expected.write.slots], -3)
    found = unrolled(unroll.steps(rule, leaf, gates, keep).squeeze(-1), read_at == "before")
    cotangents, sides = [torch.randn_like(x) for x in found], []
    for read, write in (found, (expected.read.squeeze(-1), ends.squeeze(-1))):
        total = (read * cotangents[0]).sum() + (write * cotangents[1]).sum()
        grads = torch.autograd.grad(total, list(gates.values()), allow_unused=True, materialize_grads=True)
        sides.append((read, write, *grads))
    for got, of in zip(*sides, strict=True):
        assert_same(got, of, 1e-12)


@pytest.mark.slow
def test_the_operator_keeps_its_contract():
    steps = torch.randn(2, 1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    for before in (False, True):
        torch.library.opcheck(unrolled, (steps, before))
