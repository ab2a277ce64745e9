"""The trained models that come with the repository work with what the command line offers."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import miras.hf  # noqa: F401 (registers the model)
from miras.cli import main

ROOT = Path(__file__).parents[1]
NAMES = ("moneta", "yaad", "memora")


@pytest.mark.parametrize("name", NAMES)
def test_it_has_learned_what_python_looks_like(name):
    folder = ROOT / "checkpoints" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((ROOT / "miras" / "layer.py").read_text()[:2000], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert loss / math.log(2) < 3, "bits per byte; a model that knows nothing has 8"


@pytest.mark.parametrize("name", NAMES)
def test_its_card_says_how_it_was_trained(name):
    folder = ROOT / "checkpoints" / name
    said = ModelCard.load(folder / "README.md").text
    assert f"miras train {name} " in said and "bits per byte" in said
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


def test_the_commands_of_the_first_minute(tmp_path):
    folder, text = str(ROOT / "checkpoints" / "yaad"), ROOT / "miras" / "gates.py"
    said = CliRunner().invoke(main, ["generate", folder, "--prompt", "def ", "--tokens", "20"])
    assert said.exit_code == 0 and said.output.startswith("def ")
    asked = [
        f"--data={text}",
        "--set=part=all",
        "--set=contexts=128",
        "--set=limit=1024",
        f"--out={tmp_path}",
        "--json",
    ]
    said = CliRunner().invoke(main, ["eval", "perplexity", folder, *asked])
    (found,) = json.loads(said.stdout)["models"].values()
    assert found["rows"][0]["bits_per_byte"]["mean"] < 3
    short = tmp_path / "text.py"
    short.write_text(text.read_text()[:200])
    page = tmp_path / "page.html"
    said = CliRunner().invoke(main, ["inspect", folder, "--text", str(short), "--out", str(page)])
    assert said.exit_code == 0 and page.is_file()
