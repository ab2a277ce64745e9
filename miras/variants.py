"""The paper's models as points of the design space: constructors, no algorithm in here.

`miras list` prints this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from miras import bias, memory, retention
from miras.algorithm import GradientDescent, Momentum
from miras.attention import Attention
from miras.errors import UsageError, near
from miras.mixer import Mixer
from miras.rule import Rule

DEFAULT_CHUNK = 16


def moneta(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """(3, 4)-Moneta: l_3 bias, L_4 retention (arXiv 2504.13173 eq. 24).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, decay to zero; else decay to the learned initial memory, which is stable at any
            length.
    """
    gate = retention.Lq(q=4.0, link="paper", to="zero" if letter else "initial")
    return Rule(memory.MLP(), bias.Lp(p=3.0), gate, GradientDescent(rate="input"), chunk)


def yaad(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """Yaad: Huber bias, L2 retention (arXiv 2504.13173 eq. 26).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, decay to zero and the mixture of its eq. 16; else decay to the learned initial
            memory and the coordinate-wise Huber loss of eq. 14, which is continuous.
    """
    form = "mixture" if letter else "coordinate"
    gate = retention.L2(to="zero" if letter else "initial")
    return Rule(memory.MLP(), bias.Huber(form=form), gate, GradientDescent(rate="input"), chunk)


def memora(chunk: int = DEFAULT_CHUNK, letter: bool = False) -> Rule:
    """Memora: l_2 bias, KL retention (arXiv 2504.13173 eq. 27).

    Args:
        chunk: tokens per chunk.
        letter: the paper's letter, decay to the uniform simplex; else decay to the learned initial memory.
    """
    gate = retention.KL(to="zero" if letter else "initial")
    return Rule(memory.MLP(), bias.L2(), gate, GradientDescent(rate="input"), chunk)


def titans(chunk: int = DEFAULT_CHUNK) -> Rule:
    """Titans' long-term memory: l_2 bias, L2 retention, momentum (arXiv 2501.00663). Decays to the initial memory.

    Args:
        chunk: tokens per chunk.
    """
    return Rule(memory.MLP(), bias.L2(), retention.L2(to="initial"), Momentum(rate="input"), chunk)


def linear_attention() -> Rule:
    """M_t = M_{t-1} + eta_t v_t k_t^T (arXiv 2006.16236, without its normaliser)."""
    return Rule(memory.Linear(), bias.Dot(), retention.NoRetention(), GradientDescent())


def deltanet() -> Rule:
    """M_t = M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T (arXiv 2406.06484)."""
    return Rule(memory.Linear(), bias.L2(), retention.NoRetention(), GradientDescent())


def gated_deltanet() -> Rule:
    """M_t = alpha_t M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T (arXiv 2412.06464)."""
    return Rule(memory.Linear(), bias.L2(), retention.L2(), GradientDescent(), gradient_at="decayed")


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
    """A row of the table.

    Attributes:
        make: the constructor.
        paper: where the model comes from.
        oracle: the independent implementation it is checked against, and where; None: none yet.
    """

    make: Callable[..., Mixer]
    paper: str
    oracle: str | None


NUMPY_LOOP = "a NumPy token loop with hand-written gradients (tests/test_variants.py)"

VARIANTS = {
    "moneta": Variant(moneta, "arXiv 2504.13173", NUMPY_LOOP),
    "yaad": Variant(yaad, "arXiv 2504.13173", NUMPY_LOOP),
    "memora": Variant(memora, "arXiv 2504.13173", NUMPY_LOOP),
    "titans": Variant(titans, "arXiv 2501.00663", NUMPY_LOOP),
    "linear_attention": Variant(linear_attention, "arXiv 2006.16236", "a cumulative sum (tests/test_variants.py)"),
    "deltanet": Variant(deltanet, "arXiv 2406.06484", "a NumPy transcription (tests/test_variants.py)"),
    "gated_deltanet": Variant(gated_deltanet, "arXiv 2412.06464", "transformers (tests/test_variants.py)"),
    "transformer": Variant(
        transformer, "arXiv 1706.03762", "PyTorch SDPA, transformers' RoPE (tests/test_variants.py)"
    ),
    "sliding_window": Variant(sliding_window, "arXiv 2004.05150", "masked softmax (tests/test_variants.py)"),
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
    has_chunk = "chunk" in make.__code__.co_varnames[: make.__code__.co_argcount]  # type: ignore[attr-defined]
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
