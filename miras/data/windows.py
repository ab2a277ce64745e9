"""Text tokenised once, kept in one file per split, and read in windows of equal length."""

import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from miras.data.corpus import VALIDATION_ONE_IN, Corpus, Split
from miras.data.tokenizer import is_byte_tokenizer, plain_backend, tokenizer_hash
from miras.errors import UsageError

BATCH_BYTES = 4_000_000
"""Documents are encoded together up to this much text: enough to keep the encoder's threads busy."""

Encode = Callable[[list[str]], list[Any]]


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of ``context`` tokens over a packed file; the tokens left at the end are not read.

    ``windows[i]`` is ``{"input_ids": LongTensor[context], "labels": the same}``: the model shifts the labels. A pickle
    holds the path, not the tokens.

    Attributes:
        tokens: The number of tokens in the file, one ``<eos>`` after each document included.
        bytes: The length in UTF-8 of the documents they were made from.
    """

    def __init__(self, path: Path, context: int):
        """Read the header beside ``path`` (a ``.bin`` file) and map the tokens into memory.

        Raises:
            UsageError: ``context`` is less than 2, or there are fewer tokens than one window.
        """
        header = json.loads(path.with_suffix(".json").read_text())
        self.path, self.context = path, context
        self.tokens: int = header["tokens"]
        self.bytes: int = header["bytes"]
        if context < 2:
            raise UsageError(f"--context {context}: expected at least 2, a token and the one that follows it.")
        if self.tokens < context:
            raise UsageError(
                f"The {header['split']} split of {header['corpus']} has {self.tokens} tokens, expected at least one "
                f"window of {context}. Give more text with --data, or write --context {self.tokens} or less."
            )
        self._tokens = np.memmap(path, dtype=header["dtype"], mode="r", shape=(self.tokens,))

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are ``mean_nll_per_token / ln 2 / bytes_per_token``, whatever the tokenizer."""
        return self.bytes / self.tokens

    def __len__(self) -> int:
        return self.tokens // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = range(len(self))[index] * self.context
        window = torch.from_numpy(self._tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def __reduce__(self):
        return TokenWindows, (self.path, self.context)


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    cache: Path,
    max_tokens: int | None = None,
) -> tuple[TokenWindows, TokenWindows]:
    """Tokenise ``corpus`` into the folder ``cache``, or find there what an earlier call wrote.

    A file appears under its name when it is whole, so a run that stops midway leaves nothing to be mistaken for it,
    and two runs may pack the same corpus at once.

    Args:
        corpus: The documents. One without a hash is known by its name and ``max_tokens`` alone.
        tokenizer: Encodes each document as nothing but text; its ``<eos>`` is put after each.
        context: The length of a window.
        cache: A folder, made if there is none. One folder may serve many corpora and tokenizers.
        max_tokens: End the training split with the first document that reaches this many tokens, and the validation
            split at a twentieth of that, or one window. None reads everything.

    Returns:
        The train and the validation windows.

    Raises:
        UsageError: A split has fewer tokens than one window.
    """
    held_out = None if max_tokens is None else max(max_tokens // VALIDATION_ONE_IN, context)
    cache.mkdir(parents=True, exist_ok=True)
    train = _packed(corpus, "train", tokenizer, cache, max_tokens)
    validation = _packed(corpus, "validation", tokenizer, cache, held_out)
    return TokenWindows(train, context), TokenWindows(validation, context)


def _packed(
    corpus: Corpus, split: Split, tokenizer: PreTrainedTokenizerFast, cache: Path, max_tokens: int | None
) -> Path:
    """The path of the packed split, which is written unless it is there."""
    identity = {
        "format": 1,
        "corpus": corpus.name,
        "corpus_hash": corpus.hash,
        "split": split,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "dtype": "uint16" if max(tokenizer.get_vocab().values()) < 65536 else "uint32",
        "max_tokens": max_tokens,
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    path = cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', corpus.name)}-{split}-{key}.bin"
    if not _is_whole(path, identity):
        _write(path, identity, corpus, split, tokenizer, max_tokens)
    return path


def _is_whole(path: Path, identity: dict[str, Any]) -> bool:
    header = path.with_suffix(".json")
    if not (path.exists() and header.exists()):
        return False
    found = json.loads(header.read_text())
    size = found["tokens"] * np.dtype(found["dtype"]).itemsize
    return {key: found.get(key) for key in identity} == identity and path.stat().st_size == size


def _write(
    path: Path,
    identity: dict[str, Any],
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None,
) -> None:
    start = time.perf_counter()
    encode = _encode_bytes if is_byte_tokenizer(tokenizer) else partial(_encode_batch, plain_backend(tokenizer))
    eos = tokenizer.get_vocab()[str(tokenizer.eos_token)]
    counts = {"tokens": 0, "bytes": 0, "documents": 0}
    with _progress(f"Packing {corpus.name} ({split})") as report, _whole_or_nothing(path) as file:
        for size, ids in _encoded(corpus.documents(split), encode, eos):
            file.write(ids.astype(identity["dtype"]).tobytes())
            counts["tokens"] += len(ids)
            counts["bytes"] += size
            counts["documents"] += 1
            report(counts["bytes"])
            if max_tokens is not None and counts["tokens"] >= max_tokens:
                break
    # The header goes last: the tokens are whole where it is.
    with _whole_or_nothing(path.with_suffix(".json")) as file:
        file.write(json.dumps({**identity, **counts}, indent=2).encode())
    seconds = time.perf_counter() - start
    print(
        f"Packed {corpus.name} ({split}): {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
        f"{counts['tokens']:,} tokens in {seconds:.1f} s",
        file=sys.stderr,
    )


def _encoded(documents: Iterator[str], encode: Encode, eos: int) -> Iterator[tuple[int, np.ndarray]]:
    """The length in UTF-8 and the ids of each document, ``eos`` last."""
    for texts, sizes in _batches(documents):
        for size, ids in zip(sizes, encode(texts), strict=True):
            yield size, np.append(np.asarray(ids, dtype=np.uint32), np.uint32(eos))


def _batches(documents: Iterator[str]) -> Iterator[tuple[list[str], list[int]]]:
    texts: list[str] = []
    sizes: list[int] = []
    total = 0
    for text in documents:
        texts.append(text)
        sizes.append(len(text.encode("utf-8")))
        total += sizes[-1]
        if total >= BATCH_BYTES:
            yield texts, sizes
            texts, sizes, total = [], [], 0
    if texts:
        yield texts, sizes


def _encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


def _encode_batch(backend: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets the name ``path`` when the block ends well, and vanishes when it does not."""
    # Not tempfile's: those are readable by their owner only, and a cache is often shared.
    partial_path = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial_path.open("xb") as file:
            yield file
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int], None]]:
    """A function that is told the bytes done: a moving line on a terminal, elsewhere a line every 10 seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(label) as status:
            yield lambda done: status.update(f"{label}: {done / 1e6:.0f} MB")
        return
    said = time.perf_counter()

    def report(done: int) -> None:
        nonlocal said
        if time.perf_counter() - said >= 10:
            said = time.perf_counter()
            print(f"{label}: {done / 1e6:.0f} MB", file=sys.stderr, flush=True)

    yield report
