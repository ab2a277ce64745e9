"""Tokenizers: bytes, a byte-level BPE of the corpus' own, or one that exists.

Each is a `PreTrainedTokenizerFast` with an ``<eos>``, so it is saved beside a model and loaded again with no code
of this library.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from miras.data.corpus import Corpus
from miras.errors import UsageError

EOS = "<eos>"

BPE_TRAINING_BYTES = 100_000_000
"""A BPE vocabulary is learned from this much text at most: more costs time and memory and hardly changes it."""


def load_tokenizer(spec: str, corpus: Corpus | None = None) -> PreTrainedTokenizerFast:
    """Make or load a tokenizer.

    Args:
        spec: ``bytes`` (256 bytes and ``<eos>``; the id of a byte is its value); ``bpe:SIZE`` or ``bpe``
            (``bpe:4096``), a byte-level BPE trained on the training documents of ``corpus``, the same for the same
            documents; or a local folder, or an id on the Hugging Face hub.
        corpus: What to train a BPE on; the others do not read it.

    Returns:
        A tokenizer that has an end-of-text token, which also pads where it had no padding token.

    Raises:
        UsageError: There is no such tokenizer, it cannot be reached, or it cannot end a text.
    """
    if spec == "bytes":
        return _wrap(_byte_backend())
    if spec == "bpe" or spec.startswith("bpe:"):
        return _wrap(_train_bpe(_vocabulary_size(spec), corpus))
    return _pretrained(spec)


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend which encodes text as nothing but text.

    It neither pads nor truncates, and a document that happens to contain ``<eos>`` does not end there.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits that are equal where two tokenizers pack text equally."""
    content = f"{tokenizer.eos_token_id}\0{plain_backend(tokenizer).to_str()}"
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of a text are its UTF-8 bytes, as with ``load_tokenizer("bytes")``."""
    return tokenizer_hash(tokenizer) == tokenizer_hash(_wrap(_byte_backend()))


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # the default adds token_type_ids, which generate refuses
    )


def _byte_backend() -> Tokenizer:
    # ByteLevel spells a printable Latin-1 byte as itself and moves the other 68, in order, to U+0100 and up.
    # Numbering the spellings by byte makes the id of a byte its value.
    moved = iter(range(256, 512))
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    vocabulary = {chr(byte if byte in own else next(moved)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return backend


def _vocabulary_size(spec: str) -> int:
    size = spec.partition(":")[2] or "4096"
    if not re.fullmatch(r"\d+", size) or int(size) < 257:
        raise UsageError(
            f"--tokenizer {spec}: expected bpe:SIZE with a whole number of at least 257 (256 bytes and {EOS}), got "
            f"{size}. Write for example bpe:4096."
        )
    return int(size)


def _train_bpe(size: int, corpus: Corpus | None) -> Tokenizer:
    if corpus is None:
        raise UsageError(f"--tokenizer bpe:{size} is trained on a corpus, and none was given. Give one with --data.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first_bytes(corpus), trainer)
    return backend


def _first_bytes(corpus: Corpus) -> Iterator[str]:
    left = BPE_TRAINING_BYTES
    for text in corpus.documents("train"):
        if left <= 0:
            return
        left -= len(text.encode("utf-8"))
        yield text


def _pretrained(spec: str) -> PreTrainedTokenizerFast:
    path = Path(spec).expanduser()
    # A tokenizer.json alone does not say which token ends a text; the files beside it do.
    source = str(path.parent if path.is_file() else path) if path.exists() else spec
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UsageError(_not_loaded(spec, path.exists(), reason)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(
            f"--tokenizer {spec}: expected a fast tokenizer (one with a tokenizer.json), got "
            f"{type(tokenizer).__name__}. Give another, or write --tokenizer bpe:4096."
        )
    if tokenizer.eos_token is None:
        raise UsageError(
            f"--tokenizer {spec} has no end-of-text token, which separates documents. Set eos_token in its "
            "tokenizer_config.json, or write --tokenizer bpe:4096."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_loaded(spec: str, exists: bool, reason: str) -> str:
    if exists:
        return (
            f"--tokenizer {spec}: expected a folder with a tokenizer.json and a tokenizer_config.json, and none could "
            f"be loaded from it ({reason}). Give another folder, or write --tokenizer bpe:4096."
        )
    offline = " HF_HUB_OFFLINE is set: nothing is fetched." if constants.HF_HUB_OFFLINE else ""
    return (
        f"--tokenizer {spec}: expected 'bytes', 'bpe:SIZE', a folder that holds a tokenizer, or an id on the Hugging "
        f"Face hub, which did not give it ({reason}).{offline} Where the hub cannot be reached, point --tokenizer at "
        "a local folder with the tokenizer.json and tokenizer_config.json of the model, for example one written by "
        f"`hf download {spec} --include 'tokenizer*' --local-dir FOLDER` on a connected machine: `--tokenizer FOLDER`."
    )
