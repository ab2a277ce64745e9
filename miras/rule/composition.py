"""What the four choices of a rule say together: which do not go together and why, and the update in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miras.algorithm import Implicit, LeastSquares, MiniBatch
from miras.bias import L2, Erase
from miras.memory import Linear
from miras.retention import EuclideanRetention, TwoSided

if TYPE_CHECKING:
    from miras.rule.rule import Rule


def conflicts(rule: Rule) -> Iterator[str]:
    """Why the choices do not go together, and what to write."""
    matrix, l2 = isinstance(rule.memory, Linear), isinstance(rule.bias, L2) and not rule.bias.clip
    euclidean = isinstance(rule.retention, EuclideanRetention)
    if rule.gradient_at == "decayed" and not euclidean:
        yield (
            f"gradient_at='decayed' needs a retention whose link is the identity (NoRetention, L2); "
            f"{rule.retention} has another. Write gradient_at='previous'."
        )
    if rule.gradient_at == "decayed" and rule.first_order:
        yield "first_order=True goes with gradient_at='previous'."
    if rule.retention.singular_at_zero and any(leaf.std == 0 for leaf in rule.memory.leaves(8, 8).values()):
        yield (
            f"{rule.retention} is singular or dead at a zero matrix, where {rule.memory} starts. "
            f"Write {type(rule.memory).__name__}(start='learned')."
        )
    if isinstance(rule.bias, Erase) and not matrix:
        yield f"Erase names keys of a matrix, and {rule.memory} is none. Write memory=Linear()."
    if isinstance(rule.retention, TwoSided) and not matrix:
        yield f"TwoSided decays keys and values of a matrix, and {rule.memory} is none. Write memory=Linear()."
    if isinstance(rule.algorithm, Implicit) and not (matrix and l2 and euclidean and rule.chunk == 1):
        yield (
            "Implicit is in closed form for Linear memory, L2 bias without clip, NoRetention or L2 and chunk 1 "
            f"only, got {rule.memory}, {rule.bias}, {rule.retention}, chunk {rule.chunk}. Write GradientDescent()."
        )
    if isinstance(rule.algorithm, LeastSquares):
        from_zero = matrix and rule.retention.to == "zero" and not any(x.std for x in rule.leaves(8, 8).values())
        if not (from_zero and l2 and euclidean and rule.chunk == 1):
            yield (
                "LeastSquares is in closed form for Linear memory that starts at and decays to zero, L2 bias "
                f"without clip, NoRetention or L2 and chunk 1 only, got {rule.memory}, {rule.bias}, "
                f"{rule.retention}, chunk {rule.chunk}. Write GradientDescent()."
            )
    if rule.window > 1:
        special = isinstance(rule.bias, Erase) or isinstance(rule.algorithm, LeastSquares)
        if special or rule.algorithm.steps > 1 or rule.gradient_at == "decayed":
            yield (
                f"a window goes with neither Erase, LeastSquares, several steps a token nor gradient_at='decayed', "
                f"got {rule.bias}, {rule.algorithm}, gradient_at={rule.gradient_at!r}. Write window=1."
            )
    if rule.step_at == "chunk":
        own = isinstance(rule.algorithm, LeastSquares | MiniBatch | Implicit) or rule.algorithm.steps > 1
        if own or rule.gradient_at == "decayed" or isinstance(rule.retention, TwoSided):
            yield (
                "step_at='chunk' sums gradients at the memory before it for one step, which goes with neither "
                f"LeastSquares, MiniBatch, Implicit, several steps, TwoSided nor gradient_at='decayed', got "
                f"{rule.algorithm}, {rule.retention}, gradient_at={rule.gradient_at!r}. Write step_at='token'."
            )


def formula(rule: Rule) -> str:
    """The update in one line of plain characters."""
    identity = isinstance(rule.retention, EuclideanRetention)
    a, keep = "W" if identity else "A", "alpha_t " if rule.retention.gates else ""
    if isinstance(rule.algorithm, LeastSquares):
        return ", ".join(rule.algorithm.law).replace("{keep}", keep)
    home = rule.retention.to == "initial" and keep
    past = f"{a}_0 + {keep}({a}_{{t-1}} - {a}_0)" if home else f"{keep}{a}_{{t-1}}"
    at = past if rule.gradient_at == "decayed" else "W_{t-1}" if rule.chunk == 1 else "W_chunk"
    grad = f"grad L({at}; k_t, v_t)"
    if isinstance(rule.bias, Erase):
        asked = f"({at}) e_t" if " " in at else f"{at} e_t"
        grad = f"({asked} - v_t) k_t^T" if rule.bias.along == "key" else f"({asked} b_t^T - v_t k_t^T)"
    if rule.window > 1:
        grad = f"sum_{{s = t-{rule.window - 1}..t}} gamma_s grad L({at}; k_s, v_s)"
    if rule.step_at == "chunk":
        grad = f"sum_{{t in chunk}} eta_t {grad}"
    step, *rest = (part.replace("{grad}", grad) for part in rule.algorithm.law)
    if rule.step_at == "chunk":
        step = step.removeprefix("eta_t ")
    if rule.algorithm.steps > 1:
        rest.append(f"{rule.algorithm.steps} such steps a token")
    if rule.retention.law:
        return ", ".join([rule.retention.law.replace("{step}", step), *rest])
    return ", ".join([f"{a}_t = {past} - {step}", *rest, *([] if identity else ["W_t = link(A_t)"])])
