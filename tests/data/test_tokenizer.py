import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miras.data import Corpus, load_tokenizer, tokenizer_hash
from miras.data import tokenizer as tokenizer_module
from miras.data.tokenizer import is_byte_tokenizer, plain_backend
from miras.errors import UsageError

BYTES = load_tokenizer("bytes")
WORDS = [f"def function_{i}(self): return self.value_{i % 5} + {i}\n" for i in range(300)]


def corpus_of(texts):
    return Corpus("words", "0" * 16, lambda: iter(texts), lambda: iter(["validation only: qqqqqq"] * 50))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_round_trip_any_text(text):
    ids = BYTES(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert BYTES.decode(ids) == text


def test_bytes_cover_every_byte_and_one_end():
    everything = "".join(map(chr, [*range(0x250), 0x20AC, 0xD7FF, 0xFFFD, 0x1F600, 0x10FFFF]))
    assert BYTES.decode(BYTES(everything)["input_ids"]) == everything
    assert len(BYTES) == 257
    assert BYTES.eos_token == BYTES.pad_token == BYTES.bos_token == "<eos>"
    assert BYTES.eos_token_id == 256
    assert BYTES("a<eos>")["input_ids"] == [97, 256]


def test_a_text_becomes_what_generate_takes():
    assert set(BYTES("a")) == {"input_ids", "attention_mask"}


def test_plain_backend_takes_text_for_text():
    assert plain_backend(BYTES).encode("a<eos>").ids == list(b"a<eos>")
    assert BYTES("a<eos>")["input_ids"] == [97, 256]  # the tokenizer itself is as before


def test_bytes_survive_saving(tmp_path):
    BYTES.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again("grüße")["input_ids"] == list("grüße".encode())
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (256, 256, 257)
    assert tokenizer_hash(again) == tokenizer_hash(BYTES)
    assert is_byte_tokenizer(again)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eos_token_id == 256


def test_bpe_is_the_same_for_the_same_documents():
    first, second = (load_tokenizer("bpe:400", corpus_of(WORDS)) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert tokenizer_hash(first) != tokenizer_hash(load_tokenizer("bpe:300", corpus_of(WORDS)))
    assert len(first) == 400
    assert not is_byte_tokenizer(first)


def test_bpe_learns_from_training_documents_only_and_compresses():
    tokenizer = load_tokenizer("bpe:400", corpus_of(WORDS))
    assert len(tokenizer(WORDS[0])["input_ids"]) < len(WORDS[0]) / 2
    assert len(tokenizer("qqqqqq")["input_ids"]) == 6
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


BPE = load_tokenizer("bpe", corpus_of(WORDS))


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_bpe_round_trips_text_it_never_saw(text):
    ids = BPE(text, split_special_tokens=True)["input_ids"]
    assert BPE.decode(ids) == text


def test_bpe_reads_no_more_than_it_needs(monkeypatch):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "some words to learn from "

    monkeypatch.setattr(tokenizer_module, "BPE_TRAINING_BYTES", 10_000)
    load_tokenizer("bpe:300", Corpus("endless", None, endless, endless))
    assert 400 <= len(read) <= 402


def refused(spec, corpus, *words):
    with pytest.raises(UsageError) as caught:
        load_tokenizer(spec, corpus)
    for word in (spec, *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("spec", ["bpe:12", "bpe:many", "bpe:-5"])
def test_a_size_that_cannot_be(spec):
    refused(spec, corpus_of(WORDS), "at least 257", "bpe:4096")


def test_bpe_needs_a_corpus():
    refused("bpe:300", None, "--data")


def test_a_folder_without_a_tokenizer(tmp_path):
    refused(str(tmp_path), None, "tokenizer.json")


def test_a_tokenizer_that_cannot_end_a_text(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    refused(str(tmp_path), None, "no end-of-text token", "eos_token")


def test_padding_falls_back_on_the_end_of_text(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<eos>"


def test_an_unreachable_hub_says_how_to_use_a_folder(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the package is imported, which is before this test
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("org/no-such-model", None, "HF_HUB_OFFLINE is set", "--tokenizer FOLDER", "hf download org/no-such-model")
