"""Table 4 and figure 4 of the paper, and what nobody has tested: parts of the three models taken away or exchanged."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from miras import bias, memory, retention
from miras.algorithm import Momentum
from miras.evaluate.tasks import Positions
from miras.experiments.plan import Model, Scale, Sweeps, TextExperiment, model
from miras.inputs import Inputs
from miras.rule import Rule
from miras.variants import gated_deltanet, homing_deltanet, mamba2, memora, mneme, moneta, variant, yaad

YAAD, MONETA, MEMORA = yaad(), moneta(), memora()
P = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
Q = (2.0, 3.0, 4.0, 5.0)
DELTA = (0.25, 0.5, 1.0, 2.0, 4.0)
CHUNK = (4, 16, 64)
EPS = (1e-5, 1e-2)


def parts(scale: Scale) -> TextExperiment:
    """Yaad without each of its parts, and with others in their place."""
    changed: dict[str, Model] = {
        "yaad": model(YAAD),
        "constant delta": model(replace(YAAD, inputs=replace(YAAD.inputs, delta="constant"))),
        "values as they are": model(replace(YAAD, inputs=replace(YAAD.inputs, value="own"))),
        "l_2 bias": model(replace(YAAD, bias=bias.L2())),
        "l_1 bias": model(replace(YAAD, bias=bias.L1(form="paper"))),
        "norm-wise Huber": model(replace(YAAD, bias=bias.Huber(form="norm"))),
        "mixture Huber": model(replace(YAAD, bias=bias.Huber(form="mixture"))),
        "no retention": model(replace(YAAD, retention=retention.NoRetention(to="initial"))),
        "decay to zero": model(replace(YAAD, retention=retention.L2())),
        "matrix memory": model(replace(YAAD, memory=memory.MLP(layers=1))),
        "no residual": model(replace(YAAD, memory=memory.MLP(residual=False))),
        "no layer norm": model(replace(YAAD, memory=memory.MLP(norm=False))),
        "mneme": model("mneme"),
        "mneme with l_2": model(replace(mneme(), bias=bias.L2())),
        "three layers": model(replace(YAAD, memory=memory.MLP(layers=3))),
        "momentum": model(replace(YAAD, algorithm=Momentum(rate="input"))),
        "first order": model(replace(YAAD, first_order=True)),
        "no convolution": model(YAAD, conv=0),
        "channel gates": model(YAAD, gates="channel"),
        "RoPE": model(YAAD, rope=True),
    }
    claim = (
        "Average accuracy 53.98 of the full model, 50.63 without retention, 52.19 with a delta that no token "
        "changes, 52.86 without l_2, 53.04 without l_1, 51.57 with a linear memory (table 4)."
    )
    return _ablation("The parts of Yaad", claim, changed, "yaad", scale)


def exponents(scale: Scale) -> TextExperiment:
    """p and q of Moneta."""
    ps = {p: "moneta" if p == 3 else f"p = {p:g}" for p in P}
    qs = {q: "moneta" if q == 4 else f"q = {q:g}" for q in Q}
    changed = {"moneta": model(MONETA)}
    losses = {name: bias.Lp(p=p, clip=p > 2) for p, name in ps.items()}
    changed |= {name: model(_with_memory(replace(MONETA, bias=loss))) for name, loss in losses.items()}
    gate = MONETA.retention
    changed |= {name: model(replace(MONETA, retention=replace(gate, q=q))) for q, name in qs.items()}  # type: ignore[call-arg]
    claim = "p = 3 is best and p = 4 worst of 1 to 4; q changes how the model scales with context (figure 4)."
    sweeps = {"p": {"moneta": ps}, "q": {"moneta": qs}}
    return _ablation("The exponents of Moneta", claim, changed, "moneta", scale, sweeps)


def threshold(scale: Scale) -> TextExperiment:
    """delta of Yaad, beyond which an error is extreme: the value that tokens move it from."""
    names = {delta: "yaad" if delta == 1 else f"delta = {delta:g}" for delta in DELTA}
    changed = {name: model(replace(YAAD, bias=bias.Huber(delta=delta))) for delta, name in names.items()}
    claim = "Nothing: the paper leaves delta to the tokens, and does not say where it begins."
    return _ablation("The threshold of Yaad", claim, changed, "yaad", scale, {"delta": {"yaad": names}})


def chunk(scale: Scale) -> TextExperiment:
    """Tokens of a chunk, whose gradients are all taken at the memory before it."""
    models = ("yaad", "moneta", "memora")
    curves: dict[str, dict[float, str]] = {
        name: {size: name if size == 16 else f"{name}, chunk {size}" for size in CHUNK} for name in models
    }
    changed = {curves[name][size]: model(variant(name, size)) for name in models for size in CHUNK}
    claim = "Nothing: chunks are 16 or 64 tokens, and which of them a table has is not said."
    return _ablation("The chunk", claim, changed, "yaad", scale, {"chunk": curves})


def eps(scale: Scale) -> TextExperiment:
    """What LN adds to the variance of what Yaad's memory answers, in chunks and without."""
    chunks = 1, 16, 64
    names = {(x, c): "yaad" if (x, c) == (1e-5, 16) else f"eps {x:g}, chunk {c}" for x in EPS for c in chunks}
    changed = {name: model(replace(yaad(c), memory=memory.MLP(eps=x))) for (x, c), name in names.items()}
    curves: dict[str, dict[float, str]] = {f"eps = {x:g}": {c: names[x, c] for c in chunks} for x in EPS}
    claim = "Nothing: its memory ends in LN, and what that adds to the variance is not said."
    return _ablation("The eps of a memory's LN", claim, changed, "yaad", scale, {"chunk": curves})


def home(scale: Scale) -> TextExperiment:
    """What a memory decays to: Gated DeltaNet, Mamba2 and Yaad at home at zero and at a learned memory."""
    delta, homing, normed = gated_deltanet(), homing_deltanet(), Inputs(value="normed")
    changed = {
        "gated_deltanet": model(delta),
        "values normed": model(replace(delta, inputs=normed)),
        "from a learned memory": model(replace(delta, memory=homing.memory)),
        "to a learned memory": model(homing),
        "to a learned memory, values normed": model(replace(homing, inputs=normed)),
        "to a learned memory, no retention": model(replace(homing, retention=retention.NoRetention(to="initial"))),
        "mamba2": model("mamba2"),
        "mamba2, to a learned memory": model(replace(mamba2(), memory=homing.memory, retention=homing.retention)),
        "yaad, to zero": model(replace(YAAD, retention=retention.L2())),
        "yaad": model(YAAD),
    }
    claim = "Nothing: the paper's memories decay to zero, as those of the linear RNNs that it compares them with."
    return _ablation("What a memory decays to", claim, changed, "gated_deltanet", scale)


def losses(scale: Scale) -> TextExperiment:
    """The paper's losses and Titans' momentum in a matrix: Gated DeltaNet with a home and each of them, beside Yaad."""
    homing = homing_deltanet()
    others = {
        "Huber": bias.Huber(),
        "norm-wise Huber": bias.Huber(form="norm"),
        "l_1": bias.L1(form="paper"),
        "l_3": bias.Lp(p=3.0),
    }
    changed = {"homing_deltanet": model(homing)}
    changed |= {name: model(replace(homing, bias=loss)) for name, loss in others.items()}
    changed["momentum"] = model(replace(homing, algorithm=Momentum()))
    claim = "Nothing: its losses are tested in deep memories only, but for Yaad's with a linear one (table 4)."
    return _ablation("Losses of a matrix", claim, {**changed, "yaad": model(YAAD)}, "homing_deltanet", scale)


def space(scale: Scale) -> TextExperiment:
    """Rules that nobody has tested: biases and retentions of the three with each other, and with momentum."""
    losses = {"": YAAD.bias, "l_2 bias": MEMORA.bias, "l_3 bias": MONETA.bias}
    gates = {"": YAAD.retention, "KL": MEMORA.retention, "L_4": MONETA.retention}
    learners = {"": YAAD.algorithm, "momentum": Momentum(rate="input")}
    known = {"": "yaad", "l_2 bias, momentum": "titans", "l_2 bias, KL": "memora", "l_3 bias, L_4": "moneta"}
    changed: dict[str, Model] = {}
    for (loss, bias_), (gate, retention_), (learner, algorithm) in product(
        losses.items(), gates.items(), learners.items()
    ):
        name = ", ".join(filter(None, (loss, gate, learner)))
        rule = replace(YAAD, bias=bias_, retention=retention_, algorithm=algorithm, link_at=None)
        changed[known.get(name, name)] = model(_with_memory(rule))
    claim = "Nothing: the paper tests neither momentum nor its biases with each other's retention."
    return _ablation("Biases, retentions and momentum", claim, changed, "yaad", scale)


def _with_memory(rule: Rule) -> Rule:
    """A rule with the initial memory of Memora if it has its gate, of Moneta if its eta is as small, else of Yaad."""
    if rule.retention == MEMORA.retention:
        return replace(rule, memory=MEMORA.memory)
    return replace(rule, memory=MONETA.memory if rule.bias.eta_limit < MEMORA.retention.eta_limit else YAAD.memory)


def _ablation(
    title: str, claim: str, changed: dict[str, Model], baseline: str, scale: Scale, sweeps: Sweeps | None = None
) -> TextExperiment:
    """All at the learning rate in the middle, so that a part and not a search makes the difference."""
    tasks = {"positions": Positions(length=scale.far)}
    return TextExperiment(
        title, claim, changed, scale.training, (scale.rate,), scale.seeds, baseline, tasks, sweeps or {}
    )
