"""`miras demo`: train Moneta, Yaad and Memora beside a Transformer and Gated DeltaNet, and write a page that compares
them.

Equal data, steps and tokens; parameters are made equal by the width of the SwiGLU. Every model is trained by `miras
train` in a process of its own, so that its memory is its own, and resumes where it stopped.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from miras.data import TokenWindows, load_corpus, load_tokenizer, pack
from miras.errors import MirasError
from miras.evaluate import generate, load_model
from miras.hf import MirasCache
from miras.layer import LayerState
from miras.report import write_report
from miras.train.config import TrainConfig
from miras.train.files import read_metrics, write_json
from miras.train.many import Job, train_many
from miras.train.parameters import equal_hidden
from miras.train.provenance import commit, cpu, versions
from miras.train.summary import Summary

MODELS = ("moneta", "yaad", "memora", "gated_deltanet", "transformer")
PROMPT = "def read(self, path):\n"
# Length of the pieces that a long context is read in, so that memory stays bounded.
PIECE = 1024
ROUNDS = 20


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        steps: optimizer steps of each model.
        contexts: contexts at which decoding is timed.
        sample_tokens: length of each generated sample.
        eval_windows: windows of the final validation.
    """

    steps: int
    contexts: tuple[int, ...]
    sample_tokens: int
    eval_windows: int


FULL = Plan(steps=250, contexts=(256, 1024, 4096, 16384), sample_tokens=240, eval_windows=256)
QUICK = Plan(steps=8, contexts=(256, 1024), sample_tokens=40, eval_windows=16)


def demo(out: Path, quick: bool, seed: int = 0) -> None:
    """Train, compare, report.

    Args:
        out: folder of the runs, `results.json` and `report.html`. Models already trained there are not trained again.
        quick: a minute instead of ten; the numbers then mean nothing.
        seed: seed of initialisation and of the order of the data.

    Raises:
        MirasError: a training run failed; its own message stands above.
    """
    plan = QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    text = validation_text(out / "data")
    widths = equal_hidden({name: TrainConfig(model=name) for name in MODELS})
    jobs = [job(name, hidden, plan, out / name, out / "data", seed) for name, hidden in widths.items()]
    print(f"Training {', '.join(MODELS)} ...", file=sys.stderr, flush=True)
    train_many(jobs, at_once=min(os.cpu_count() or 1, len(jobs)))
    results = _results(plan, out, quick, seed)
    for row in results["models"]:
        print(f"Decoding with {row['name']} ...", file=sys.stderr, flush=True)
        row |= _decode(out / row["name"] / "model", text, plan)
    write_json(out / "results.json", results)
    write_report(results, out / "report.html")
    print(f"The report is {out / 'report.html'}, the numbers are in {out / 'results.json'}.")


def job(name: str, hidden: int, plan: Plan, out: Path, cache: Path, seed: int, label: str = "") -> Job:
    """The training run of one model of the demo.

    Raises:
        MirasError: the folder holds another run.
    """
    wanted = {"steps": plan.steps, "hidden": hidden, "seed": seed, "eval_windows": plan.eval_windows}
    if (out / "config.yaml").exists():
        config = yaml.safe_load((out / "config.yaml").read_text())
        if {k: config.get(k) for k in wanted} != wanted:
            raise MirasError(f"{out} holds another run than this one ({wanted}). Remove it or write another --out.")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in wanted.items()]
    flags += ["--size=tiny", "--data=stdlib", "--tokenizer=bytes", f"--cache={cache}"]
    return Job(label or name, out, plan.steps, ("train", name, *flags))


def validation_text(cache: Path) -> TokenWindows:
    """Held-out text of the demo; tokenises it into `cache`, where the runs side by side then find it."""
    corpus = load_corpus("stdlib")
    return pack(corpus, load_tokenizer("bytes", corpus), PIECE, cache)[1]


def _results(plan: Plan, out: Path, quick: bool, seed: int) -> dict[str, Any]:
    """Everything but decoding, from what the training runs wrote."""
    summaries = {name: asdict(Summary.read(out / name / "summary.json")) for name in MODELS}
    config = yaml.safe_load((out / MODELS[0] / "config.yaml").read_text())
    first = summaries[MODELS[0]]
    setup = {
        "steps": plan.steps,
        "tokens_per_step": config["batch"],
        "context": config["context"],
        "learning_rate": config["learning_rate"],
        "seed": seed,
        "threads": first["threads"],
        "cpu": cpu(),
        "versions": versions(),
        "commit": commit(),
    }
    return {
        "title": "Moneta, Yaad and Memora beside a Transformer and Gated DeltaNet",
        "command": "miras demo" + (" --quick" if quick else "") + (f" --seed {seed}" if seed else ""),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "data": first["data"] | {"validation_tokens": _scored(plan, first["data"], config["context"])},
        "setup": setup,
        "models": [_row(name, summary, out / name / "metrics.jsonl") for name, summary in summaries.items()],
    }


def _scored(plan: Plan, data: dict[str, Any], context: int) -> int:
    """Held-out tokens that the last validation looked at."""
    return min(plan.eval_windows * context, data["validation_tokens"] // context * context)


def _row(name: str, summary: dict[str, Any], metrics: Path) -> dict[str, Any]:
    lines = read_metrics(metrics)
    train = [x for x in lines if "bits_per_byte" in x]
    validation = [x for x in lines if "val_bits_per_byte" in x]
    copied = (
        "mixer",
        "parameters",
        "steps",
        "val_bits_per_byte",
        "tokens_per_second",
        "train_seconds",
        "peak_memory_bytes",
    )
    return (
        {"name": name}
        | {key: summary[key] for key in copied}
        | {
            "curve": {"step": [x["step"] for x in train], "bits_per_byte": [x["bits_per_byte"] for x in train]},
            "validation": {
                "step": [x["step"] for x in validation],
                "bits_per_byte": [x["val_bits_per_byte"] for x in validation],
            },
        }
    )


@torch.no_grad()
def _decode(folder: Path, text: TokenWindows, plan: Plan) -> dict[str, Any]:
    """Milliseconds for one token and bytes of state after each context, and a sample."""
    model, tokenizer = load_model(str(folder))
    tokens = torch.cat([text[i]["input_ids"] for i in range(-(-max(plan.contexts) // PIECE))])
    states: dict[int, list[LayerState]] = {}
    cache, seen = MirasCache(model.config.num_hidden_layers), 0
    for context in plan.contexts:
        while seen < context:
            piece = tokens[None, seen : min(seen + PIECE, context)]
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seen += piece.shape[1]
        states[context] = cache.states()
    times: dict[int, list[float]] = {context: [] for context in plan.contexts}
    # Contexts take turns, so that whatever else the machine does falls on all of them alike.
    for _ in range(ROUNDS):
        for context, before in states.items():
            here = MirasCache(model.config.num_hidden_layers)
            here.put(before, context)
            start = time.perf_counter()
            model(tokens[None, :1], past_key_values=here, use_cache=True)
            times[context].append(1000 * (time.perf_counter() - start))
    pieces: list[str] = []
    generate(model, tokenizer, PROMPT, plan.sample_tokens, pieces.append, temperature=0.7)
    return {
        "decode_ms_per_token": {str(c): statistics.median(t) for c, t in times.items()},
        "state_bytes": {str(c): sum(s.nbytes for s in after) for c, after in states.items()},
        "sample": {"prompt": PROMPT, "text": "".join(pieces)},
    }
