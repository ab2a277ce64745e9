"""Fused reads, in Triton's interpreter, are those of plain PyTorch: outputs and the gradients of all that goes in."""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same
from torch.autograd import grad
from torch.utils.flop_counter import FlopCounterMode

from miras import algorithm, bias, memory, retention, weights
from miras.engines.triton import read as fused
from miras.engines.triton import read_decayed, read_each
from miras.engines.unroll import Learned, Read, all_coefficients, linearised, read_chunks, steps
from miras.rule import Rule, State
from miras.weights import Outer

D, CHUNKS, HEADS = 16, 2, 2


GATED = memory.SwiGLU(expansion=2)


def rule(mem=None, gate=None, learner=None, chunk=16, **frame) -> Rule:
    mem = mem or memory.MLP(expansion=4)
    return Rule(mem, bias.L2(), gate or retention.L2(), learner or algorithm.GradientDescent(), chunk, **frame)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def problem(r: Rule, d_k=D, d_v=D, aligned=True, width=1):
    """Random chunks, with all that reads depend on as leaves: {name: tensor}, and what makes the arguments of them.
    Coefficients are random numbers; with a link at every token or with gates of some width those of random gates.
    """
    leaves, chunk = r.leaves(d_k, d_v), r.chunk
    given = {"q": F.normalize(draw(CHUNKS, HEADS, chunk, d_k), dim=-1).detach().requires_grad_()}
    bases = 1 + r.algorithm.slots
    by_gates = width > 1 or not by_chunks(r)
    if by_gates:
        for gate in r.retention.gates + r.algorithm.gates:
            part = torch.rand(CHUNKS, HEADS, chunk, width, dtype=torch.float64) / 2
            given[gate.name] = (-part if gate.name == "log_alpha" else part).requires_grad_()
    for n, leaf in leaves.items():
        shape = leaf.rows, leaf.cols
        if not by_gates:
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
        given[f"left {n}"] = draw(CHUNKS, HEADS, chunk, leaf.rows)
        if n != "w3":  # which learns from keys, as W2 does
            given[f"right {n}"] = draw(CHUNKS, HEADS, chunk, leaf.cols)
    given |= {n: draw(HEADS, size) for n, (size, _) in r.slow(d_k, d_v).items()}
    return leaves, given


def by_chunks(r: Rule) -> bool:
    """Whether reads are linear in what a chunk has learned."""
    return r.link_at == "chunk" or isinstance(r.retention, retention.EuclideanRetention)


def at_tokens(r, leaves, learned, read, each):
    """With one argument more than `read_chunks` has."""
    return read_each.read(r, leaves, learned, read.q, each)


def reader(r: Rule):
    """What is tested, and whether it takes the arguments that `read_chunks` has."""
    return (fused.read, fused.serves) if by_chunks(r) else (at_tokens, lambda *given: read_each.serves(*given[:3]))


def outputs(r: Rule, leaves, given, function):
    """What a function with the arguments of `read_chunks` makes of it."""

    def of(part):
        return {n: given[f"{part} {n}"] for n in leaves if f"{part} {n}" in given}

    dual = of("dual")
    origin = of("origin") or dual
    slots = {n: tuple(given[f"{j} {n}"] for j in range(1, 1 + r.algorithm.slots)) for n in leaves}
    slow = {n: given[n] for n in r.slow(D, D)}
    state = State(dual, slots, origin, torch.zeros(CHUNKS, dtype=torch.int64), of("home"), slow)
    factors = {n: Outer(given[f"left {n}"], given["right w2" if n == "w3" else f"right {n}"]) for n in leaves}
    links = linearised(r, leaves, origin, of("home")) if r.link_at == "chunk" else {}
    rows = of("rows") or {n: c.read for n, c in all_coefficients(r, leaves, given, None).items()}
    each = (steps(r, leaves["w1"], given, None),) if function is at_tokens else ()
    return function(r, leaves, Learned(state, factors, links), Read(given["q"], rows), *each)


def both(r: Rule, leaves, given):
    """Outputs of the kernels and of plain PyTorch."""
    return [outputs(r, leaves, given, function) for function in (reader(r)[0], read_chunks)]


def assert_same_reads(r: Rule, **more):
    leaves, given = problem(r, **more)
    assert outputs(r, leaves, given, reader(r)[1])
    assert_same_results(r, given, *both(r, leaves, given))


def assert_same_results(r, given, got, expected):
    """Outputs of two functions, and their gradients by all that is given."""
    assert_same(got, expected, 1e-10, "y")
    u = torch.randn_like(expected)
    for name, a, b in zip(given, *(grad(y, list(given.values()), u) for y in (got, expected)), strict=True):
        if name.startswith("rows"):  # above the diagonal they are constants, which plain PyTorch does not know
            a, b = (torch.cat([x[..., : -r.chunk, 0], x[..., -r.chunk :, 0].tril()], -1) for x in (a, b))
        assert_same(a, b, 1e-10, f"gradient of {name}")


CASES = {
    "identity": rule(),
    "home": rule(memory.MLP(eps=0.1), retention.L2(to="initial")),
    "momentum": rule(learner=algorithm.Momentum(), gate=retention.L2(to="initial")),
    "before": rule(read_at="before"),
    "gelu_tanh, no norm": rule(memory.MLP(activation="gelu_tanh", norm=False)),
    "silu, no residual": rule(memory.MLP(activation="silu", residual=False, expansion=3)),
    "a chunk of 11": rule(chunk=11),
    "two programs a chunk": rule(memory.MLP(expansion=1), retention.L2(to="initial"), chunk=80),
    "KL": rule(gate=retention.KL()),
    "KL to the initial memory": rule(gate=retention.KL(to="initial"), learner=algorithm.Momentum()),
    "Lq": rule(gate=retention.Lq()),
    "Lq, mirror": rule(gate=retention.Lq(q=3.0, link="mirror", to="initial")),
    "SwiGLU": rule(GATED, retention.L2(to="initial"), algorithm.Momentum(), chunk=11),
    "SwiGLU, KL": rule(GATED, retention.KL(to="initial")),
}


@pytest.mark.parametrize("r", CASES.values(), ids=CASES)
def test_reads_are_those_of_the_chunk_engine(r):
    assert_same_reads(r)


CHANNELS = {
    "identity": rule(),
    "home, a chunk of 20": rule(gate=retention.L2(to="initial"), chunk=20),
    "before, a chunk of 33": rule(read_at="before", chunk=33),
    "no retention": rule(gate=retention.NoRetention()),
    "KL": rule(gate=retention.KL(to="initial")),
    "SwiGLU, Lq": rule(GATED, retention.Lq(to="initial"), chunk=17),
}


@pytest.mark.parametrize("r", CHANNELS.values(), ids=CHANNELS)
def test_gates_per_channel(r):
    leaves, given = problem(r, width=D)
    assert not outputs(r, leaves, given, fused.serves)
    assert_same_results(r, given, *(outputs(r, leaves, given, f) for f in (read_decayed.read, read_chunks)))


@pytest.mark.parametrize("diagonal", [0, -1])
def test_decays_of_many_orders_of_magnitude(diagonal):
    """A token that forgets all but 1e-130, at the begin of the second block or within it, in some channels."""
    log = torch.zeros(1, 1, 40, D, dtype=torch.float64)
    log[..., 16, :4] = log[..., 21, :8] = log[..., 0, :] = -300.0
    log = log.cumsum(-2)
    rows = (log if diagonal == 0 else F.pad(log[..., :-1, :], (0, 0, 1, 0))).requires_grad_()
    a, b, scores = draw(1, 1, 40, D), draw(1, 1, 40, D), draw(1, 1, 40, 40)
    for name, x, y in (("decayed_scores", a, b), ("decayed_sum", scores, b)):
        given = x, y, rows, log.requires_grad_()
        got = getattr(read_decayed, name)(*given, diagonal, torch.float64)
        expected = getattr(weights, name)(*given, diagonal)
        assert_same(got, expected, 1e-13, name)
        u = torch.randn_like(expected)
        for n, ours, plain in zip("xyrl", grad(got, given, u), grad(expected, given, u), strict=True):
            assert_same(ours, plain, 1e-13, f"{name}: {n}")


AT_TOKENS = {
    "KL": (rule(memory.MLP(expansion=2, eps=0.1), retention.KL(to="initial"), chunk=5, link_at="token"), {}),
    "KL, momentum": (rule(gate=retention.KL(), learner=algorithm.Momentum(), chunk=3, link_at="token"), {"width": D}),
    "Lq": (rule(memory.MLP(expansion=1, norm=False), retention.Lq(to="initial"), chunk=5, link_at="token"), {}),
    "Lq, mirror": (
        rule(gate=retention.Lq(q=3.0, link="mirror"), chunk=3, link_at="token", read_at="before"),
        {"width": D},
    ),
    "logistic, two sizes": (
        rule(memory.MLP(residual=False, expansion=1), retention.Bregman(), chunk=3, link_at="token"),
        {"d_k": 32},
    ),
    "SwiGLU, KL, momentum": (
        rule(GATED, retention.KL(to="initial"), algorithm.Momentum(), chunk=3, link_at="token"),
        {"width": D},
    ),
    "SwiGLU, Lq, two sizes": (
        rule(memory.SwiGLU(residual=False, expansion=1), retention.Lq(), chunk=5, link_at="token"),
        {"d_k": 32},
    ),
}


@pytest.mark.parametrize("r, more", AT_TOKENS.values(), ids=AT_TOKENS)
def test_links_at_every_token_in_several_tiles_and_segments(r, more, monkeypatch):
    monkeypatch.setattr(read_each, "TILE", 256)
    monkeypatch.setattr(read_each, "SEGMENT", 2)
    monkeypatch.setattr(read_each, "PROGRAMS", HEADS)  # one for both chunks
    assert_same_reads(r, **more)


def test_reads_where_a_chunk_began_in_an_earlier_call():
    assert_same_reads(rule(gate=retention.KL(to="initial"), learner=algorithm.Momentum()), aligned=False)


def test_keys_and_values_of_two_sizes():
    assert_same_reads(rule(memory.MLP(residual=False, expansion=1)), d_k=32)


def test_holes_are_those_of_the_chunk_engine():
    r = rule(gate=retention.L2(to="initial"))
    leaves, given = problem(r)
    for n in leaves:  # a token that is none: it has no weight, and what it reads is nobody's
        given[f"rows {n}"] = given[f"rows {n}"].detach().clone().index_fill_(3, torch.tensor([4, 5]), 0.0)
    assert_same(*both(r, leaves, given), 1e-10)


def test_gradients_that_are_expanded_and_float32():
    r = rule()
    leaves, given = problem(r)
    given = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    got, expected = ([y, *grad(y.sum(), list(given.values()))] for y in both(r, leaves, given))
    for name, a, b in zip(["y", *given], got, expected, strict=True):
        if not name.startswith("rows"):
            assert_same(a, b, 1e-4, name)


@pytest.mark.parametrize("width, function", [(1, fused.read), (D, read_decayed.read)], ids=["head", "channel"])
def test_products_follow_autocast(width, function):
    r = rule(gate=retention.L2(to="initial"), chunk=32)
    leaves, given = problem(r, width=width)
    given = {n: x.detach().float().requires_grad_() for n, x in given.items()}
    exact = outputs(r, leaves, given, read_chunks)
    with torch.autocast("cpu", torch.bfloat16):
        y = outputs(r, leaves, given, function)
    u = torch.randn_like(y)
    for a, b in zip(
        [y, *grad(y, list(given.values()), u)], [exact, *grad(exact, list(given.values()), u)], strict=True
    ):
        if a.shape[-1] > 1:  # without those of coefficients, above the diagonal of which there is nothing
            assert a.dtype == torch.float32 and (a - b).norm() < 2e-2 * b.norm()
    assert (y - exact).norm() > 1e-5 * exact.norm()


def test_the_operator_is_one_of_pytorch():
    def new(*shape):
        return torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)

    of_w1 = [new(4, 16), new(4, 5), new(4, 16), new(4, 16)]  # q, rows, factors
    of_others = [*(new(4, 16) for _ in range(2)), *(new(4, 5) for _ in range(2)), *(new(4, 16) for _ in range(2))]
    matrices = [new(16, 16) for _ in range(3)]
    shared = [torch.randn(2, *shape).double().requires_grad_() for shape in (*[(16, 16)] * 3, (16,), (16,))]
    flat = [*of_w1, *of_others, *matrices, *shared]
    torch.library.opcheck(fused.fused, (flat, True, 1, True, True, "silu", 1e-5, torch.float64))


def test_so_are_those_for_pairs_of_tokens():
    (a, b), scores = (draw(1, 1, 5, D) for _ in range(2)), draw(1, 1, 5, 5)
    log = (-torch.rand(1, 1, 5, D, dtype=torch.float64).cumsum(-2)).requires_grad_()
    how = log, log, 0, torch.float64
    torch.library.opcheck(read_decayed.decayed_scores, (a, b, *how))
    torch.library.opcheck(read_decayed.decayed_sum, (scores, b, *how))


def test_so_is_the_one_for_links_at_tokens():
    r = rule(memory.MLP(expansion=1), retention.KL(to="initial"), chunk=2, link_at="token")
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_each, "fused", lambda *arguments: given.append(arguments) or arguments[0])
        outputs(r, *problem(r), reader(r)[0])
    tensors, *options = given[0]
    torch.library.opcheck(read_each.fused, ([x.detach().requires_grad_() for x in tensors], *options))


def test_flops_of_links_at_tokens_are_those_of_the_formula():
    """Of P = 2 e d^2 entries a head 4 P a token: the gradient is added to the dual, and the query reads."""
    r = rule(memory.MLP(expansion=1), retention.KL(), chunk=2, link_at="token")
    leaves, given = problem(r)
    with FlopCounterMode(display=False) as counter:
        y = outputs(r, leaves, given, reader(r)[0])
        assert counter.get_total_flops() == CHUNKS * HEADS * 2 * 4 * 2 * D * D
        y.sum().backward()
    assert counter.get_total_flops() == CHUNKS * HEADS * 2 * (12 + 6) * 2 * D * D


def test_flops_are_those_of_the_products():
    r = rule()
    leaves, given = problem(r)
    found = []
    for function in (read_chunks, fused.read):
        with FlopCounterMode(display=False) as counter:
            y = outputs(r, leaves, given, function)
            forward = counter.get_total_flops()
            y.sum().backward()
        found.append((forward, counter.get_total_flops()))
    (plain, plain_all), (ours, ours_all) = found
    assert ours == plain and plain_all < ours_all < 1.4 * plain_all  # some are computed again


@pytest.mark.parametrize(
    "r",
    [
        rule(memory.MLP(layers=3)),
        rule(memory.MLP(bias=True)),
        rule(memory.MLP(expansion=3), retention.KL(), link_at="token"),
        rule(memory.SwiGLU(expansion=3), retention.KL(), link_at="token"),
        rule(window=3),
    ],
    ids=str,
)
def test_what_is_left_to_the_chunk_engine(r):
    leaves, given = problem(r)
    assert not outputs(r, leaves, given, reader(r)[1])
