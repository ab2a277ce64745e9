"""`miras bench`: formulas against PyTorch's counter, files that are whole, errors that say what to do. No times."""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from miras import MirasLayer, Rule, algorithm, bias, explain, memory, retention
from miras.bench.entries import PEERS, Missing, build, step, useful_flops
from miras.bench.flops import layer_bytes, layer_flops
from miras.bench.memory import high_water, peak_memory
from miras.bench.profile import KINDS, kind, shares
from miras.bench.run import Plan, bench
from miras.bench.show import title
from miras.bench.sizes import Sizes
from miras.bench.timing import Timing, alternate
from miras.cli import main
from miras.engines import chunk
from miras.errors import MirasError, UsageError
from miras.variants import VARIANTS, variant

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import targets

# The token loop also reads where it only steps (DeltaProduct) and predicts twice where it erases (Comba, RWKV-7).
MARGIN = 0.08
SIZES = Sizes(batch=2, time=64, dim=32, heads=2)
TINY = Sizes(batch=1, time=16, dim=16, heads=2, layers=1)
DEEP = Rule(memory.MLP(layers=3, expansion=2), bias.L2(), retention.L2(), algorithm.Momentum(), 16)
GATED = Rule(memory.SwiGLU(), bias.L2(), retention.L2(to="initial"), algorithm.Momentum(), 16)
MATRIX = Rule(memory.Linear(start="learned"), bias.Huber(), retention.KL(), algorithm.GradientDescent(), 16)
EXACT_LINK = Rule(memory.MLP(), bias.L2(), retention.KL(), algorithm.GradientDescent(), 16, link_at="token")


def miras(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def counted(mixer, sizes, **how):
    layer = MirasLayer(sizes.dim, sizes.heads, mixer, gates=sizes.gates)
    x = torch.randn(sizes.batch, sizes.time, sizes.dim)
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(x, **how)
    return counter.get_total_flops() / sizes.tokens


KNOWN = [name for name in VARIANTS if layer_flops(variant(name), SIZES) is not None]
RULES = {
    **{name: variant(name, 16) for name in KNOWN},
    "3 layers": DEEP,
    "gated": GATED,
    "matrix": MATRIX,
    "exact link": EXACT_LINK,
}


@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("name", RULES)
def test_the_formula_is_what_the_counter_counts(name, gates):
    mixer, sizes = RULES[name], SIZES.with_(gates=gates, backward=False)
    if isinstance(mixer, Rule) and mixer.algorithm.resets:
        sizes = sizes.with_(time=16 * mixer.chunk)  # the last chunk hands on slots that no other does
    # The native engine sees of a chunk what a token sees of it, the others mask what they have computed.
    native = isinstance(mixer, Rule) and gates == "head" and explain(mixer)["native"] == "chosen"
    parts = layer_flops(mixer, sizes, dense=not native)
    expected, how = sum(parts.values()), {}
    if isinstance(mixer, Rule) and mixer.chunk == 1:
        # The loop's steps are element-wise: the counter does not see them.
        expected, how = expected - parts["step"], {"engine": "recurrence"}
    try:
        found = counted(mixer, sizes, **how)
    except UsageError:
        pytest.skip("no such gates")
    assert found == pytest.approx(expected, rel=MARGIN)


def test_backward_is_two_products_for_each():
    sizes = SIZES.with_(chunk=64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(build("sdpa", sizes), sizes)()
    dense = sum(layer_flops(variant("transformer"), sizes, dense=True).values()) * sizes.tokens
    assert counter.get_total_flops() == pytest.approx(dense)
    assert useful_flops("sdpa", sizes) < dense
    assert useful_flops("yaad", sizes) == pytest.approx(3 * useful_flops("yaad", sizes.with_(backward=False)))


@pytest.mark.parametrize("rule", [variant("yaad", 16), DEEP, GATED])
def test_of_first_order_the_weights_of_inner_gradients_get_none(rule, monkeypatch):
    monkeypatch.setattr(chunk, "LARGE", math.inf)  # plain autograd, which computes nothing again
    found, formula = [], []
    for order in (replace(rule, first_order=True), rule):
        torch.manual_seed(0)
        layer, x = MirasLayer(SIZES.dim, SIZES.heads, order), torch.randn(SIZES.batch, SIZES.time, SIZES.dim)
        with FlopCounterMode(display=False) as counter:
            layer(x.requires_grad_(), engine="chunk")[0].sum().backward()
        found.append(counter.get_total_flops() / SIZES.tokens)
        formula.append(sum(layer_flops(order, SIZES, dense=True).values()))
    first, second = formula
    assert found[1] - found[0] == pytest.approx(second - first, rel=MARGIN) and second > first


def test_what_has_no_formula_says_so():
    assert layer_flops(variant("atlas"), SIZES) is None and layer_bytes(variant("lact"), SIZES) is None
    assert useful_flops("titans-pytorch", SIZES) is None and useful_flops("atlas", SIZES) is None


def test_bytes_of_a_chunk_fall_with_its_length_but_for_scores():
    short, long = (layer_bytes(variant("yaad", chunk), SIZES) for chunk in (4, 64))
    assert short["predict"] > long["predict"] and short["pairs"] < long["pairs"] and short["maps"] == long["maps"]


def test_turns_are_taken_and_the_first_call_is_kept_apart():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = alternate(calls, rounds=2, warm=1, between={"c": lambda: seen.append("c")})
    assert "".join(seen) == "acbc" * 3
    assert len(found["a"].seconds) == 2 and len(found["c"].seconds) == 4 and found["a"].first > 0


def test_median_and_spread():
    timing = Timing(9.0, [1.0, 2.0, 4.0])
    assert timing.median == 2.0 and timing.spread == 1.5


def test_memory_finds_a_known_allocation():
    size = 64 << 20
    found = high_water(lambda: torch.ones(size // 4))
    assert 0.9 * size < found < 1.5 * size


def test_memory_of_a_call_in_a_process_of_its_own():
    sizes = Sizes(batch=1, time=4096, dim=64, heads=2)
    # The input, q, k, v and what comes back take 1 MB each; nobody needs a hundred of them.
    assert 4e6 < peak_memory("sdpa", sizes, 1) < 1e8


def test_a_process_that_fails_says_its_last_line():
    with pytest.raises(MirasError, match="no variant is called"):
        peak_memory("yaat", TINY, 1)


def test_a_missing_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    with pytest.raises(Missing, match="not installed: pip install titans-pytorch"):
        build("titans-pytorch", TINY)
    results = bench(Plan(("yaad", "titans-pytorch"), TINY, (16,), (4,), rounds=1, memory=False))
    ours, peer = results["rows"]
    assert ours["ms"] > 0 and not ours["against"]
    assert peer["ms"] is None and "pip install titans-pytorch" in peer["note"]


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_runs(name):
    step(build(name, TINY.with_(chunk=8)), TINY.with_(chunk=8))()


def test_a_rule_that_refuses_is_a_row_and_not_the_end():
    results = bench(Plan(("memora", "gla"), TINY.with_(gates="channel"), (16,), (4,), rounds=1, memory=False))
    assert all(row["ms"] is not None or row["note"] for row in results["rows"])


def test_a_quick_run_writes_json_and_a_drawing(tmp_path):
    words = "bench yaad gated_deltanet --quick --no-memory --decode --profile --sweep chunk --peers sdpa".split()
    said = miras(*words, "--threads", 1, "--out", tmp_path).stdout
    results = json.loads((tmp_path / "bench.json").read_text())
    assert {"command", "commit", "versions", "machine", "setup", "speed", "rows", "decode"} <= results.keys()
    assert [(row["name"], row["chunk"]) for row in results["rows"]] == [
        ("yaad", 4),
        ("yaad", 8),
        ("gated_deltanet", None),
        ("sdpa", None),
    ]
    for row in results["rows"]:
        assert row["ms"] > 0 and row["first_ms"] > 0 and row["of_ceiling"] > 0 and len(row["all_ms"]) == 2
        assert row["against"].keys() == (set() if row["peer"] else {"sdpa"})
        assert row["peer"] or sum(row["shares"].values()) == pytest.approx(1)
    assert {row["context"] for row in results["decode"]} == {64, 128}
    assert results["machine"]["threads"] == 1 and results["versions"]["torch"] == torch.__version__
    assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag.endswith("svg")
    for part in ("tokens/s", "x sdpa", "of ceiling", "decoding", "where the time goes", "GFLOP/s", "bench.json"):
        assert part in said
    assert "forward and backward of a layer" in title(results)


def test_a_rule_of_ones_own_has_its_own_chunk(tmp_path):
    mine, several = tmp_path / "mine.json", tmp_path / "several.json"
    mine.write_text(json.dumps({"mixer": [GATED.to_config()]}))
    several.write_text(json.dumps({"mixer": [DEEP.to_config(), GATED.to_config()]}))
    words = "--quick --sweep chunk --decode --profile --no-memory --peers none --threads 1 --out".split()
    miras("bench", mine, "yaad", *words, tmp_path)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["name"], row["chunk"]) for row in results["rows"]] == [(str(mine), 16), ("yaad", 4), ("yaad", 8)]
    assert all(row["of_ceiling"] > 0 for row in results["rows"])
    assert peak_memory(str(mine), TINY, 1) > 0  # another process reads the file
    assert "expected one rule for all layers, got 2" in miras("bench", several, code=2).stderr


@pytest.mark.parametrize("words", ["--sweep time --peers none", "--forward --level model", "--dtype bfloat16"])
def test_other_quick_runs(words, tmp_path):
    miras("bench", "yaad", "transformer", "--quick", "--no-memory", *words.split(), "--threads", 1, "--out", tmp_path)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert all(row["ms"] > 0 for row in results["rows"])
    assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("yad", "Did you mean 'yaad'"),
        ("mine.yaml", "mine.yaml: there is no such configuration file"),
        ("--peers titan-pytorch", "Did you mean 'titans-pytorch'"),
        ("--time long", "--time long: expected whole numbers"),
        ("--chunk 0", "--chunk 0: expected whole numbers"),
        ("--gates channels", "Did you mean 'channel'"),
        ("--dtype float16", "--dtype float16"),
        ("--level layers", "Did you mean 'layer'"),
        ("--sweep length", "--sweep length: expected chunk, time or none"),
        ("--dim 30", "--dim 30 --heads 4"),
        ("--batch 0", "--batch 0: expected at least 1"),
        ("--device tpu", "--device tpu"),
    ],
)
def test_bad_input_is_a_paragraph_and_code_2(words, said, tmp_path):
    result = miras("bench", *words.split(), "--out", tmp_path, code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_kinds_of_operations():
    assert [kind(n) for n in ("miras::scan", *(f"aten::{n}" for n in ("bmm", "mul", "copy_", "view")))] == list(KINDS)
    a = torch.randn(256, 256)
    found = shares(lambda: [a @ a for _ in range(20)])
    assert max(found, key=found.get) == KINDS[1]


def test_targets_write_their_page(tmp_path):
    found = targets.main(["--quick", "--threads", "1", "--no-memory", "--out", str(tmp_path / "cpu.md")])
    text = (tmp_path / "cpu.md").read_text()
    assert all(target.what in text for target in found)
    assert "not measured" in text and "threads: 1" in text


def test_a_target_is_met_or_not():
    assert targets.Target("speed", 1.2, 1.0).row() == ("speed", "at least 1.00 x", "1.20 x", "met", "")
    assert targets.Target("memory", 1.2, 1.0, least=False).row()[3] == "**not met**"
    assert targets.Target("part", 0.25, unit="%").row() == ("part", "", "25 %", "", "")
    assert targets.Target("speed", None, 1.0).row()[2:4] == ("-", "not measured")


def test_the_gpu_benchmark_writes_its_page_without_a_gpu(tmp_path):
    found = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert all(target.what in text for target in gpu.targets(found))
    for rows in (found.checks, found.ops, found.models, found.decoded):
        assert rows and not [row["note"] for row in rows if row.get("note")]
    assert {row["engine"] for row in found.checks} == {"recurrence", "exact", "native", "chunk"}
    assert all(row["forward"] < {"float32": 1e-5, "bfloat16": 0.1}[row["dtype"]] for row in found.checks)


def test_the_gpu_benchmark_goes_on_where_a_case_fails():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    pages = []
    results = gpu.Results(gpu.QUICK, lambda found: pages.append(gpu.page(found, "made")), 1e12)
    results.add(results.models, {"name": "yaad", "time": 16, "batch": 2}, full)
    results.add(results.decoded, {"name": "yaad"}, lambda: 1 / 0)
    results.add(results.models, {"name": "moneta", "time": 16, "batch": 2}, lambda: [{"ms": 1.0}])
    assert "| yaad | 16 | 2 |  |  |  |  |  | out of memory |" in pages[0]
    assert "ZeroDivisionError: division by zero" in pages[1] and "| moneta | 16 | 2 | 1.00 |" in pages[2]


def test_the_gpu_benchmark_without_a_gpu_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == 2
    assert capsys.readouterr().err == "benchmarks/gpu.py needs an NVIDIA GPU and a PyTorch that was built for it.\n"


def test_the_page_is_called_after_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA H200")
    assert Path(gpu.page_of("cuda", quick=False)) == gpu.RESULTS / "h200.md"
    assert gpu.page_of("cuda", quick=True) == "-"
