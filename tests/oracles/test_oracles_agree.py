"""Independent implementations of one model give one result: which of them are right, and that the adapters are.

Nothing here knows the library.
"""

import pytest
import torch
from oracles import fla_naive, titans_peer
from oracles.table import LOOPS, ORACLES, Oracle

LINEAR_WITH_MOMENTUM = Oracle("", fla_naive.momentum, "q k v eta log_alpha theta w s", "", LOOPS["momentum"])
PAIRS = {n: o for n, o in ORACLES.items() if o.peer} | {"momentum": LINEAR_WITH_MOMENTUM}


def distance(a, b):
    """Largest difference over the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_agree(one, other, inputs, tolerance=1e-12, fixed=()):
    """Outputs, memories and gradients with respect to all inputs but those fixed."""
    results, cotangents = [], {}
    for call in (one, other):
        leaves = {n: x.clone().requires_grad_(n not in fixed) for n, x in inputs.items()}
        y, memory = call(leaves)
        found = {"y": y, **memory}
        for n, x in found.items():
            cotangents.setdefault(n, torch.randn_like(x))
        total = sum((x * cotangents[n]).sum() for n, x in found.items())
        learned = {n: x for n, x in leaves.items() if x.requires_grad}
        # What a model does not depend on has no gradient: attention with a window of one is its value.
        grads = torch.autograd.grad(total, list(learned.values()), allow_unused=True, materialize_grads=True)
        results.append(found | {f"grad of {n}": g for n, g in zip(learned, grads, strict=True)})
        assert all(torch.equal(x, inputs[n]) for n, x in leaves.items()), "an input was written to"
    got, expected = results
    assert got.keys() == expected.keys()
    for n, x in expected.items():
        assert got[n].dtype == torch.float64
        assert distance(got[n], x) <= tolerance, n


def bound(call, **constants):
    return lambda inputs: call(inputs, **constants)


@pytest.mark.parametrize("name", PAIRS)
def test_two_implementations_of_a_model_agree(name):
    one = PAIRS[name]
    assert_agree(bound(one.call, **one.constants), bound(one.peer, **one.constants), one.draw())


@pytest.mark.parametrize("name", ORACLES)
def test_every_oracle_keeps_rows_and_heads_apart_and_needs_only_what_it_says(name):
    one = ORACLES[name]
    drawn = one.draw(time=7)
    inputs = {n: drawn[n] for n in one.names(least=True)}
    y, memory = one.call(inputs, **one.constants)
    alone = {n: x[1:, :, 1:] if x.dim() == 4 else x[1:] for n, x in inputs.items()}
    y_alone, memory_alone = one.call(alone, **one.constants)
    torch.testing.assert_close(y_alone, y[1:, :, 1:])
    for n, x in memory.items():
        torch.testing.assert_close(memory_alone[n], x[1:, 1:])


def test_retnet_has_flas_decays():
    inputs = Oracle("", fla_naive.retention, "q k v", "").draw(heads=3)
    empty = torch.zeros(3, 5, 4, dtype=torch.float64)
    log_gamma = torch.log1p(-(2.0 ** -(5 + torch.arange(3.0, dtype=torch.float64))))[:, None]
    y, _ = LOOPS["retnet"](inputs | {"w": empty, "log_gamma": log_gamma})
    assert distance(fla_naive.retention(inputs)[0], y) < 1e-14


def test_flas_recurrent_comba_is_another_model_than_its_chunks_and_kernel():
    """It decays before it erases: with erase = k it is Gated DeltaNet, which Comba is not."""
    inputs = ORACLES["comba"].draw()
    right = LOOPS["comba"](inputs)[0]
    for chunk_size in (1, 4, 64):
        assert distance(fla_naive.comba(inputs, chunk_size=chunk_size)[0], right) < 1e-14
    assert distance(fla_naive.comba(inputs, "naive_recurrent_comba")[0], right) > 0.05
    same = inputs | {"erase": inputs["k"]}
    wrong = fla_naive.comba(same, "naive_recurrent_comba")[0]
    assert distance(wrong, fla_naive.gated_deltanet(same)[0]) < 1e-14


def test_ttt_linear_is_that_of_fla_but_for_where_rates_stand_and_what_is_added():
    """fla's rate is the query row's alone, and z + LN(z) its read. Full mini-batches only: see `fla_naive`."""
    inputs = ORACLES["ttt_linear"].draw(time=12)
    inputs["eta"] = torch.ones_like(inputs["eta"])
    loop = bound(LOOPS["ttt_linear_of_fla"], chunk=4)
    assert_agree(bound(fla_naive.ttt_linear, chunk=4), loop, inputs, fixed=("eta",))


@pytest.mark.parametrize("chunk", [1, 3, 13])
def test_titans_is_that_of_titans_pytorch(chunk):
    inputs = ORACLES["titans"].draw()
    del inputs["norm_shift"]
    inputs["log_alpha"] = inputs["log_alpha"][..., :1]
    loop = bound(LOOPS["titans"], chunk=chunk, to="zero", rate="none")
    assert_agree(bound(titans_peer.titans, chunk=chunk), loop, inputs, 1e-11)


@pytest.mark.parametrize(("chunk", "window"), [(1, 1), (1, 3), (3, 2)])
def test_atlas_is_titans_pytorch_with_spectral_norm_and_several_pairs_a_token(chunk, window):
    """Newton-Schulz magnifies rounding: what it is given is measured by its smallest singular values."""
    inputs = ORACLES["atlas"].draw(time=8)
    del inputs["norm_shift"]
    inputs["eta"] = torch.ones_like(inputs["eta"])
    loop = bound(LOOPS["atlas"], chunk=chunk, window=window, eps=0.0)
    assert_agree(bound(titans_peer.atlas, chunk=chunk, window=window), loop, inputs, 1e-9, fixed=("eta",))


def test_atlas_without_orthogonalisation_and_window_is_titans():
    inputs = ORACLES["atlas"].draw(time=8)
    inputs |= {"eta": torch.ones_like(inputs["eta"]), "gamma": torch.ones_like(inputs["gamma"])}
    for to in ("zero", "initial"):
        plain = bound(LOOPS["atlas"], window=1, chunk=3, to=to, coefficients=())
        assert_agree(plain, bound(LOOPS["titans"], chunk=3, to=to, rate="none"), inputs, fixed=("eta", "gamma"))


def test_atlas_with_a_matrix_is_flas_momentum_delta_rule():
    inputs = LINEAR_WITH_MOMENTUM.draw()
    inputs |= {"s": torch.zeros_like(inputs["s"]), "eta": torch.ones_like(inputs["eta"])}
    y, memory = LOOPS["atlas"](inputs | {"gamma": inputs["eta"]}, window=1, coefficients=())
    expected, last = fla_naive.momentum(inputs)
    assert distance(y, expected) < 1e-12 and distance(memory["w"], last["w"]) < 1e-12


def test_loops_that_stand_alone_meet_others_in_special_cases():
    inputs = ORACLES["dfw"].draw()
    inputs["log_beta"] = torch.zeros_like(inputs["log_beta"])
    assert_agree(LOOPS["dfw"], fla_naive.gla, inputs, fixed=("log_beta",))

    inputs = ORACLES["longhorn"].draw()
    inputs["k"] = 2 * inputs["k"]

    def implicit(x):
        return fla_naive.deltanet(x | {"eta": x["eta"] / (1 + x["eta"] * x["k"].square().sum(-1, keepdim=True))})

    assert_agree(LOOPS["longhorn"], implicit, inputs)

    inputs = ORACLES["yaad"].draw()
    inputs |= {"delta": 1e3 * inputs["delta"], "theta": torch.zeros_like(inputs["delta"])}
    without = {n: x for n, x in inputs.items() if n != "theta"}
    y, _ = LOOPS["yaad"](without, chunk=3)
    assert distance(y, LOOPS["titans"](inputs, chunk=3)[0]) < 1e-14
    assert distance(y, LOOPS["yaad_mixture"](without, chunk=3)[0]) < 1e-14
