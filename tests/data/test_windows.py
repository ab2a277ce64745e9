import itertools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from miras.data import Corpus, TokenWindows, load_corpus, load_tokenizer, pack
from miras.data import windows as windows_module
from miras.data.tokenizer import plain_backend
from miras.errors import UsageError

BYTES = load_tokenizer("bytes")
TRAIN = [f"text {i}: grüße <eos> {'né' * (i % 13)}\n" for i in range(100)]
VALIDATION = [f"other {i}\n" for i in range(20)]


class Counted:
    """A stream that counts its passes."""

    def __init__(self, texts):
        self.texts, self.passes = texts, 0

    def __call__(self):
        self.passes += 1
        return iter(self.texts)


@pytest.fixture
def corpus():
    return Corpus("org/words", "0" * 16, Counted(TRAIN), Counted(VALIDATION))


def expected_ids(tokenizer, texts):
    plain = plain_backend(tokenizer)
    return [i for text in texts for i in [*plain.encode(text).ids, tokenizer.eos_token_id]]


def read(windows):
    return [i for window in windows for i in window["input_ids"].tolist()]


@pytest.fixture(params=["bytes", "bpe:300"])
def tokenizer(request, corpus):
    return load_tokenizer(request.param, corpus)


def test_windows_are_the_encoded_documents_in_order(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "BATCH_BYTES", 500)  # several batches, the last not full
    for windows, texts in zip(pack(corpus, tokenizer, 16, tmp_path), (TRAIN, VALIDATION), strict=True):
        ids = expected_ids(tokenizer, texts)
        assert windows.tokens == len(ids)
        assert len(windows) == len(ids) // 16
        assert read(windows) == ids[: len(windows) * 16]
        assert windows.bytes == sum(len(text.encode()) for text in texts)
        assert windows.bytes_per_token == windows.bytes / windows.tokens


def test_a_window_is_what_a_model_takes(corpus, tmp_path):
    train, _ = pack(corpus, BYTES, 32, tmp_path)
    window = train[3]
    assert window["input_ids"].shape == (32,)
    assert window["input_ids"].dtype == torch.long
    assert torch.equal(window["labels"], window["input_ids"])
    assert torch.equal(train[-1]["input_ids"], train[len(train) - 1]["input_ids"])
    with pytest.raises(IndexError):
        train[len(train)]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_short_cut_for_bytes_is_the_encoding(text):
    assert windows_module._encode_bytes([text])[0].tolist() == plain_backend(BYTES).encode(text).ids


def test_the_file_is_small_and_its_header_complete(corpus, tmp_path):
    train, _ = pack(corpus, BYTES, 8, tmp_path)
    header = json.loads(train.path.with_suffix(".json").read_text())
    assert train.path.stat().st_size == 2 * train.tokens
    assert header["corpus"] == "org/words"
    assert header["corpus_hash"] == "0" * 16
    assert (header["dtype"], header["documents"]) == ("uint16", 100)
    assert (header["tokens"], header["bytes"]) == (train.tokens, train.bytes)
    assert len(header["tokenizer_hash"]) == 16
    assert len(list(tmp_path.iterdir())) == 4


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens([f"token{i}" for i in range(65536)])
    train, _ = pack(corpus, tokenizer, 8, tmp_path)
    assert train.path.stat().st_size == 4 * train.tokens
    assert read(train) == expected_ids(BYTES, TRAIN)[: len(train) * 8]


def test_a_second_call_reads_what_the_first_wrote(corpus, tmp_path):
    first, _ = pack(corpus, BYTES, 16, tmp_path)
    written = first.path.stat().st_mtime_ns
    second, _ = pack(corpus, BYTES, 32, tmp_path)  # windows of another length are of the same file
    assert (corpus.train.passes, corpus.validation.passes) == (1, 1)
    assert second.path == first.path
    assert second.path.stat().st_mtime_ns == written
    assert read(second) == read(first)[: len(second) * 32]


def test_another_text_tokenizer_or_limit_is_packed_anew(corpus, tmp_path):
    def path(corpus, tokenizer, limit=None):
        return pack(corpus, tokenizer, 8, tmp_path, max_tokens=limit)[0].path

    changed = Corpus(corpus.name, "1" * 16, corpus.train, corpus.validation)
    paths = {
        path(corpus, BYTES),
        path(changed, BYTES),
        path(corpus, load_tokenizer("bpe:300", corpus)),
        path(corpus, BYTES, 100),
    }
    assert len(paths) == 4


def test_a_damaged_file_is_packed_again(corpus, tmp_path):
    first, _ = pack(corpus, BYTES, 16, tmp_path)
    ids = read(first)
    first.path.write_bytes(b"short")
    assert read(pack(corpus, BYTES, 16, tmp_path)[0]) == ids


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(corpus, tmp_path, interruption, monkeypatch):
    monkeypatch.setattr(windows_module, "BATCH_BYTES", 100)

    def stops():
        yield from TRAIN[:50]
        raise interruption

    with pytest.raises(interruption):
        pack(Corpus(corpus.name, corpus.hash, stops, corpus.validation), BYTES, 16, tmp_path)
    assert list(tmp_path.iterdir()) == []
    train, _ = pack(corpus, BYTES, 16, tmp_path)
    assert read(train) == expected_ids(BYTES, TRAIN)[: len(train) * 16]


def test_max_tokens_ends_with_a_document(corpus, tmp_path):
    train, validation = pack(corpus, BYTES, 8, tmp_path, max_tokens=500)
    whole = [len(text.encode()) + 1 for text in TRAIN]
    documents = next(n for n in range(100) if sum(whole[:n]) >= 500)
    assert train.tokens == sum(whole[:documents])
    assert train.bytes == train.tokens - documents
    assert 25 <= validation.tokens < 25 + max(map(len, VALIDATION)) + 1


def test_max_tokens_bounds_a_stream_without_end(tmp_path):
    def endless():
        while True:
            yield "word " * 100

    train, validation = pack(Corpus("endless", None, endless, endless), BYTES, 64, tmp_path, max_tokens=10_000)
    assert 10_000 <= train.tokens < 10_600
    assert 500 <= validation.tokens < 1_100


def test_windows_go_through_workers_and_pickles(corpus, tmp_path):
    train, _ = pack(corpus, BYTES, 16, tmp_path)
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    assert read(pickle.loads(sent)) == read(train)
    loader = DataLoader(train, batch_size=4, num_workers=1)
    batches = torch.cat([batch["input_ids"] for batch in loader])
    assert batches.flatten().tolist() == read(train)


def test_too_few_tokens_for_a_window(corpus, tmp_path):
    tokens = len(expected_ids(BYTES, VALIDATION))
    with pytest.raises(UsageError) as caught:
        pack(corpus, BYTES, 1024, tmp_path)
    message = str(caught.value)
    for word in ("validation split of org/words", f"{tokens} tokens", "one window of 1024", "--data", "--context"):
        assert word in message
    assert len(pack(corpus, BYTES, tokens, tmp_path)[1]) == 1
    with pytest.raises(UsageError, match="at least 2"):
        pack(corpus, BYTES, 1, tmp_path)


@pytest.fixture
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_one_line_is_said_for_each_file_written(corpus, tmp_path, capfd, no_terminal):
    pack(corpus, BYTES, 16, tmp_path)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        "Packed org/words (train)",
        "Packed org/words (validation)",
    ]
    pack(corpus, BYTES, 16, tmp_path)
    assert capfd.readouterr().err == ""


def test_long_work_says_how_far_it_is(corpus, tmp_path, capfd, no_terminal, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 6).__next__)
    monkeypatch.setattr(windows_module, "time", clock)
    pack(corpus, BYTES, 16, tmp_path)
    assert "Packing org/words (train): 0 MB" in capfd.readouterr().err.splitlines()


def test_a_terminal_sees_it_move(corpus, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    pack(corpus, BYTES, 16, tmp_path)
    said = capfd.readouterr().err
    assert "Packing org/words (train)" in said
    assert said.splitlines()[-1].endswith("s")


def test_a_folder_from_text_to_windows(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * 20)
    corpus = load_corpus(str(tmp_path))
    train, validation = pack(corpus, BYTES, 32, tmp_path / "deep" / "cache")
    assert isinstance(train, TokenWindows)
    assert read(train) == expected_ids(BYTES, corpus.documents("train"))[: len(train) * 32]
    assert np.isclose(train.bytes_per_token, 1, atol=0.02)
    assert len(validation) >= 1
