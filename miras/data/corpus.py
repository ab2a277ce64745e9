"""Text to train on, as two streams of documents that can be read again and again.

Whatever the source, a document's side is a function of the document (its path or its text), never of the order in
which it is met. So the split is the same on every machine and in every run, and no text is on both sides.
"""

import gzip
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from miras.errors import UsageError

Split = Literal["train", "validation"]

BLOCK_BYTES = 64 * 1024
"""A long text file is read in documents of about this size, cut at line ends."""

VALIDATION_ONE_IN = 20
"""One document in this many is held out for validation."""

NAMES = {
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "c4": "allenai/c4:en",
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1",
}
"""Short names for corpora of arXiv 2504.13173 on the hub. A file or folder that is called so goes before."""

_JSONL = (".jsonl", ".jsonl.gz", ".json.gz")
_RECORDS = (*_JSONL, ".parquet")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SPLIT_WORD = re.compile(r"(?:^|[/._-])(train|validation|valid|val|dev|test)(?=[/._-]|$)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Corpus:
    """Named text in two parts.

    Attributes:
        name: What to call it in results; for a local path its last component.
        hash: 16 hex digits that change when the text does; None where the text is streamed from a hub.
        train: Starts a fresh pass over the training documents.
        validation: Starts a fresh pass over the held-out documents.
    """

    name: str
    hash: str | None
    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]

    def documents(self, split: Split) -> Iterator[str]:
        """A fresh pass over the non-empty documents of ``split``, always in the same order."""
        return self.train() if split == "train" else self.validation()


def load_corpus(spec: str, text_column: str = "text") -> Corpus:
    """Open a corpus. One document of each split is read, so that what is wrong with it shows now.

    Where every file is named for its split (``train-00000.parquet``, ``valid.txt``), the names decide, and what is
    named test is left out. Otherwise about one document in 20 is held out: a file of a text folder by the hash of its
    path (of few files, the one whose hash is lowest), a record by the hash of its text, and of a single text file
    every 20th block of lines.

    Args:
        spec: ``stdlib`` (the source of Python's standard library); or a file or folder of UTF-8 text, ``.jsonl``,
            ``.jsonl.gz``, ``.json.gz`` or ``.parquet``; or the id of a dataset on the Hugging Face hub,
            ``org/name`` or ``org/name:config``, or a short name for one from ``NAMES``, which is streamed. In a
            folder, records go before text files, and hidden files are not read.
        text_column: The field that holds the text of a record.

    Raises:
        UsageError: There is no such corpus, it cannot be reached, or it has no text to train on or to hold out.
    """
    path = Path(spec).expanduser()
    if spec == "stdlib":
        corpus = _stdlib()
    elif path.exists():
        corpus = _local(path, text_column)
    elif spec in NAMES:
        corpus = _hub(NAMES[spec], text_column)
    elif _HUB_ID.fullmatch(spec) and not spec.startswith(".") and not spec.endswith((".txt", ".md", ".py", *_RECORDS)):
        corpus = _hub(spec, text_column)
    else:
        raise UsageError(
            f"--data {spec}: there is no such file or folder. Give a file or folder of text, .jsonl or .parquet that "
            f"exists, 'stdlib', {', '.join(NAMES)}, or a hub id such as org/name."
        )
    _require_documents(corpus)
    return corpus


def _require_documents(corpus: Corpus) -> None:
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        if next(corpus.documents(split), None) is None:
            raise UsageError(
                f"{corpus.name} has no {split} data: its text is too little to be divided. Add more documents (or "
                "lines, for a single text file), or give a folder with one file named train and one named "
                "validation, such as train.txt and validation.txt."
            )


# Which side a document is on


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def _held_out(text: str) -> bool:
    return _hash(text) % VALIDATION_ONE_IN == 0


def _filtered(documents: Callable[[], Iterator[str]], held_out: bool) -> Iterator[str]:
    return (text for text in documents() if _held_out(text) == held_out)


def _every_nth(documents: Callable[[], Iterator[str]], held_out: bool) -> Iterator[str]:
    # The second of each 20, not the first or the last: two lines are then enough for two splits.
    return (text for i, text in enumerate(documents()) if (i % VALIDATION_ONE_IN == 1) == held_out)


def _by_file(root: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    names = {file: file.relative_to(root).as_posix() for file in files}
    # A folder of a few files seldom has one that the hash holds out; one of them must be.
    validation = [f for f in files if _held_out(names[f])] or [min(files, key=lambda f: _hash(names[f]))]
    return [f for f in files if f not in set(validation)], validation


def _by_name(root: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]] | None:
    """The files named for train and for validation, where every file is named for a split and some for train."""
    words = [_SPLIT_WORD.search(file.relative_to(root).as_posix().lower()) for file in files]
    named = [(file, word.group(1)) for file, word in zip(files, words, strict=True) if word]
    train = [file for file, word in named if word == "train"]
    if len(named) < len(files) or not train:
        return None
    return train, [file for file, word in named if word not in ("train", "test")]


# Files


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata holds the paths of the machine that built Python: two equal versions would differ in hash.
    files = [
        file
        for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix())
        if not _NOT_STDLIB.intersection(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
        and _undecodable(file) is None
    ]
    if not files:
        raise UsageError("This Python carries no source of its standard library. Give --data a file or folder of text.")
    train, validation = _by_file(root, files)
    return Corpus("stdlib", _digest(root, files), partial(_texts, train), partial(_texts, validation))


def _local(path: Path, column: str) -> Corpus:
    files = _files(path)
    root = path if path.is_dir() else path.parent
    records = [file for file in files if file.name.endswith(_RECORDS)]
    files = records or files
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"--data {path}: expected text, but there is none in it. Give a file or folder that has some.")
    if not records:
        _require_text(files)
    name = path.resolve().name + ("" if column == "text" or not records else f"[{column}]")
    train, validation = _splits(root, files, column if records else None)
    return Corpus(name, _digest(root, files), train, validation)


def _splits(root: Path, files: list[Path], column: str | None) -> tuple[Callable[[], Iterator[str]], ...]:
    """The train and validation streams of ``files``: records if there is a ``column``, else text."""
    named = _by_name(root, files)
    whole = partial(_records, column=column) if column else _long_texts
    if named and named[1]:
        return partial(whole, named[0]), partial(whole, named[1])
    files = named[0] if named else files
    if column:
        documents = partial(whole, files)
        return partial(_filtered, documents, False), partial(_filtered, documents, True)
    if len(files) == 1:
        documents = partial(_blocks, files[0], min(BLOCK_BYTES, files[0].stat().st_size // VALIDATION_ONE_IN))
        return partial(_every_nth, documents, False), partial(_every_nth, documents, True)
    train, validation = _by_file(root, files)
    return partial(_texts, train), partial(_texts, validation)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.relative_to(path).as_posix())
    skipped = re.compile(r"\.|__pycache__$")
    return [f for f in found if not any(skipped.match(part) for part in f.relative_to(path).parts)]


def _digest(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _require_text(files: Sequence[Path]) -> None:
    for file in files:
        problem = _undecodable(file)
        if problem:
            raise UsageError(
                f"{file} is not text: {problem}. --data takes UTF-8 text, .jsonl or .parquet: convert the file, or "
                "move it out of the folder."
            )


def _undecodable(path: Path) -> str | None:
    """Why ``path`` is not UTF-8 text, or None. Reads line by line: the file may be larger than memory."""
    with path.open("rb") as file:
        while lines := file.readlines(1 << 20):
            chunk = b"".join(lines)
            if b"\0" in chunk:
                return "it holds NUL bytes"
            try:
                chunk.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"byte 0x{chunk[error.start]:02x} at {file.tell() - len(chunk) + error.start} is not UTF-8"
    return None


# Documents


def _texts(files: Sequence[Path]) -> Iterator[str]:
    return filter(None, (file.read_bytes().decode("utf-8") for file in files))


def _long_texts(files: Sequence[Path]) -> Iterator[str]:
    return (block for file in files for block in _blocks(file, BLOCK_BYTES))


def _blocks(path: Path, size: int) -> Iterator[str]:
    with path.open("rb") as file:
        while lines := file.readlines(max(1, size)):
            yield b"".join(lines).decode("utf-8")


def _records(files: Sequence[Path], column: str) -> Iterator[str]:
    for file in files:
        read = _parquet if file.name.endswith(".parquet") else _jsonl
        yield from filter(None, read(file, column))


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}: expected one JSON object a line, got {error}.") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object, got {type(record).__name__}.")
        yield _text_of(record, column, where)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a whole gzip file: {error}. Fetch or compress it again.") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    _require_package("pyarrow", ".parquet files")
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.lib.ArrowInvalid as error:
        raise UsageError(f"{path} is not a parquet file: {error}. Give one that is whole.") from error
    with table:
        columns = table.schema_arrow.names
        for batch in table.iter_batches(batch_size=1024, columns=[column] if column in columns else columns):
            for record in batch.to_pylist():
                yield _text_of(record, column, str(path))


def _text_of(record: dict[str, Any], column: str, where: str) -> str:
    """The text of one record; '' for null. Lone surrogates, which JSON can spell and UTF-8 cannot, become '?'."""
    columns = ", ".join(map(repr, record))
    if column not in record:
        raise UsageError(
            f"{where}: there is no column '{column}'; there are {columns}. Give the one with the text as text_column."
        )
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: expected text in column '{column}', got {type(text).__name__}; the columns are {columns}. Give "
            "the one with the text as text_column."
        )
    return text.encode("utf-8", "replace").decode("utf-8")


def _require_package(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"Reading {what} needs the package {package}. Write: pip install 'miras[data]'")


# The hub


def _hub(spec: str, column: str) -> Corpus:
    _require_package("datasets", "a dataset of the hub")
    with _hub_errors(spec):
        splits = _hub_splits(spec)
    if "train" not in splits:
        raise UsageError(f"{spec}: expected a split named train, got {', '.join(splits)}. Give another dataset.")
    train = partial(_hub_documents, spec, splits["train"], column)
    name = spec if column == "text" else f"{spec}[{column}]"
    if "validation" in splits:
        return Corpus(name, None, train, partial(_hub_documents, spec, splits["validation"], column))
    return Corpus(name, None, partial(_filtered, train, False), partial(_filtered, train, True))


def _hub_splits(spec: str) -> dict[str, Any]:
    import datasets

    path, _, config = spec.partition(":")
    return datasets.load_dataset(path, name=config or None, streaming=True)  # pyright: ignore[reportReturnType]


def _hub_documents(spec: str, rows: Any, column: str) -> Iterator[str]:
    with _hub_errors(spec):
        for row in rows:
            text = _text_of(row, column, spec)
            if text:
                yield text


@contextmanager
def _hub_errors(spec: str) -> Iterator[None]:
    """Say what to do instead when the hub does not answer, does not know ``spec``, or has no such config."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        offline = " HF_HUB_OFFLINE is set: nothing is fetched." if constants.HF_HUB_OFFLINE else ""
        raise UsageError(
            f"--data {spec}: there is no such local path, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason}).{offline} Where the hub cannot be reached, point --data at a local "
            "folder of the same files (.parquet, .jsonl or .json.gz, in any layout), for example one written by "
            f"`hf download --repo-type dataset {spec.partition(':')[0]} --local-dir FOLDER` on a connected machine: "
            "`--data FOLDER`."
        ) from error
