"""The element-wise parts of a layer in C++ are those in PyTorch, forwards and backwards, in float64."""

import pytest
import torch
from cases import assert_same

from miras.engines.native import build, pointwise
from miras.layout import layout
from miras.pointwise import GatedNorm, ShortConv

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_native_is_torchs(monkeypatch, compute, wrt):
    """`compute` by kernels and, the same, without them."""
    found = []
    for native in (True, False):
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(pointwise, "runs", lambda *_: False)
            y = compute()
        assert ("miras" in type(y.grad_fn).__name__) == native
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append((y, *torch.autograd.grad(y, wrt, cotangent)))
    for got, expected in zip(*found, strict=True):
        assert_same(got, expected, 1e-12)


SIZES = [1, 3, pointwise.SEGMENT, pointwise.SEGMENT + 1, 2 * pointwise.SEGMENT + 3]


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(
    ("width", "unit", "rest"), [(4, 32, 4.0), (4, 32, 0.0), (4, 0, 0.0), (1, 16, 0.5), (6, 48, 0.0)]
)
def test_the_convolution(monkeypatch, tokens, width, unit, rest):
    conv = ShortConv(48, width, unit, 16, rest).double()
    before, x = draw(2, width - 1, 48), draw(2, tokens, 48)
    where = layout(2, tokens)
    assert_native_is_torchs(monkeypatch, lambda: conv(x, before, where)[0], (before, x, conv.weight))


@pytest.mark.parametrize("tokens", SIZES)
def test_the_gated_norm(monkeypatch, tokens):
    norm, x, gate = GatedNorm(16, eps=1e-6).double(), draw(2, tokens, 3, 16), draw(2, tokens, 3, 16)
    torch.nn.init.normal_(norm.weight)
    assert_native_is_torchs(monkeypatch, lambda: norm(x, gate), (x, norm.weight, gate))


@pytest.mark.parametrize("unit", [0, 16])
def test_heads_of_nothing_have_gradients(monkeypatch, unit):
    conv, x = ShortConv(16, 2, unit, 16, 4.0).double(), torch.zeros(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert_native_is_torchs(monkeypatch, lambda: conv(x, None, layout(1, 3))[0], (x,))


def test_tensors_that_lie_otherwise(monkeypatch):
    norm, x, gate = GatedNorm(16, eps=1e-6).double(), draw(16, 3, 5, 2), draw(2, 5, 3, 16)
    assert_native_is_torchs(monkeypatch, lambda: norm(x.permute(3, 2, 1, 0), gate), (x, gate))


def test_several_threads_share_the_tokens():
    conv, x = ShortConv(48, 4, 32, 16).double(), draw(2, 3 * pointwise.SEGMENT, 48)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            y, _ = conv(x, None, layout(2, x.shape[1]))
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_nan_stays_where_it_is_seen():
    conv, norm = ShortConv(32, 4, 32, 16).double(), GatedNorm(16, eps=1e-6).double()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    x[0, 3, 0] = float("nan")
    y, _ = conv(x, None, layout(1, 9))
    heads = y.unflatten(-1, (2, 16))
    assert (
        heads.isnan().any(-1)[0, :, 0].nonzero().flatten().tolist() == [3, 4, 5, 6]
        and not heads[..., 1, :].isnan().any()
    )
    assert torch.equal(norm(heads, heads.nan_to_num()).isnan().any(-1), heads.isnan().any(-1))


def test_other_dtypes_and_sizes_are_left_to_torch():
    cpu = torch.device("cpu")
    assert pointwise.runs(cpu, torch.float32, 64)
    assert not pointwise.runs(cpu, torch.bfloat16, 64)
    assert not pointwise.runs(cpu, torch.float32, 8) and not pointwise.runs(cpu, torch.float32, 512)
    assert not pointwise.runs(torch.device("meta"), torch.float32, 64)


@pytest.mark.slow
def test_operators_keep_their_contract():
    before, x, weight = draw(1, 3, 32), draw(1, 5, 32), draw(4, 32)
    torch.library.opcheck(pointwise.short_conv, (before, x, weight, 16, 16, 4.0, 1e-6))
    torch.library.opcheck(pointwise.gated_norm, (draw(1, 5, 2, 16), draw(16), draw(1, 5, 2, 16), 1e-6))
