import gzip
import json
import pickle
import random
import re

import pytest

from miras.data import corpus as corpus_module
from miras.data import load_corpus
from miras.errors import MirasError, UsageError, near


def both(corpus):
    return list(corpus.documents("train")), list(corpus.documents("validation"))


def write_jsonl(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.writelines(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    return path


def write_parquet(path, texts, column="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


TEXTS = [f"document {i}: grüße {'x' * (i % 7)}\n" for i in range(200)]


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


# The standard library


def test_stdlib_is_the_source_of_python_split_by_file(stdlib):
    train, validation = both(stdlib)
    whole = sum(map(len, train)) + sum(map(len, validation))
    assert whole > 5e6
    assert 0.01 < len(validation) / (len(train) + len(validation)) < 0.1
    assert not set(train) & set(validation)
    assert any("class OrderedDict" in text for text in train + validation)
    assert not any("class HashRandomizationTests" in text for text in train + validation)  # from test/


def test_stdlib_is_the_same_again(stdlib):
    again = load_corpus("stdlib")
    assert re.fullmatch("[0-9a-f]{16}", stdlib.hash)
    assert (again.name, again.hash) == ("stdlib", stdlib.hash)
    assert list(again.documents("validation")) == list(stdlib.documents("validation"))


# A text file


def test_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    lines = [f"line {i} {'é' * (i % 50)}\n" for i in range(3000)]
    path = tmp_path / "notes.txt"
    path.write_text("".join(lines))
    corpus = load_corpus(str(path))
    train, validation = both(corpus)
    assert corpus.name == "notes.txt"
    assert all(text.endswith("\n") for text in train + validation)
    assert sorted("".join(train + validation).splitlines()) == sorted("".join(lines).splitlines())
    assert 0.02 < len("".join(validation)) / path.stat().st_size < 0.1


def test_a_large_text_file_has_blocks_of_64_kib(tmp_path):
    path = tmp_path / "large.md"
    path.write_text("0123456789abcde\n" * (2 << 16))
    train, validation = both(load_corpus(str(path)))
    assert (len(train), len(validation)) == (30, 2)
    assert all(abs(len(text) - 64 * 1024) < 1024 for text in train + validation)


def test_two_lines_are_enough(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("one\ntwo\n")
    assert both(load_corpus(str(path))) == (["one\n"], ["two\n"])


# Folders of text


def write_folder(root, count):
    for i in range(count):
        file = root / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {i}")


def test_folder_is_split_by_path_whatever_else_is_there(tmp_path):
    write_folder(tmp_path, 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\0\1")
    (tmp_path / "empty.txt").touch()
    train, validation = both(load_corpus(str(tmp_path)))
    assert sorted(train + validation) == sorted(f"text of {i}" for i in range(100))
    (tmp_path / "a-new-one.txt").write_text("new")
    more_train, more_validation = both(load_corpus(str(tmp_path)))
    assert set(train) <= set(more_train)
    assert set(validation) <= set(more_validation)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_folder_of_few_files_has_both_splits(tmp_path, count):
    write_folder(tmp_path, count)
    train, validation = both(load_corpus(str(tmp_path)))
    assert len(train) + len(validation) == count
    assert train
    assert validation


def test_hash_is_of_names_and_contents(tmp_path):
    for name in ("a", "b"):
        write_folder(tmp_path / name, 5)
    first = load_corpus(str(tmp_path / "a")).hash
    assert load_corpus(str(tmp_path / "b")).hash == first
    (tmp_path / "b" / "part0" / "0.txt").write_text("text of 9")
    changed = load_corpus(str(tmp_path / "b")).hash
    (tmp_path / "a" / "part0" / "0.txt").rename(tmp_path / "a" / "part0" / "zero.txt")
    renamed = load_corpus(str(tmp_path / "a")).hash
    assert len({first, changed, renamed}) == 3


def test_file_names_decide_the_split_where_all_have_one(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    assert both(load_corpus(str(tmp_path))) == (["train\n"], ["valid\n"])


# Records


@pytest.mark.parametrize(
    "write, name", [(write_jsonl, "a.jsonl"), (write_jsonl, "a.json.gz"), (write_parquet, "a.parquet")]
)
def test_records_are_read_whole_and_split_by_text(tmp_path, write, name):
    train, validation = both(load_corpus(str(write(tmp_path / "one" / name, TEXTS))))
    assert sorted(train + validation) == sorted(TEXTS)
    assert 1 <= len(validation) <= 30
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    other_train, other_validation = both(load_corpus(str(write(tmp_path / "two" / name, shuffled))))
    assert (sorted(other_train), sorted(other_validation)) == (sorted(train), sorted(validation))


def test_a_folder_laid_out_like_a_hub_dataset(tmp_path):
    (tmp_path / "README.md").write_text("# A dataset")
    for i in range(2):
        write_parquet(tmp_path / "sample" / "10BT" / f"00{i}_00000.parquet", TEXTS[i::2])
    train, validation = both(load_corpus(str(tmp_path)))
    assert sorted(train + validation) == sorted(TEXTS)


def test_a_folder_with_named_shards(tmp_path):
    write_jsonl(tmp_path / "en" / "c4-train.00000-of-00002.json.gz", TEXTS[:90])
    write_jsonl(tmp_path / "en" / "c4-train.00001-of-00002.json.gz", TEXTS[90:150])
    write_jsonl(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", TEXTS[150:])
    assert both(load_corpus(str(tmp_path))) == (TEXTS[:150], TEXTS[150:])


def test_test_shards_are_in_neither_split(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", TEXTS[:150])
    write_parquet(tmp_path / "test-0.parquet", TEXTS[150:])
    train, validation = both(load_corpus(str(tmp_path)))
    assert sorted(train + validation) == sorted(TEXTS[:150])


def test_null_and_empty_texts_are_passed_over_and_surrogates_replaced(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [None, "", "\ud800!", *TEXTS])
    train, validation = both(load_corpus(str(path)))
    assert sorted(train + validation) == sorted(["?!", *TEXTS])


def test_another_column_is_another_corpus(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, column="content")
    corpus = load_corpus(str(path), text_column="content")
    assert corpus.name == "a.jsonl[content]"
    train, validation = both(corpus)
    assert sorted(train + validation) == sorted(TEXTS)


def test_a_corpus_can_be_sent_to_another_process(tmp_path):
    corpus = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    assert both(pickle.loads(pickle.dumps(corpus))) == both(corpus)


# What cannot be used


def refused(spec, *words, **options):
    with pytest.raises(UsageError) as caught:
        load_corpus(str(spec), **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("spec", ["./nothing/here", "data/missing.txt", "a/b/c", "stdlb", "../up/there.parquet"])
def test_a_path_that_does_not_exist(spec):
    refused(spec, spec, "no such file or folder", "stdlib")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "folder"])
def test_nothing_in_it(tmp_path, name):
    path = tmp_path / name
    path.touch() if "." in name else path.mkdir()
    refused(path, name, "there is none in it")


@pytest.mark.parametrize("content, why", [(b"text\n\0\0", "NUL"), (b"good\nbad \xff\n", "byte 0xff at 9")])
def test_a_binary_file_is_named(tmp_path, content, why):
    write_folder(tmp_path, 3)
    (tmp_path / "image.png").write_bytes(content)
    refused(tmp_path, "image.png", why, "move it out")


@pytest.mark.parametrize("write, name", [(write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")])
def test_a_missing_column_names_those_there_are(tmp_path, write, name):
    path = write(tmp_path / name, TEXTS, column="content")
    refused(path, "no column 'text'", "'id', 'content'", "text_column")
    refused(path, "expected text in column 'id', got int", text_column="id")


def test_broken_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    refused(path, "a.jsonl, line 2")
    path.write_text('"text"\n')
    refused(path, "line 1", "got str")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    refused(tmp_path / "b.parquet", "b.parquet is not a parquet file")
    whole = write_jsonl(tmp_path / "c.jsonl.gz", ["fine"] * 50)
    whole.write_bytes(whole.read_bytes()[:-12])
    refused(whole, "not a whole gzip file")


def test_no_validation_data(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a single line")
    refused(path, "no validation data", "validation.txt")
    refused(write_jsonl(tmp_path / "b.jsonl", ["one record"]), "no validation data")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setattr(corpus_module.importlib.util, "find_spec", lambda name: None)
    refused(path, "pyarrow", "pip install 'miras[data]'")
    refused("org/name", "datasets", "pip install 'miras[data]'")


# The hub


def test_an_unreachable_hub_says_how_to_use_a_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the packages are imported, which may be before this test
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("org/no-such-dataset:config", "HF_HUB_OFFLINE is set", "--data FOLDER", "dataset org/no-such-dataset ")


@pytest.mark.parametrize("splits", [["train"], ["train", "validation"]])
def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch, splits):
    datasets = pytest.importorskip("datasets")
    for split in splits:
        write_jsonl(tmp_path / f"{split}.jsonl", [f"{split} {text}" for text in TEXTS])
    load = datasets.load_dataset

    def from_folder(path, name, streaming):
        assert (path, name, streaming) == ("org/name", "config", True)
        return load(str(tmp_path), streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    corpus = load_corpus("org/name:config")
    train, validation = both(corpus)
    assert (corpus.name, corpus.hash) == ("org/name:config", None)
    assert sorted(train + validation) == sorted(f"{split} {text}" for split in splits for text in TEXTS)
    assert not set(train) & set(validation)
    assert both(corpus) == (train, validation)
    if len(splits) == 2:
        assert all(text.startswith("validation") for text in validation)
    refused("org/name:config", "no column 'body'", "'id', 'text'", text_column="body")


def test_short_names_of_the_papers_corpora(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(corpus_module, "_hub", lambda spec, column: asked.append(spec) or load_corpus(str(tmp_path)))
    (tmp_path / "text.txt").write_text("a\nb\n" * 50)
    monkeypatch.chdir(tmp_path)
    load_corpus("wikitext")
    assert asked == ["Salesforce/wikitext:wikitext-103-raw-v1"]
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "text.txt").write_text("a\nb\n" * 50)
    assert load_corpus("c4").name == "c4" and len(asked) == 1, "a folder goes before the name"


# Errors


def test_exit_codes_and_near():
    assert (MirasError.exit_code, UsageError.exit_code) == (1, 2)
    assert issubclass(UsageError, ValueError)
    assert near("yad", ["moneta", "yaad", "memora"]) == " Did you mean 'yaad'?"
    assert near("zzz", iter(["a", "b", "c"])) == " Choose one of a, b, c."
