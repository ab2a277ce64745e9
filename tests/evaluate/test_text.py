import pytest
import torch

from miras.data import load_tokenizer
from miras.errors import UsageError
from miras.evaluate import Utf8Streamer, generate
from miras.hf import MirasConfig, MirasForCausalLM


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MirasConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=256)
    return MirasForCausalLM(config).eval()


def stream(tokenizer, raw: bytes) -> list[str]:
    pieces: list[str] = []
    streamer = Utf8Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in raw:
        streamer.put(torch.tensor([byte]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("text", ["plain", " spaces  and\nlines\n", "à la carte", "naïve 漢字 and 🙂🙃 end", ""])
def test_characters_come_whole(tokenizer, text):
    pieces = stream(tokenizer, text.encode())
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces), "each as soon as it is there"


@pytest.mark.parametrize("raw", [b"\xff\xfeab", b"a\xc3(", b"half \xf0\x9f\x99", b"\x80", "é".encode() + b"\xe6\xbc"])
def test_bytes_that_are_no_character_are_replaced(tokenizer, raw):
    assert "".join(stream(tokenizer, raw)) == raw.decode(errors="replace")


def test_the_prompt_and_the_end_are_not_shown(tokenizer):
    pieces: list[str] = []
    streamer = Utf8Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[65, 66]]))
    for token in (67, 256):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "C"


def written(model, tokenizer, *args, **kwargs) -> str:
    pieces: list[str] = []
    generate(model, tokenizer, *args, pieces.append, **kwargs)
    return "".join(pieces)


def test_greedy_is_what_generate_gives(model, tokenizer):
    ids = torch.tensor([list(b"hello")])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert written(model, tokenizer, "hello", 12, temperature=0.0) == tokenizer.decode(
        expected[0, 5:], skip_special_tokens=True
    )


def test_the_seed_decides(model, tokenizer):
    first, again, other = (written(model, tokenizer, "hello", 20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_one_likeliest_token_is_greedy(model, tokenizer):
    assert written(model, tokenizer, "a", 10, top_k=1) == written(model, tokenizer, "a", 10, temperature=0.0)


def test_an_empty_prompt_begins_a_text(model, tokenizer):
    assert written(model, tokenizer, "", 5)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"temperature": -1.0}, {"top_k": -1}])
def test_numbers_out_of_range_are_refused(model, tokenizer, bad):
    with pytest.raises(UsageError, match="expected at least"):
        generate(model, tokenizer, "a", **{"tokens": 5, "write": print, **bad})
