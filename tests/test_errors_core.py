"""What cannot be used is refused before anything is computed, by a message that says what was got and what to write."""

from dataclasses import replace

import pytest
import torch
from cases import CENTRES, call, draw_memory, draw_tokens

import miras
from miras import algorithm, bias, memory, registry, retention, variants
from miras.errors import MirasError, UsageError, near
from miras.mixer import mixer_from_config
from miras.rule import Rule

GD = algorithm.GradientDescent()
MLP, LINEAR = memory.MLP(), memory.Linear()
L2, KL = retention.L2(), retention.KL()


def rule(mem=MLP, loss=bias.L2(), gate=L2, learner=GD, **frame):
    return Rule(mem, loss, gate, learner, **frame)


# what is wrong -> (how, all of these words are in the message)
AXES = {
    "q too small": (lambda: retention.Lq(q=1.0), ["Lq", "q", "greater than 1", "1.0"]),
    "unknown link": (lambda: retention.Lq(link="letter"), ["'paper'", "'mirror'", "'letter'"]),
    "unknown target of decay": (lambda: retention.L2(to="home"), ["L2", "'zero'", "'initial'", "'home'"]),
    "unknown target of KL": (lambda: KL.__class__(to="home"), ["KL", "'home'"]),
    "unknown potential": (
        lambda: retention.Bregman(potential="log"),
        ["Bregman", "logistic", "hypentropy", "entropy", "'log'"],
    ),
    "unknown divergence": (lambda: retention.FDivergence(f="tv"), ["FDivergence", "chi2", "hellinger", "'tv'"]),
    "unknown local divergence": (lambda: retention.LocalFDivergence(f="tv"), ["LocalFDivergence", "chi2", "'tv'"]),
    "a local divergence with a target": (
        lambda: retention.LocalFDivergence(to="initial"),
        ["LocalFDivergence", "'zero'", "'initial'", "FDivergence(to='initial')"],
    ),
    "a local elastic net with a target": (
        lambda: retention.LocalElasticNet(to="initial"),
        ["LocalElasticNet", "'zero'", "'initial'", "ElasticNet(to='initial')"],
    ),
    "negative threshold": (lambda: retention.ElasticNet(gamma=-0.1), ["ElasticNet", "at least 0", "-0.1"]),
    "no threshold": (lambda: retention.LocalElasticNet(gamma=float("nan")), ["LocalElasticNet", "at least 0", "nan"]),
    "p too small": (lambda: bias.Lp(p=0.5), ["Lp", "at least 1", "0.5"]),
    "sharpness": (lambda: bias.L1(form="paper", sharpness=0.0), ["sharpness", "positive", "0.0"]),
    "form of lp": (lambda: bias.Lp(form="tanh"), ["'smooth'", "'paper'", "'tanh'"]),
    "threshold of huber": (lambda: bias.Huber(delta=0.0), ["a number above 0", "0.0"]),
    "form of huber": (lambda: bias.Huber(form="smooth"), ["'coordinate'", "'norm'", "'mixture'", "'smooth'"]),
    "loss that is no function": (lambda: bias.Custom(0.5), ["Custom", "fn", "0.5"]),
    "loss in no module": (lambda: bias.Custom("nowhere:loss"), ["'nowhere:loss'", "'package.module:function'"]),
    "loss that its module has not": (lambda: bias.Custom("miras.bias:nothing"), ["'miras.bias:nothing'", "nothing"]),
    "loss without a name": (lambda: bias.Custom("miras.bias"), ["'miras.bias'", "'package.module:function'"]),
    "loss that is a number": (lambda: bias.Custom("math:pi"), ["'math:pi'", "float", "function"]),
    "lambda in a configuration": (
        lambda: registry.to_config(bias.Custom(lambda y, v: (y - v).sum())),
        ["<lambda>", "cannot be saved", "top level of a module"],
    ),
    "degree": (lambda: memory.Polynomial(degree=4), ["Polynomial", "1, 2 or 3", "4"]),
    "expansion": (lambda: memory.SwiGLU(expansion=0), ["SwiGLU", "expansion", "at least 1", "0"]),
    "layers": (lambda: memory.MLP(layers=0), ["layers", "at least 1", "0"]),
    "eps": (lambda: memory.MLP(eps=0.0), ["eps", "more than 0", "0.0"]),
    "activation": (lambda: memory.MLP(activation="relu"), ["activation", "gelu", "silu", "'relu'"]),
    "rate": (lambda: algorithm.Momentum(rate="auto"), ["Momentum", "rate", "'none'", "'input'", "'auto'"]),
    "window": (lambda: miras.Attention(window=0), ["window", "at least 1", "None", "0"]),
    "residual of another size": (lambda: MLP.leaves(4, 6), ["residual", "4", "6", "MLP(residual=False)"]),
    "vector of another size": (lambda: memory.Vector().leaves(4, 6), ["Vector", "4", "6", "Linear()"]),
}
RULES = {
    "chunk 0": (lambda: rule(chunk=0), ["chunk", "at least 1", "0"]),
    "chunk of half a token": (lambda: rule(chunk=2.5), ["chunk", "whole number", "2.5"]),
    "gradient_at": (lambda: rule(gradient_at="now"), ["'previous'", "'decayed'", "'now'"]),
    "link_at": (lambda: rule(link_at="start"), ["'token'", "'chunk'", "'start'"]),
    "decayed gradients behind a link": (
        lambda: rule(gate=KL, gradient_at="decayed"),
        ["KL()", "gradient_at='previous'"],
    ),
    "a link singular where the memory starts": (
        lambda: rule(mem=LINEAR, gate=retention.Lq()),
        ["Lq()", "Linear()", "Linear(start='learned')"],
    ),
    "rows without a direction": (
        lambda: rule(mem=LINEAR, gate=retention.Sphere()),
        ["Sphere()", "singular", "Linear(start='learned')"],
    ),
    "axes in the wrong places": (lambda: rule(loss=L2), ["bias", "miras.bias", "Huber()", "L2(to='zero')"]),
    "a class instead of an object": (lambda: rule(mem=memory.MLP), ["memory", "Linear()", "MLP"]),
    "a configuration with an unknown name": (lambda: rule(mem={"name": "MPL"}), ["memory", "'MPL'", "'MLP'"]),
    "a configuration with an unknown field": (lambda: rule(mem={"name": "MLP", "layer": 2}), ["'layer'", "'layers'"]),
    "a mixer with an unknown name": (lambda: mixer_from_config({"name": "Rules"}), ["'Rules'", "'Rule'"]),
    "a marker base by its name": (
        lambda: registry.from_config(retention.Retention, {"name": "EuclideanRetention"}),
        ["'EuclideanRetention'", "does not exist"],
    ),
    "an unknown engine": (lambda: miras.plan(rule(), "chunks"), ["'chunks'", "'chunk'"]),
    "an engine that cannot run the rule": (
        lambda: miras.plan(rule(chunk=4), "exact"),
        ["'exact'", "chunk 1", "chunk 4", "engine='auto'"],
    ),
    "an engine for other memories": (lambda: miras.plan(rule(), "exact"), ["'exact'", "linear memories", "MLP()"]),
}


def refused(how, words):
    with pytest.raises(UsageError) as caught:
        how()
    assert isinstance(caught.value, MirasError) and isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("wrong", AXES)
def test_axes_refuse_values_outside_their_range(wrong):
    refused(*AXES[wrong])


@pytest.mark.parametrize("wrong", RULES)
def test_rules_refuse_choices_that_do_not_go_together(wrong):
    refused(*RULES[wrong])


# -- run --------------------------------------------------------------------------------------------------------------

YAAD = variants.yaad(chunk=4)


def run(rule=YAAD, channels=False, **changes):
    """A call with some of its tensors or options changed; a change may be a function of what would be there."""
    torch.manual_seed(0)
    tokens = draw_tokens(rule, channels=channels)
    given = {**tokens._asdict(), "state": state_of(rule) if isinstance(rule, Rule) else None}
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return miras.run(rule, given.pop("q"), given.pop("k"), given.pop("v"), given.pop("gates"), **given)


def with_gate(name, change):
    return lambda gates: {**gates, name: change(gates[name])}


def without(name):
    return lambda gates: {n: g for n, g in gates.items() if n != name}


def state_of(rule, batch=2):
    return rule.init(*draw_memory(rule), batch=batch)


def nan_at_one(gate):
    return gate.index_fill(1, torch.tensor([3]), torch.nan)


MEMORA = Rule(memory.Vector(), bias.L2(), KL, GD)
CALLS = {
    "q without heads": (dict(q=lambda x: x[:, :, 0]), ["[B, T, H, d_k]", "[2, 13, 4]"]),
    "k shorter than q": (dict(k=lambda x: x[:, 1:]), ["[2, 12, 2, 4]", "[2, 13, 2, 4]"]),
    "v of another batch": (dict(v=lambda x: x[:1]), ["[1, 13, 2, 4]"]),
    "heads of v no multiple": (dict(v=lambda x: x[:, :, :1]), ["multiple", "[2, 13, 1, 4]"]),
    "no token": (dict(q=lambda x: x[:, :0], k=lambda x: x[:, :0], v=lambda x: x[:, :0]), ["empty", "[2, 0, 2, 4]"]),
    "mixed dtypes": (dict(v=lambda x: x.float()), ["dtype", "torch.float64", "torch.float32"]),
    "integers": (
        dict(q=lambda x: x.long(), k=lambda x: x.long(), v=lambda x: x.long()),
        ["floating-point", "torch.int64"],
    ),
    "unknown gate": (dict(gates=lambda g: {**g, "alpha": g["eta"]}), ["'alpha'", "'log_alpha'"]),
    "missing gate": (dict(gates=without("delta")), ["'delta'", "threshold", "'eta'", "'log_alpha'"]),
    "no gates": (dict(gates=None), ["'delta'", "no gates"]),
    "gate without its last axis": (
        dict(gates=with_gate("eta", lambda g: g[..., 0])),
        ["'eta'", "[2, 13, 2, 1]", "[2, 13, 2]"],
    ),
    "gate of another length": (dict(gates=with_gate("eta", lambda g: g[:, 1:])), ["'eta'", "[2, 12, 2, 1]"]),
    "gate of a strange width": (
        dict(gates=with_gate("eta", lambda g: g.repeat(1, 1, 1, 3))),
        ["'eta'", "[2, 13, 2, 4] per channel", "3]"],
    ),
    "channels of a head's gate": (
        dict(rule=variants.yaad(letter=True), gates=with_gate("delta", lambda g: g.repeat(1, 1, 1, 4))),
        ["'delta'", "one number per head", "4 channels"],
    ),
    "channels along a softmax": (
        dict(rule=MEMORA, gates=with_gate("log_alpha", lambda g: g.repeat(1, 1, 1, 4))),
        ["KL()", "constant along the axis", "log_alpha per head"],
    ),
    "eta beyond its range": (dict(gates=with_gate("eta", lambda g: g + 1), validate=True), ["'eta'", "[0, 1]"]),
    "growth": (dict(gates=with_gate("log_alpha", lambda g: -g), validate=True), ["'log_alpha'", "[-inf, 0]"]),
    "negative threshold": (dict(gates=with_gate("delta", lambda g: -g), validate=True), ["'delta'", "[0, inf]"]),
    "a gate that is NaN": (dict(gates=with_gate("eta", nan_at_one), validate=True), ["'eta'", "nan"]),
    "no state for a learned memory": (dict(state=lambda _: None), ["MLP()", "rule.init(rule.initial("]),
    "a state of another batch": (
        dict(state=lambda _: state_of(YAAD, batch=3)),
        ["another rule, size or batch", "[3, 2, 4, 16]"],
    ),
    "a state of another memory": (dict(state=lambda _: state_of(variants.deltanet())), ["another rule", "'w1'", "'w'"]),
    "a state of another algorithm": (
        dict(state=lambda _: state_of(variants.titans())),
        ["another rule", "GradientDescent"],
    ),
    "a state of another target": (
        dict(state=lambda _: state_of(variants.yaad(letter=True))),
        ["another rule", "L2(to='initial')"],
    ),
    "a state of attention": (
        dict(state=lambda _: call(miras.Attention(), draw_tokens(miras.Attention()))[1]),
        ["CacheState"],
    ),
    "an unknown engine": (dict(engine="tokens"), ["'tokens'", "native, exact, block, triton, chunk, recurrence, auto"]),
    "an engine that cannot": (dict(engine="exact"), ["'exact'", "chunk 4", "engine='auto'"]),
    "a mask with holes": (dict(mask=torch.tensor([[1, 0] + [1] * 11] * 2)), ["holes"]),
    "a pack that does not add up": (dict(cu_seqlens=torch.tensor([0, 5, 12])), ["batch of 2"]),
    "gates for attention": (dict(rule=miras.Attention(), gates={"eta": torch.ones(2, 13, 2, 1)}), ["no gates"]),
    "a rule's state for attention": (
        dict(rule=miras.Attention(), state=lambda _: state_of(YAAD)),
        ["state of its own"],
    ),
}


@pytest.mark.parametrize("wrong", CALLS)
def test_run_refuses_what_does_not_fit(wrong):
    options, words = CALLS[wrong]
    refused(lambda: run(**options), words)


def test_the_calls_that_are_changed_above_are_good_ones():
    for rule in (YAAD, variants.yaad(letter=True), MEMORA, miras.Attention()):
        y, _ = run(rule)
        assert y.isfinite().all()


def test_ranges_are_only_looked_at_when_asked():
    assert run(gates=with_gate("eta", lambda g: g + 1))[0].shape == (2, 13, 2, 4)


def test_a_step_that_overshoots_is_warned_of():
    with pytest.warns(UserWarning, match=r"eta chunk \|k\|\^2 reaches .* smaller eta or chunk"):
        run(gates=with_gate("eta", lambda g: torch.full_like(g, 0.9)), validate=True)


@pytest.mark.parametrize(
    "mem, learner",
    [(memory.Linear(gated="values"), algorithm.GradientDescent()), (memory.Linear(), algorithm.Momentum())],
    ids=str,
)
def test_per_channel_gates_fall_back_from_the_exact_engine_only_when_it_was_not_asked_for(mem, learner):
    rule = miras.Rule(mem, bias.L2(), retention.L2(), learner)
    y, _ = run(rule, channels=True)
    assert torch.allclose(y, run(rule, channels=True, engine="recurrence")[0], rtol=0, atol=1e-12)
    refused(lambda: run(rule, channels=True, engine="exact"), ["'exact'", "gates per head", "engine='auto'"])


def test_near_offers_the_closest_name_or_all():
    assert near("yad", ["moneta", "yaad"]) == " Did you mean 'yaad'?"
    assert near("zzz", ["moneta", "yaad"]) == " Choose one of moneta, yaad."


def test_every_gate_says_what_it_means_and_maps_its_initial_value_back():
    for gate in variants.titans().gates + YAAD.gates:
        assert gate.meaning and gate.name in CENTRES
        assert torch.isclose(gate.squash(torch.tensor(gate.unsquash(gate.init))), torch.tensor(gate.init), rtol=1e-5)
        raw = torch.linspace(-30, 30, 101, dtype=torch.float64)
        value = gate.squash(raw)
        assert (value >= gate.low).all() and (value <= gate.high).all() and (value.diff() >= 0).all()


def test_the_learning_rate_of_a_chunk_is_bounded_by_its_staleness():
    for chunk, high in ((1, 1.0), (16, 1.0), (32, 0.5), (64, 0.25)):
        eta = next(g for g in variants.yaad(chunk=chunk).gates if g.name == "eta")
        assert eta.high == high and 0 < eta.init < high


@pytest.mark.parametrize("loss", [bias.L2(), bias.Lp(), bias.Huber(), bias.L1()], ids=str)
def test_momentum_has_an_eighth_of_the_learning_rate(loss):
    plain, repeated = (
        next(g for g in replace(YAAD, bias=loss, algorithm=learner("input")).gates if g.name == "eta")
        for learner in (algorithm.GradientDescent, algorithm.Momentum)
    )
    assert repeated.high == plain.high / 8 and repeated.init == plain.init / 8


def test_explain_names_one_chosen_engine_and_the_reasons_of_the_others():
    for rule in (YAAD, variants.deltanet(), MEMORA):
        said = miras.explain(rule)
        assert list(said.values()).count("chosen") == 1
        assert miras.plan(rule).name == next(n for n, text in said.items() if text == "chosen")
    assert "linear memories" in miras.explain(variants.yaad(chunk=1))["exact"]
    with_momentum = replace(variants.gated_deltanet(), algorithm=algorithm.Momentum())
    assert miras.plan(with_momentum).name == "exact"
