"""Compiled layers are the layers, and a compiled run is the run."""

import pytest
import torch

from miras.bench.entries import build
from miras.bench.sizes import Sizes
from miras.train import train
from miras.train.files import read_metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["yaad", "moneta", "memora", "gated_deltanet"])
def test_a_compiled_layer_equals_the_layer(name):
    sizes = Sizes(batch=2, time=64, dim=32, heads=2, chunk=16)
    results = []
    for compiled in (False, True):
        layer = build(name, sizes.with_(compile=compiled))
        x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, _ = layer(x)
        y.square().mean().backward()
        results.append({"y": y, "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()})
    eager, compiled = results
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_a_compiled_run_equals_the_run(config, tmp_path):
    losses = []
    for compiled in (False, True):
        made = config(steps=4, compile=compiled, out=str(tmp_path / str(compiled)))
        summary = train(made)
        losses.append(
            [line["loss"] for line in read_metrics(tmp_path / str(compiled) / "metrics.jsonl") if "loss" in line]
        )
        losses[-1].append(summary.val_loss)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)
