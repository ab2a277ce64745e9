"""Models of the literature, and two of our own, as points of the design space: constructors, no algorithm in here.

`miras list` prints this table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from miras import bias, memory, retention
from miras.algorithm import Algorithm, GradientDescent, Implicit, LeastSquares, MiniBatch, Momentum, Muon
from miras.attention import Attention
from miras.errors import UsageError, near
from miras.inputs import Inputs
from miras.mixer import Mixer
from miras.rule import Rule

DEFAULT_CHUNK = 16


def moneta(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """(3, 4)-Moneta: l_3 bias, L_4 retention (arXiv 2504.13173 eq. 24).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, decay to zero and values as they are; else decay to the learned initial memory,
            which is stable at any length, values of the size of what the memory writes, a small W1 and an LN of more
            eps.
    """
    gate = retention.Lq(q=4.0, link="paper", to="zero" if letter else "initial")
    return _deep(bias.Lp(p=3.0), gate, chunk, letter, memory.MLP(spread=0.3, eps=1e-3))


def yaad(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """Yaad: Huber bias, L2 retention (arXiv 2504.13173 eq. 26).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, as of `moneta`, and the mixture of its eq. 16; else the coordinate-wise Huber loss
            of eq. 14, which is continuous.
    """
    form = "mixture" if letter else "coordinate"
    gate = retention.L2(to="zero" if letter else "initial")
    return _deep(bias.Huber(form=form), gate, chunk, letter)


def memora(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """Memora: l_2 bias, KL retention (arXiv 2504.13173 eq. 27).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, as of `moneta`, with decay to the uniform simplex.
    """
    gate = retention.KL(to="zero" if letter else "initial")
    return _deep(bias.L2(), gate, chunk, letter, memory.MLP(spread=0.45, eps=1e-2))


def titans(chunk: int = DEFAULT_CHUNK) -> Rule:
    """Titans' long-term memory: l_2 bias, L2 retention, momentum (arXiv 2501.00663). Decays to the initial memory.

    Args:
        chunk: tokens per chunk.
    """
    return _deep(bias.L2(), retention.L2(to="initial"), chunk, learner=Momentum(rate="input"))


def mneme(chunk: int = DEFAULT_CHUNK) -> Rule:
    """Yaad with a bare memory, W1 gelu(W2 x), a small W1 and values of half its size; in no paper.

    It starts nearly silent, so that what it writes is heard: recall is found as soon as by matrices. Without a layer
    norm outer gradients stay bounded without chunks, too (`chunk=1`). What bounds a chunk's steps instead is the size
    of the values and Huber's loss: with l_2 two of three trainings were lost (`docs/results.md`).

    Args:
        chunk: tokens per chunk; 1 recalls most.
    """
    net = memory.MLP(residual=False, norm=False, spread=0.1)
    return replace(yaad(chunk), memory=net, inputs=Inputs(value="normed", value_size=0.5))


def atlas(chunk: int = DEFAULT_CHUNK, window: int = 4, step_at: Literal["token", "chunk"] = "token") -> Rule:
    """Atlas: l_2 bias summed over a window of tokens, momentum, orthogonalised steps (arXiv 2505.23735).

    Decays to the initial memory, as all deep memories here.

    Args:
        chunk: tokens per chunk.
        window: tokens whose losses a gradient sums.
        step_at: "token", the paper's, an orthogonalised step for each token; "chunk", one for each chunk, which costs a
            fraction of it.
    """
    gate = retention.L2(to="initial")
    return Rule(memory.MLP(), bias.L2(), gate, Muon(), chunk, window=window, step_at=step_at)


def lact(chunk: int = 256) -> Rule:
    """LaCT: SwiGLU memory, dot-product bias, rows on a sphere, one Muon step a large chunk (arXiv 2505.23884).

    A chunk is read with what earlier chunks have written.

    Args:
        chunk: tokens per chunk; the paper has 2,048 and more.
    """
    swiglu, learner = memory.SwiGLU(residual=False, norm=False), Muon(momentum=False, schedule="lact")
    frame: Any = {"step_at": "chunk", "read_at": "before", "inputs": Inputs(alpha="none")}
    return Rule(swiglu, bias.Dot(), retention.Sphere(), learner, chunk, **frame)


def ttt_linear(chunk: int = DEFAULT_CHUNK) -> Rule:
    """TTT-Linear: x + LN(W x + b), l_2 bias, mini-batches (arXiv 2407.04620).

    Args:
        chunk: tokens per mini-batch.
    """
    net = memory.MLP(layers=1, bias=True)
    return Rule(net, bias.L2(), retention.NoRetention(), MiniBatch(rate="input"), chunk)


def ttt_mlp(chunk: int = DEFAULT_CHUNK) -> Rule:
    """TTT-MLP: x + LN(W1 gelu(W2 x + b2) + b1), l_2 bias, mini-batches (arXiv 2407.04620).

    Args:
        chunk: tokens per mini-batch.
    """
    net = memory.MLP(activation="gelu_tanh", bias=True)
    return Rule(net, bias.L2(), retention.NoRetention(), MiniBatch(rate="input"), chunk)


def _deep(
    loss: bias.Bias,
    gate: retention.Retention,
    chunk: int,
    letter: bool = False,
    net: memory.MLP = memory.MLP(),
    learner: Algorithm | None = None,
) -> Rule:
    """A rule of the paper's memory; by its letter `net` is the plain one. Where bias or retention allow only a small
    eta, it has a small W1, and LN more eps: what LN makes of keys for which hidden units are silent is fed back over
    long sequences (`benchmarks/stability.py`).
    """
    inputs = Inputs(value="own" if letter else "normed")
    learner = learner or GradientDescent(rate="input")
    return Rule(memory.MLP() if letter else net, loss, gate, learner, chunk, inputs=inputs)


def _matrix(loss: bias.Bias, gate: retention.Retention, learner: Algorithm | None = None, **frame: Any) -> Rule:
    """A rule of a matrix memory that starts at zero."""
    return Rule(memory.Linear(), loss, gate, learner or GradientDescent(), **frame)


def linear_attention() -> Rule:
    """M_t = M_{t-1} + v_t k_t^T (arXiv 2006.16236, without its normaliser)."""
    return _matrix(bias.Dot(), retention.NoRetention(), inputs=Inputs(eta="one"))


def retnet() -> Rule:
    """M_t = alpha M_{t-1} + v_t k_t^T, a constant alpha = 1 - 2^(-5 - h) per head (arXiv 2307.08621)."""
    return _matrix(bias.Dot(), retention.L2(), inputs=Inputs(alpha="retnet", eta="one"))


def lightning() -> Rule:
    """M_t = alpha M_{t-1} + v_t k_t^T, a constant alpha = exp(-8 h / H) per head (arXiv 2405.17381)."""
    return _matrix(bias.Dot(), retention.L2(), inputs=Inputs(alpha="lightning", eta="one"))


def gla() -> Rule:
    """M_t = M_{t-1} diag(alpha_t) + v_t k_t^T (arXiv 2312.06635)."""
    return _matrix(bias.Dot(), retention.L2(), inputs=Inputs(alpha="channel", eta="one"))


def mamba2() -> Rule:
    """M_t = exp(-A dt_t) M_{t-1} + dt_t v_t k_t^T (arXiv 2405.21060)."""
    return _matrix(bias.Dot(), retention.L2(), inputs=Inputs(alpha="dt", eta="dt"))


def hgrn2() -> Rule:
    """M_t = M_{t-1} diag(alpha_t) + v_t (1 - alpha_t)^T: the key is what is forgotten (arXiv 2404.07904)."""
    return _matrix(bias.Dot(), retention.L2(), inputs=Inputs(alpha="channel", eta="one", key="forgotten"))


def dfw() -> Rule:
    """M_t = (beta_t alpha_t^T) (.) M_{t-1} + v_t k_t^T (arXiv 2210.04243)."""
    return _matrix(bias.Dot(), retention.TwoSided(), inputs=Inputs(alpha="channel", eta="one"))


def deltanet() -> Rule:
    """M_t = M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T (arXiv 2406.06484)."""
    return _matrix(bias.L2(), retention.NoRetention())


def gated_deltanet() -> Rule:
    """M_t = alpha_t M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T (arXiv 2412.06464)."""
    return _matrix(bias.L2(), retention.L2(), gradient_at="decayed")


def homing_deltanet() -> Rule:
    """Gated DeltaNet that starts from a learned memory and decays to it; in no paper.

    W_t = W_0 + A_t with A_t = alpha_t A_{t-1} (I - eta_t k_t k_t^T) + eta_t (v_t - W_0 k_t) k_t^T: Gated DeltaNet on
    what a learned linear map does not know of a value, so that the kernels of the one run the other.
    """
    rule = _matrix(bias.L2(), retention.L2(to="initial"), gradient_at="decayed")
    return replace(rule, memory=memory.Linear(start="learned"))


def kda() -> Rule:
    """M_t = M_{t-1} diag(alpha_t) (I - eta_t k_t k_t^T) + eta_t v_t k_t^T (Kimi Linear, arXiv 2510.26692)."""
    return _matrix(bias.L2(), retention.L2(), gradient_at="decayed", inputs=Inputs(alpha="channel", eta="head"))


def delta_product(steps: int = 2) -> Rule:
    """Gated DeltaNet with several keys and values a token: alpha_t once, then that many delta steps (arXiv 2502.10297).

    Args:
        steps: delta steps a token.
    """
    return _matrix(bias.L2(), retention.L2(), GradientDescent(steps=steps), gradient_at="decayed")


def longhorn() -> Rule:
    """M_t = M_{t-1} - eta_t / (1 + eta_t |k_t|^2) (M_{t-1} k_t - v_t) k_t^T (arXiv 2407.14207)."""
    return _matrix(bias.L2(), retention.NoRetention(), Implicit(), inputs=Inputs(eta="head"))


def rwkv7() -> Rule:
    """M_t = M_{t-1} (diag(alpha_t) - e_t (a_t (.) e_t)^T) + v_t k_t^T, e_t the erase key (arXiv 2503.14456)."""
    return _matrix(bias.Erase(), retention.L2(), inputs=Inputs(alpha="channel", eta="one"))


def comba() -> Rule:
    """M_t = alpha_t M_{t-1} - eta_t (M_{t-1} e_t - v_t) k_t^T, read with q - d k (arXiv 2506.02475)."""
    return _matrix(bias.Erase(along="key"), retention.L2(), inputs=Inputs(query="corrected"))


def mesa() -> Rule:
    """The exact minimiser of the decayed l_2 losses of all tokens, with a ridge (MesaNet, arXiv 2506.05233)."""
    return _matrix(bias.L2(), retention.L2(), LeastSquares(), inputs=Inputs(alpha="head", eta="head"))


def transformer() -> Attention:
    """Causal softmax attention with rotary positions."""
    return Attention()


def sliding_window(window: int = 256) -> Attention:
    """Causal softmax attention over the last `window` tokens.

    Args:
        window: tokens seen, the present one included.
    """
    return Attention(window=window)


class Variant(NamedTuple):
    """A row of the table: the constructor, and where the model comes from."""

    make: Callable[..., Mixer]
    paper: str


VARIANTS = {
    "moneta": Variant(moneta, "arXiv 2504.13173"),
    "yaad": Variant(yaad, "arXiv 2504.13173"),
    "memora": Variant(memora, "arXiv 2504.13173"),
    "titans": Variant(titans, "arXiv 2501.00663"),
    "mneme": Variant(mneme, "this library"),
    "atlas": Variant(atlas, "arXiv 2505.23735"),
    "lact": Variant(lact, "arXiv 2505.23884"),
    "ttt_mlp": Variant(ttt_mlp, "arXiv 2407.04620"),
    "ttt_linear": Variant(ttt_linear, "arXiv 2407.04620"),
    "mesa": Variant(mesa, "arXiv 2506.05233"),
    "longhorn": Variant(longhorn, "arXiv 2407.14207"),
    "deltanet": Variant(deltanet, "arXiv 2406.06484"),
    "gated_deltanet": Variant(gated_deltanet, "arXiv 2412.06464"),
    "homing_deltanet": Variant(homing_deltanet, "this library"),
    "delta_product": Variant(delta_product, "arXiv 2502.10297"),
    "kda": Variant(kda, "arXiv 2510.26692"),
    "comba": Variant(comba, "arXiv 2506.02475"),
    "rwkv7": Variant(rwkv7, "arXiv 2503.14456"),
    "linear_attention": Variant(linear_attention, "arXiv 2006.16236"),
    "retnet": Variant(retnet, "arXiv 2307.08621"),
    "lightning": Variant(lightning, "arXiv 2405.17381"),
    "mamba2": Variant(mamba2, "arXiv 2405.21060"),
    "gla": Variant(gla, "arXiv 2312.06635"),
    "hgrn2": Variant(hgrn2, "arXiv 2404.07904"),
    "dfw": Variant(dfw, "arXiv 2210.04243"),
    "transformer": Variant(transformer, "arXiv 1706.03762"),
    "sliding_window": Variant(sliding_window, "arXiv 2004.05150"),
}


def variant(name: str, chunk: int | None = None) -> Mixer:
    """The mixer of a name in the table.

    Args:
        name: such as "yaad".
        chunk: tokens per chunk, for the models that have chunks.

    Raises:
        UsageError: an unknown name, said with the near ones.
    """
    if name not in VARIANTS:
        raise UsageError(f"no variant is called {name!r}." + near(name, list(VARIANTS)))
    make = VARIANTS[name].make
    has_chunk = "chunk" in inspect.signature(make).parameters
    return make(chunk=chunk) if chunk is not None and has_chunk else make()


def pattern(names: str, layers: int, chunk: int | None = None) -> tuple[Mixer, ...]:
    """One mixer per layer from a comma-separated pattern, repeated: "yaad,sliding_window".

    Args:
        names: variants, separated by commas.
        layers: number of layers.
        chunk: tokens per chunk, for the models that have chunks.
    """
    parts = [variant(name.strip(), chunk) for name in names.split(",")]
    return tuple(parts[i % len(parts)] for i in range(layers))
