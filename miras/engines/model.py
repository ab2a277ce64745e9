"""What kernels know of a rule."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

from miras.algorithm import Implicit, LeastSquares, LinearAlgorithm
from miras.bias import L1, L2, Dot, Huber, Lp, Robust
from miras.memory import MLP, SwiGLU
from miras.retention import KL, Bregman, EuclideanRetention, Lq
from miras.retention.base import mass, unit
from miras.rule import Rule
from miras.weights import Leaf


@dataclass(frozen=True)
class Model:
    """A rule with a memory of two layers in plain words and numbers, as an argument of kernels and operators.

    Attributes:
        gated: the memory is W1 (s(W3 k) (.) W2 k), and W3 is in all as W2; else it is W1 s(W2 k).
        activation: name of s.
        norm: LN behind the matrices.
        eps: what it adds to the variance.
        residual: keys are added behind it.
        bias: name of the bias, see `bias.gradient`.
        p: exponent of the bias.
        sharpness: of the paper's l_p.
        clip: gradients of a token are shortened to norm sqrt(d).
        link: name of the link, see `link.weight`.
        q: exponent of the link.
        unit1: of W1, the sum c of KL's slices or the s of Lq and Bregman.
        unit2: of W2.
        slope1: of the link of W1 where the dual is constant.
        slope2: of W2.
        rate1: what the learning rate of W1 is scaled by.
        rate2: of W2.
        home: states are relative to the initial memory.
        slots: tensors of its own that the algorithm carries for each matrix.
        alone: chunks are of one token, which reads with what it leaves: the link itself, and nothing linearised.
        first_order: outer gradients do not flow through the weights at which inner gradients are taken.
    """

    gated: bool
    activation: str
    norm: bool
    eps: float
    residual: bool
    bias: str
    p: float
    sharpness: float
    clip: bool
    link: str
    q: float
    unit1: float
    unit2: float
    slope1: float
    slope2: float
    rate1: float
    rate2: float
    home: bool
    slots: int
    alone: bool
    first_order: bool

    @classmethod
    def of(cls, rule: Rule, leaves: dict[str, Leaf]) -> Model:
        """The model of a rule that the engine does not refuse."""
        memory, bias, retention = rule.memory, rule.bias, rule.retention
        assert isinstance(memory, MLP | SwiGLU)
        w1, w2 = leaves["w1"], leaves["w2"]
        q, units = 0.0, (1.0, 1.0)
        if isinstance(retention, KL):
            units = mass(w1), mass(w2)
        elif isinstance(retention, Lq):
            q, units = retention.q, (retention.unit(w1), retention.unit(w2))
        elif isinstance(retention, Bregman):
            units = unit(w1), unit(w2)
        return cls(
            isinstance(memory, SwiGLU),
            memory.activation,
            memory.norm,
            memory.eps,
            memory.residual,
            bias_name(rule),
            *bias_numbers(rule),
            bool(bias.clip),
            link_name(rule),
            q,
            *units,
            retention.slope0(w1),
            retention.slope0(w2),
            rule.rate(w1),
            rule.rate(w2),
            retention.to == "initial",
            rule.algorithm.slots,
            alone(rule),
            rule.first_order,
        )

    def __str__(self) -> str:
        # By hand: torch.compile traces it, and does not know how to go through json.
        return ";".join(f"{getattr(self, name)!r}" for name in FIELDS)

    @property
    def whole(self) -> bool:
        """What the link needs of a matrix is one number for all of it."""
        return self.link.startswith("lq")

    @staticmethod
    @lru_cache
    def parse(text: str) -> Model:
        """The inverse of `str`."""
        return Model(*map(literal_eval, text.split(";")))


FIELDS = tuple(field.name for field in fields(Model))


def alone(rule: Rule) -> bool:
    """See `Model`."""
    return rule.chunk == 1 and rule.read_at == "after"


def memory_name(rule: Rule) -> str:
    """The name of a rule's memory, "" where there are no kernels for it."""
    memory = rule.memory
    if isinstance(memory, MLP):
        return "mlp" if memory.layers == 2 and not memory.bias else ""
    return "swiglu" if isinstance(memory, SwiGLU) else ""


def bias_name(rule: Rule) -> str:
    """The name of the device functions of a rule's bias, "" where there are none."""
    bias = rule.bias
    if isinstance(bias, Lp | L1):
        return f"lp_{bias.form}"
    if isinstance(bias, Huber):
        return f"huber_{bias.form}"
    return {Dot: "dot", L2: "l2", Robust: "robust"}.get(type(bias), "")


def bias_numbers(rule: Rule) -> tuple[float, float]:
    """Exponent and sharpness of a rule's bias, where it has them."""
    bias = rule.bias
    if not isinstance(bias, Lp | L1):
        return 0.0, 0.0
    return bias.p if isinstance(bias, Lp) else 1.0, bias.sharpness


def link_name(rule: Rule) -> str:
    """The name of the device functions of a rule's link, "" where there are none."""
    retention = rule.retention
    if isinstance(retention, EuclideanRetention):
        return "identity"
    if isinstance(retention, Lq) and retention.q >= 2:
        return f"lq_{retention.link}"
    if isinstance(retention, Bregman) and retention.potential == "logistic":
        return "logistic"
    return "kl" if isinstance(retention, KL) else ""


def reasons(rule: Rule) -> Iterator[str]:
    """Why kernels cannot run a rule, whatever its memory and its tokens are."""
    algorithm = rule.algorithm
    if not bias_name(rule):
        yield f"its kernels do not know the gradient of {rule.bias}"
    if not link_name(rule):
        yield f"its kernels do not know the link of {rule.retention}"
    own = isinstance(algorithm, Implicit | LeastSquares) or algorithm.resets or algorithm.slots > 1
    if own or not isinstance(algorithm, LinearAlgorithm):
        yield f"its kernels do not know {algorithm}"
    if rule.gradient_at != "previous":
        yield "its kernels take gradients at the memory before the chunk, gradient_at='previous'"
    if rule.window > 1 or rule.step_at == "chunk":
        yield "its kernels sum no losses of a window and take a step for every token"
