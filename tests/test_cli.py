import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_text
from transformers import Trainer
from typer.testing import CliRunner

from miras.cli import main
from miras.evaluate.tasks import TASKS
from miras.variants import VARIANTS

COMMANDS = ("train", "eval", "generate", "inspect", "report", "experiment", "list", "explain", "demo", "bench", "lab")
SMALL = "--dim 16 --layers 1 --heads 2 --context 32 --batch 64 --steps 4 --save-every 2".split()


def miras(*words, code=0, stdin=None):
    """Run a command; nothing but an exit code and words may come out of it."""
    result = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "yaad"
    return out, miras("train", "yaad", "--data", text, "--out", out, *SMALL)


def test_help_of_everything_shows_examples():
    said = miras("--help").output
    assert all(command in said for command in COMMANDS)
    for command in COMMANDS:
        said = miras(command, "--help").output
        assert f"miras {command}" in said.split("Examples:")[1]


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "miras", "--help"], capture_output=True, text=True, check=True)
    assert "miras" in done.stdout and "train" in done.stdout


def test_train_says_what_happens(run):
    out, result = run
    for part in (
        "parameters",
        "engine     chunk",
        "words.txt",
        "step 4/4",
        "tokens/s",
        "bits/byte",
        str(out / "model"),
    ):
        assert part in result.stderr
    assert result.stdout == ""


def test_eval_of_a_trained_model(run, text, tmp_path):
    out, _ = run
    words = ("eval", "perplexity", out, "--data", text, "--set", "contexts=32,64", "--set", "limit=1000")
    results = json.loads(miras(*words, "--json", "--out", tmp_path).stdout)
    assert [row["context"] for row in results["models"][str(out)]["rows"]] == [32, 64]
    assert results["settings"]["data"] == text and results["seeds"] == 1
    again = miras(*words, "--out", tmp_path)
    assert "bits per byte" in again.stdout and f"from {tmp_path}" in again.stderr
    said = miras("eval", "needle_number", out, "--data", text, "--set", "lengths=700", "--out", tmp_path).stdout
    assert all(word in said for word in ("needle_number", "depth", "0.25", "exact", "found", "margin", "parameters"))


def test_eval_compares_models_that_learn_from_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "--set train=8 --set test=8,16 --set examples=4 --set steps=10 --set dim=8 --set batch=32".split()
    words = ("eval", "parity", "yaad", "retnet", "--seeds", 2, *settings)
    said = miras(*words).stdout
    for part in ("parity: accuracy", "yaad", "retnet", " ± ", "bytes of state", "95 % intervals", "16"):
        assert part in said
    results = json.loads(miras(*words, "--json").stdout)
    assert results["training"]["steps"] == 10 and list(results["models"]) == ["yaad", "retnet"]
    assert len(list(Path("runs/eval").glob("*.json"))) == 4


def test_eval_tells_about_its_tasks():
    said = miras("eval").stdout
    assert said == miras("eval", "--list").stdout
    for name, task in TASKS.items():
        assert f"  {name} " in said and task.formula in said
    said = miras("eval", "mqar").stdout
    assert "Multi-query" in said and "vocabulary=8192\n      size of the vocabulary." in said and "steps=1000" in said
    assert "steps=" not in miras("eval", "needle_uuid").stdout


def test_eval_hands_over_to_the_harness(run, monkeypatch):
    called = []
    module = type(sys)("miras.evaluate.harness")
    found = {"results": {"piqa": {"acc,none": 0.5}}}
    monkeypatch.setattr(module, "harness", lambda *args: called.append(args) or {args[1][0]: found}, raising=False)
    monkeypatch.setattr(module, "table", lambda found: f"table of {list(found['results'])}", raising=False)
    monkeypatch.setitem(sys.modules, "miras.evaluate.harness", module)
    words = ("eval", "--lm-eval", "piqa,boolq", run[0], "--include-path", "mine", "--limit", 3)
    assert "table of ['piqa']" in miras(*words).stdout
    assert called == [(["piqa", "boolq"], [str(run[0])], "mine", 3)]
    assert json.loads(miras(*words, "--json").stdout) == {str(run[0]): found["results"]}


def test_generate_from_all_three_sources(run, tmp_path):
    out, _ = run
    (tmp_path / "start.txt").write_text("the mémoire")
    for words, stdin in (
        (("--prompt", "the mémoire"), None),
        (("--prompt-file", tmp_path / "start.txt"), None),
        ((), "the mémoire"),
    ):
        said = miras("generate", out, "--tokens", 5, *words, stdin=stdin).stdout
        assert said.startswith("the mémoire") and said.endswith("\n")


def test_inspect(run, tmp_path):
    model, _ = run
    (tmp_path / "text.txt").write_text("the memory learns while it reads " * 20)
    page = tmp_path / "page" / "inside.html"
    words = ("--text", tmp_path / "text.txt", "--limit", 50, "--recall", "xyz", "--distances", "8,32", "--out", page)
    assert str(page.with_suffix(".json")) in miras("inspect", model, *words).stdout
    html = page.read_text()
    assert "Extreme share" in html and "Recall over distance" in html and "--distances 8,32" in html


def test_report(run, tmp_path):
    model, _ = run
    page = tmp_path / "report.html"
    assert str(page) in miras("report", model, "--out", page, "--title", "Mine").stdout
    assert "<h1>Mine</h1>" in page.read_text() and "bits per byte" in page.read_text()
    sections = miras("report", model, "--json").stdout
    (tmp_path / "again.json").write_text(sections)
    assert miras("report", tmp_path / "again.json", "--json").stdout == sections


def test_list():
    rows = json.loads(miras("list", "--json").stdout)
    assert [row["name"] for row in rows] == list(VARIANTS)
    fields = {
        "name",
        "memory",
        "bias",
        "retention",
        "algorithm",
        "update",
        "inputs",
        "engines",
        "oracle",
        "error",
        "paper",
    }
    assert all(set(row) == fields and row["engines"] for row in rows)
    said = miras("list").stdout
    assert all(name in said for name in VARIANTS) and "Lq(to='initial')" in said


def test_list_axes():
    axes = json.loads(miras("list", "--axes", "--json").stdout)
    assert list(axes) == ["memory", "bias", "retention", "algorithm"]
    lp = next(part for part in axes["bias"] if part["name"] == "Lp")
    assert lp["arguments"] == {"p": 3.0, "form": "smooth", "sharpness": 10.0, "clip": None}
    said = miras("list", "--axes").stdout
    assert all(part["formula"] in said for parts in axes.values() for part in parts)
    assert "Lp(p=3.0, form='smooth'" in said and "eq. 10-11" in said


@pytest.mark.parametrize("name", VARIANTS)
def test_explain(name):
    said = miras("explain", name, "--heads", 2, "--head-dim", 16).stdout
    row = next(row for row in json.loads(miras("list", "--json").stdout) if row["name"] == name)
    for part in (name, row["update"], row["memory"], row["bias"], "state", "engine", "parameters"):
        assert part in said


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("deltanet", "W_t = W_{t-1} - eta_t grad L(W_{t-1}; k_t, v_t)"),
        ("gated_deltanet", "W_t = alpha_t W_{t-1} - eta_t grad L(alpha_t W_{t-1}; k_t, v_t)"),
        (
            "homing_deltanet",
            "W_t = W_0 + alpha_t (W_{t-1} - W_0) - eta_t grad L(W_0 + alpha_t (W_{t-1} - W_0); k_t, v_t)",
        ),
        ("yaad", "W_t = W_0 + alpha_t (W_{t-1} - W_0) - eta_t grad L(W_chunk; k_t, v_t)"),
        ("memora", "A_t = A_0 + alpha_t (A_{t-1} - A_0) - eta_t grad L(W_chunk; k_t, v_t), W_t = link(A_t)"),
    ],
)
def test_explain_says_where_gradients_are_taken(name, update):
    assert update in miras("explain", name).stdout.splitlines()[2]


def test_explain_tells_chunks_and_reasons():
    said = miras("explain", "yaad", "--chunk", 64).stdout
    assert "chunk of 64 tokens" in said and "it is for chunk 1, the rule has chunk 64" in said
    assert "eta        [0, 0.25]" in said


def test_demo_is_handed_its_arguments(monkeypatch, tmp_path):
    called = []
    module = type(sys)("miras.demo")
    monkeypatch.setattr(module, "demo", lambda *args: called.append(args), raising=False)
    monkeypatch.setitem(sys.modules, "miras.demo", module)
    miras("demo", "--quick", "--out", tmp_path)
    assert called == [(Path(tmp_path), True, 0)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "Did you mean 'train'"),
        ("train", "say which model"),
        ("train yad", "Did you mean 'yaad'"),
        ("train yaad,slidingwindow", "Did you mean 'sliding_window'"),
        ("train nothing.yaml", "there is no such configuration file"),
        ("train yaad --size 130m", "expected one of tiny, 120m"),
        ("train yaad --batch 1000", "--batch 1000: expected a multiple"),
        ("train yaad --gates channels", "--gates channels"),
        ("train yaad --dim 30 --heads 4", "--dim 30"),
        ("train yaad --data nowhere.txt", "nowhere.txt: there is no such file"),
        ("train yaad --data EMPTY", "EMPTY"),
        ("train yaad --data BINARY", "BINARY"),
        ("train yaad --data org/name", "org/name"),
        ("train yaad --tokenizer org/name", "point --tokenizer at a local folder"),
        ("train yaad --resume --out nowhere", "there is no run in nowhere"),
        ("train yaad --steps some", "--steps"),
        ("eval perplexity nowhere", "got no such folder"),
        ("eval perplexty nowhere", "Did you mean 'perplexity'"),
        ("eval EMPTY", "the task comes first. Write for example: miras eval perplexity EMPTY"),
        ("eval perplexity nowhere --set context=9", "Did you mean 'contexts'"),
        ("eval perplexity nowhere --set contexts=long", "expected something like contexts=256,1024,4096"),
        ("eval perplexity nowhere --set part=test", "expected validation, train or all"),
        ("eval perplexity nowhere --set part", "expected NAME=VALUE"),
        ("eval mqar yad", "Did you mean 'yaad'"),
        ("eval mqar yaad --data x", "the task has no such setting"),
        ("eval mqar yaad --set steps=1", "10 at least"),
        ("eval --lm-eval piqa", "say of which model"),
        ("eval --lm-eval piqa nowhere --set limit=1", "--lm-eval goes with"),
        ("bench yaad --time some", "--time some"),
        ("generate nowhere --prompt a", "got no such folder"),
        ("generate nowhere --prompt a --prompt-file b", "expected one of them"),
        ("generate nowhere --prompt-file b", "--prompt-file b: there is no such file"),
        ("generate nowhere --prompt-file BINARY", "expected UTF-8"),
        ("inspect nowhere", "Missing option '--text'"),
        ("inspect nowhere --text EMPTY", "got no such folder"),
        ("inspect nowhere --text b", "--text b: there is no such file"),
        ("inspect nowhere --text BINARY", "--text BINARY: expected UTF-8"),
        ("inspect nowhere --text EMPTY --distances 4", "write --recall"),
        ("inspect nowhere --text EMPTY --recall a --distances four", "--distances four: expected whole numbers"),
        ("inspect nowhere --text EMPTY --out page", "--out page: expected a name that ends in .html"),
        ("report", "Missing argument"),
        ("report nowhere", "nowhere: there is no such run folder or result file"),
        ("report .", "expected a run folder of `miras train`"),
        ("report EMPTY", "EMPTY: expected JSON"),
        ("report BINARY", "BINARY: expected JSON"),
        ("explain yad", "Did you mean 'yaad'"),
        ("explain yaad --heads 0", "expected at least 1"),
    ],
)
def test_bad_input_is_a_paragraph_and_code_2(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("")
    Path("BINARY").write_bytes(bytes(range(256)))
    result = miras(*words.split(), code=2)
    assert said in result.stderr
    if "Usage:" not in result.stderr:
        assert result.stderr.count("\n") == 1, "one paragraph"


def test_a_run_folder_is_not_written_over(run, text):
    out, _ = run
    assert "already holds a run" in miras("train", "yaad", "--data", text, "--out", out, *SMALL, code=2).stderr


def test_another_configuration_does_not_resume(run):
    out, _ = run
    said = miras("train", "memora", "--resume", "--out", out, code=2).stderr
    assert "MODEL was yaad, is memora" in said


def test_stop_and_resume(text, tmp_path, monkeypatch):
    plain = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "training_step", stopped)
    said = miras("train", "yaad", "--data", text, "--out", out, *SMALL, code=1).stderr
    assert f"that of step 2. Go on with: miras train --resume --out {out}" in said
    monkeypatch.setattr(Trainer, "training_step", plain)
    assert "Goes on after step 2" in miras("train", "--resume", "--out", out).stderr


def test_a_full_disk_is_code_1(text, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    said = miras("train", "yaad", "--data", text, "--out", tmp_path / "run", *SMALL, code=1).stderr
    assert "No space left on device" in said and "miras train --resume" in said


def test_ctrl_c_elsewhere_is_code_1(run, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("miras.evaluate.load_model", stop)
    assert "Stopped." in miras("generate", run[0], "--prompt", "a", code=1).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept():
    lines = (
        "from miras.process import set_threads; set_threads(1)",
        "import psutil, torch; own = psutil.Process(); before = own.memory_info().rss",
        "x = torch.ones(1 << 26); del x; print(own.memory_info().rss - before)",
    )
    said = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert int(said.stdout) > 250e6
