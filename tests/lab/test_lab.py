import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import miras
from miras.algorithm import GradientDescent
from miras.bias import L2, Huber
from miras.cli import main
from miras.errors import UsageError
from miras.lab import SCENARIOS, Asked, Stream, compare, deep, entry, matrix, probe, watch
from miras.lab.maps import Drift, Extreme, Outliers, Sensor
from miras.lab.pairs import Conflicts, Neighbours, Overload, Silence
from miras.lab.watch import LAGS
from miras.memory import Linear
from miras.retention import NoRetention
from miras.state import tensors

SHORT = {
    "outliers": Outliers(size=8, tokens=64, step=16),
    "extreme": Extreme(size=8, tokens=64, gap=20),
    "drift": Drift(size=8, tokens=64, step=16),
    "sensor": Sensor(size=8, tokens=64, step=16, oscillators=2),
    "conflicts": Conflicts(size=8, pairs=4, rounds=6),
    "overload": Overload(size=8, load=4, rounds=2),
    "silence": Silence(size=8, pairs=4, rounds=4, silence=32, step=16),
    "neighbours": Neighbours(size=8, twins=3, rounds=6, step=16),
}


def lab(*words, code=0):
    result = CliRunner().invoke(main, ["lab", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


# -- streams ----------------------------------------------------------------------------------------------------------


def test_every_scenario_is_tested_here():
    assert SHORT.keys() == SCENARIOS.keys()


@pytest.mark.parametrize("scenario", [cls() for cls in SCENARIOS.values()], ids=SCENARIOS)
def test_streams_have_unit_keys_values_of_variance_1_and_their_seed(scenario):
    stream, again, other = scenario.build(3), scenario.build(3), scenario.build(4)
    assert torch.equal(stream.k, again.k) and torch.equal(stream.v, again.v) and not torch.equal(stream.k, other.k)
    tokens = len(stream.k)
    assert {len(x) for x in (stream.v, stream.truth, stream.write, stream.marked)} == {tokens}
    assert stream.at[-1] == tokens and list(stream.at) == sorted(set(stream.at))
    keys = [stream.k, *(a.k for a in stream.asked.values())]
    assert all(torch.allclose(k.norm(dim=-1), torch.ones(()), atol=1e-5) for k in keys)
    values = [stream.truth[stream.write > 0], *(a.v for a in stream.asked.values())]
    assert all(abs(v.square().nanmean().item() - 1) < 0.02 for v in values)
    assert {len(x) for a in stream.asked.values() for x in a[:2]} == {len(stream.at)}
    assert any(a.scored for a in stream.asked.values())


def test_outliers_come_at_their_rate_and_size():
    stream = Outliers(rate=0.3, scale=5.0, tokens=4000).build(0)
    assert abs(stream.marked.float().mean().item() - 0.3) < 0.03
    assert torch.equal(stream.v[~stream.marked], stream.truth[~stream.marked])
    # The median of |t| with 2 degrees of freedom is 0.816.
    assert abs(stream.v[stream.marked].abs().median().item() / 5 - 0.816) < 0.05
    assert Outliers(rate=0.0).build(0).v.equal(Outliers(rate=0.0).build(0).truth)


def test_extreme_tokens_stand_at_their_gap():
    stream = Extreme(gap=50, scale=7.0, tokens=120).build(0)
    assert stream.marked.nonzero().flatten().tolist() == [49, 99]
    assert torch.allclose(stream.v[49], 7 * stream.truth[49])


def test_a_map_that_drifts_is_back_after_a_period():
    stream = Drift(period=64, tokens=256, step=64).build(0)
    now, old = (stream.asked[n].v for n in ("new keys, map of now", "new keys, old map"))
    assert torch.allclose(now[0], now[1], atol=1e-4)
    # An eighth of a turn is sqrt(2 - 2 cos 45 degrees) away, but for the coordinate that stays.
    assert abs((now - old).norm() / now.norm() - math.sqrt(2 - math.sqrt(2))) < 0.05


def test_a_sensors_value_is_its_next_reading():
    stream = Sensor(spikes=0.0, noise=0.0, step=100).build(0)
    assert torch.allclose(torch.nn.functional.normalize(stream.v[:-1], dim=-1), stream.k[1:], atol=1e-5)
    asked, at = stream.asked["next readings"], stream.at[0]
    assert torch.allclose(asked.k[0], stream.k[at : at + 8], atol=1e-5)
    assert torch.allclose(asked.v[0], stream.v[at : at + 8], atol=1e-5)


def test_conflicting_keys_have_one_value_before_and_another_after():
    stream = Conflicts(pairs=6, rounds=5).build(0)
    first, second = stream.k[:30], stream.k[30:]
    assert len(first.unique(dim=0)) == 6 and len(second.unique(dim=0)) == 3
    assert stream.marked.tolist() == [False] * 30 + [True] * 15
    for key in second.unique(dim=0):
        same = (stream.k == key).all(-1)
        before, after = stream.v[same & ~stream.marked], stream.v[same & stream.marked]
        assert len(before) == len(after) == 5
        assert len(before.unique(dim=0)) == len(after.unique(dim=0)) == 1 and not torch.equal(before[0], after[0])


def test_overload_asks_for_pairs_that_were_read():
    stream = Overload(size=8, load=4, rounds=3).build(0)
    assert len(stream.k.unique(dim=0)) == 32 and len(stream.k) == 96
    for i, t in enumerate(stream.at):
        read = stream.k[:t]
        assert (stream.asked["all so far"].k[i][:, None] == read).all(-1).any(-1).all()


def test_silence_writes_nothing_and_twins_are_alike():
    stream = Silence(pairs=3, rounds=4, silence=20).build(0)
    assert stream.write.tolist() == [1.0] * 12 + [0.0] * 20 + [1.0] * 12
    twins = Neighbours(twins=5, alike=0.8).build(0).asked["own value"].k[0]
    assert torch.allclose((twins[:5] * twins[5:]).sum(-1), torch.tensor(0.8), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Outliers(rate=2.0), lambda: Sensor(oscillators=99), lambda: Silence(size=1)])
def test_a_stream_that_cannot_be_is_refused(make):
    with pytest.raises(UsageError, match="expected"):
        make().build(0)


# -- watching ---------------------------------------------------------------------------------------------------------


def orthogonal(tokens=16, size=16):
    """A stream of orthogonal keys, which a matrix holds exactly."""
    k, v = torch.eye(size)[:tokens], torch.randn(tokens, size, generator=torch.Generator().manual_seed(0))
    at = (tokens // 2, tokens)
    asked = {"the first half": Asked(k[: tokens // 2].expand(2, -1, -1), v[: tokens // 2].expand(2, -1, -1))}
    return Stream(k, v, v, torch.ones(tokens), torch.zeros(tokens, dtype=torch.bool), at, asked)


@pytest.mark.parametrize("learner", [GradientDescent(), GradientDescent(steps=2)], ids=str)
def test_a_matrix_recalls_orthogonal_keys_exactly(learner):
    rule = miras.Rule(Linear(), L2(), NoRetention(), learner)
    course = watch(entry("delta", rule).with_gates({"eta": 1.0}), [orthogonal()])
    assert course.seen.errors["the first half"].max() < 1e-6 and course.seen.found["the first half"].min() == 1
    there = course.seen.lags[0, 0]  # [n, lags]
    assert there[1, :5].max() < 1e-6 and there[0, LAGS.index(16) :].isnan().all()
    # Each value is new to the memory: the gradient of W is -v k^T.
    assert course.surprise is not None
    assert torch.allclose(course.surprise[0, 0], orthogonal().v.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["yaad", "gated_deltanet", "titans", "memora"])
def test_a_probe_answers_as_the_memory_would_and_changes_nothing(name):
    rule, torch_rng = miras.variants.variant(name), torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 21, 1, 8, generator=torch_rng) for _ in range(2))
    gates = {g.name: torch.full((2, 21, 1, 1), g.init) for g in rule.gates}
    first = rule.init(rule.initial(1, 8, 8, torch_rng), batch=2)
    y, state = miras.run(rule, k, k, v, gates, first)
    kept = {n: x.clone() for n, x in tensors(state).items()}
    answer = probe(rule, state, k[:, -1:].transpose(1, 2))
    assert torch.allclose(answer.transpose(1, 2), y[:, -1:], atol=1e-5)
    assert all(torch.equal(x, kept[n]) for n, x in tensors(state).items())


@pytest.mark.parametrize(
    "name", ["yaad", "memora", "gated_deltanet", "delta_product", "rwkv7", "mesa", "atlas", "lact"]
)
def test_looking_closely_changes_nothing(name):
    streams = [SHORT["conflicts"].build(s) for s in range(2)]
    close, far = (watch(entry(name), streams, closely=c).seen for c in (True, False))
    for n, error in close.errors.items():
        assert torch.allclose(error, far.errors[n], rtol=1e-3)
    assert torch.allclose(close.norm, far.norm, rtol=1e-4, equal_nan=name == "mesa")


@pytest.mark.parametrize("name", ["gated_deltanet", "chunks of 4"])
def test_surprise_is_the_gradient_that_is_written(name):
    rule = (
        miras.variants.variant(name) if name in miras.variants.VARIANTS else dataclasses.replace(matrix(L2()), chunk=4)
    )
    stream = SHORT["outliers"].build(0)
    course = watch(entry(name, rule, tau=20).with_gates({"eta": 0.5}), [stream])
    gates = {"eta": torch.full((1, 1, 1, 1), 0.5), "log_alpha": torch.full((1, 1, 1, 1), -1 / 20)}
    state, k, v = rule.init({"w": torch.zeros(1, 8, 8)}), *(x[None, :, None] for x in (stream.k, stream.v))
    assert course.surprise is not None
    for t in range(11):
        before = state.dual["w"]
        _, state = miras.run(rule, k[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], gates, state)
        step = (state.dual["w"] - math.exp(-1 / 20) * before).norm()
        assert torch.allclose(step, 0.5 * course.surprise[0, 0, t], rtol=1e-4)


def test_learning_rates_side_by_side_are_those_one_by_one():
    streams, etas = [SHORT["outliers"].build(s) for s in range(2)], [0.5, 0.1]
    both = watch(entry("yaad"), streams, etas).seen
    for i, eta in enumerate(etas):
        one = watch(entry("yaad").with_gates({"eta": eta}), streams).seen
        assert torch.allclose(both.errors["new keys"][i], one.errors["new keys"][0], rtol=1e-3)


def test_the_share_that_is_limited_follows_delta():
    streams = [SHORT["outliers"].build(0)]
    for delta, share in ((1e-6, 1.0), (1e6, 0.0)):
        for form in ("coordinate", "norm"):
            rule = entry("huber", matrix(Huber(form=form))).with_gates({"delta": delta, "eta": 0.1})
            limited = watch(rule, streams).limited
            assert limited is not None and abs(limited.mean().item() - share) < 0.01
    assert watch(entry("deltanet"), streams).limited is None


def test_yaad_is_robust_where_its_l_2_twin_is_not():
    twins = [entry("yaad"), entry("l_2", deep(L2()))]
    huber, l_2 = compare(Outliers(tokens=768), twins, seeds=2)["rules"]
    assert huber["late"]["new keys"][2] < 0.7 * l_2["late"]["new keys"][1], "at its worst seed below the other's best"
    without = compare(Outliers(tokens=768, rate=0.0), twins, seeds=2)["rules"]
    assert without[1]["late"]["new keys"][0] < 1.1 * without[0]["late"]["new keys"][0], "not so where nothing is wrong"


# -- comparisons and the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
def test_results_of_every_scenario_are_plain(name):
    results = compare(SHORT[name], SHORT[name].entries()[:2], seeds=2)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    n = len(results["at"])
    for rule in results["rules"]:
        assert len(rule["tried"]) == 11 and rule["gates"]["eta"] in [eta for eta, _ in rule["tried"]]
        assert {len(c) for curves in rule["error"].values() for c in curves.values()} == {n}
        assert {len(rule[q]) for q in ("norm", "moved", "near_zero")} == {n} and len(rule["lag"]) == len(LAGS)
        assert set(results["scored"]) <= rule["late"].keys()


def test_gates_that_are_given_are_kept():
    given = entry("yaad", tau=50).with_gates({"eta": 0.125, "delta": 0.5})
    (rule,) = compare(SHORT["outliers"], [given], seeds=1)["rules"]
    assert rule["gates"] == {"log_alpha": -0.02, "eta": 0.125, "delta": 0.5} and rule["tried"] == []
    (rule,) = compare(SHORT["outliers"], [entry("yaad")], seeds=1, search=False)["rules"]
    assert rule["gates"]["eta"] == 0.25


def test_the_list_has_a_line_for_each_scenario():
    said = lab().stdout
    assert all(f"{name} " in said and cls.shows in said for name, cls in SCENARIOS.items())


def test_lab_with_rules_of_ones_own(tmp_path):
    rule = tmp_path / "own.json"
    rule.write_text(json.dumps({"mixer": matrix(Huber()).to_config()}))
    small = ("--set", "size=8", "--set", "tokens=64", "--seeds", 2)
    said = lab(
        "outliers", "deltanet", rule, *small, "--tau", 64, "--gate", "delta=0.3", "--out", tmp_path / "out"
    ).stdout
    assert "\n deltanet " in said and "\n own " in said and "Look for:" in said
    results = json.loads((tmp_path / "out" / "outliers.json").read_text())
    assert results["settings"] == dataclasses.asdict(Outliers(size=8, tokens=64))
    assert results["rules"][1]["gates"]["delta"] == 0.3 and results["rules"][1]["gates"]["log_alpha"] == -1 / 64
    drawing = (tmp_path / "out" / "outliers.svg").read_text()
    assert "error: new keys" in drawing and ">deltanet<" in drawing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("outlier", "Did you mean 'outliers'"),
        ("outliers yad", "Did you mean 'yaad'"),
        ("outliers transformer", "has no memory to look into"),
        ("outliers --set rat=1", "Did you mean 'rate'"),
        ("outliers --set rate", "expected NAME=NUMBER"),
        ("outliers --set tokens=1.5", "expected a whole number"),
        ("outliers --set rate=2", "expected a rate in [0, 1]"),
        ("outliers deltanet --gate delta=1", "none of the rules has that gate"),
        ("outliers yaad --eta 2", "expected a value in [0, 1]"),
        ("outliers --tau 0", "expected a number of tokens above 0"),
        ("outliers --all", "expected one of them"),
        ("outliers nowhere.yaml", "no such configuration file"),
    ],
)
def test_bad_input_is_a_paragraph_and_code_2(words, said):
    result = lab(*words.split(), code=2)
    assert said in result.stderr and "Traceback" not in result.output


def test_a_file_with_several_rules_is_not_one_of_them(tmp_path):
    (tmp_path / "two.json").write_text(json.dumps({"model": "yaad,deltanet"}))
    result = lab("outliers", tmp_path / "two.json", code=2)
    assert "yaad,deltanet: expected one rule for all layers, got 2" in result.stderr
