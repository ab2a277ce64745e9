"""A needle in a haystack: does a trained language model know a sentence that it read long ago."""

from __future__ import annotations

import functools
import random
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from miras.data import load_corpus
from miras.data.tokenizer import plain_backend
from miras.errors import UsageError
from miras.evaluate.perplexity import PIECE
from miras.evaluate.tasks.base import IGNORE, LanguageTask, Report, Row
from miras.hf import MirasCache, MirasForCausalLM

# The wording is RULER's (arXiv 2404.06654), niah_single_1 to 3, so that results mean the same.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HEAD = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}.\n"
QUESTION = "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
ANSWER = " The special magic {kind} for {key} mentioned in the provided text is"

ADJECTIVES = (
    "amber brave calm distant eager fierce gentle hollow icy jolly keen lonely mellow narrow odd polite".split()
)
NOUNS = "anchor basin cedar delta engine falcon garden harbor island jacket kettle ladder meadow needle orchard".split()

Kind = Literal["passkey", "number", "uuid"]

HAYSTACK_CHARACTERS = 2_000_000
"""So much text is looked at for prose; where a haystack needs more, it begins again."""


class Prompt(NamedTuple):
    """A question about a text.

    Attributes:
        tokens: the whole prompt, up to where the answer begins.
        needle: where in it the needle stands, (first token, one past the last).
        candidates: token ids of the right answer, then of the distractors.
    """

    tokens: list[int]
    needle: tuple[int, int]
    candidates: list[list[int]]


@dataclass(frozen=True)
class Needle(LanguageTask):
    """A needle in a haystack of repeated sentences or of prose: RULER's single-needle tasks (arXiv 2404.06654).

    A prompt has exactly `length` tokens. "One of the special magic numbers for brave-kettle is: 4821903." stands behind
    the share `depth` of a text's sentences; behind the text comes the question, and the beginning of the answer up to
    "is". Wording and kinds are RULER's; its haystack of essays is here the held-out part of the data, so that the model
    knows the kind of text.

    Measured, as means over `examples` prompts for each length and depth:

    * exact: greedy decoding writes the answer's tokens. RULER's own score asks no more than that the answer is in
      the next 128 tokens, so this is never above it.
    * found: the answer has a higher log-likelihood behind the prompt than each of `distractors` other values drawn like
      it. A model that does not remember gets 1 / (distractors + 1). Small models that never answer exactly are told
      apart by it.
    * margin: log-likelihood of the answer minus the mean of the distractors', in nats; 0 where nothing is remembered.

    Args:
        kind: "passkey", a number of 7 digits in five sentences repeated over and over; "number", the same in prose;
            "uuid", 32 hexadecimal digits in prose.
        data: where prose comes from.
        lengths: tokens of a prompt.
        depths: 0, the needle is the first sentence, to 1, the last.
        examples: prompts per length and depth.
        distractors: wrong answers that the right one is compared with.
    """

    kind: Kind = "passkey"
    data: str = "stdlib"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples: int = 4
    distractors: int = 9

    level = ("length", "depth")
    measures = ("exact", "found", "margin")
    seeded = True

    def __post_init__(self) -> None:
        if self.kind not in ("passkey", "number", "uuid"):
            raise UsageError(f"needle: kind is {self.kind!r}, expected passkey, number or uuid.")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(f"needle: expected depths from 0 to 1, got {self.depths}.")
        if self.examples < 1 or self.distractors < 1:
            raise UsageError("needle: expected at least one example and one distractor.")

    def build(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[int, float, list[Prompt]]]:
        """Length, depth and their prompts, one cell of the grid after the other.

        Raises:
            UsageError: a length that the question alone exceeds.
        """
        backend = plain_backend(tokenizer)
        for length in self.lengths:
            for depth in self.depths:
                # A string, so that it means the same in every process.
                draw = random.Random(f"{self.kind} {length} {depth} {seed}")
                yield (
                    length,
                    depth,
                    [self.prompt(backend, length, depth, draw) for _ in range(self.examples)],
                )

    def measure(
        self, model: MirasForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
    ) -> list[Row]:
        rows: list[Row] = []
        cells = len(self.lengths) * len(self.depths)
        for length, depth, prompts in self.build(tokenizer, seed):
            report(len(rows), cells, f"length {length} depth {depth}")
            rows.append({**self.named((length, depth)), **ask(model, prompts)})
        return rows

    def prompt(self, backend: Tokenizer, length: int, depth: float, draw: random.Random) -> Prompt:
        """A prompt with a key, a value, distractors and a place in the text of their own.

        Args:
            backend: of the model's tokenizer, see `plain_backend`.
            length: tokens of the prompt.
            depth: where its needle stands.
            draw: what is random in it.

        Raises:
            UsageError: a length that the question alone exceeds.
        """
        sentences = [NOISE] if self.kind == "passkey" else _prose(self.data)
        kind = "uuid" if self.kind == "uuid" else "number"
        key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
        values = [self._value(draw) for _ in range(self.distractors + 1)]

        def ids(text: str, value: str = "") -> list[int]:
            return backend.encode(text.format(kind=kind, key=key, value=value), add_special_tokens=False).ids

        head, needle, tail = ids(HEAD), ids(NEEDLE, values[0]), ids(QUESTION + ANSWER)
        room = length - len(head) - len(needle) - len(tail)
        if room < 0:
            raise UsageError(f"needle: a prompt of {length} tokens is shorter than its question; write longer lengths.")
        hay = _fill(backend, sentences, room, draw.randrange(len(sentences)))
        before = sum(map(len, hay[: round(depth * len(hay))]))
        flat = [token for sentence in hay for token in sentence]
        tokens = [*head, *flat[:before], *needle, *flat[before:], *tail]
        first = len(head) + before
        return Prompt(tokens, (first, first + len(needle)), [ids(" {value}", value) for value in values])

    def _value(self, draw: random.Random) -> str:
        if self.kind == "uuid":
            return str(uuid.UUID(int=draw.getrandbits(128), version=4))
        return str(draw.randint(10**6, 10**7 - 1))


@functools.cache
def _prose(data: str) -> list[str]:
    """The sentences or lines of held-out text; their ends and what stands between them belong to them."""
    text = ""
    for document in load_corpus(data).documents("validation"):
        text += document + "\n"
        if len(text) > HAYSTACK_CHARACTERS:
            break
    return re.findall(r".+?(?:[.!?]\s+|\n\s*|$)", text)


@torch.no_grad()
def ask(model: MirasForCausalLM, prompts: Sequence[Prompt]) -> dict[str, float]:
    """`exact`, `found` and `margin` of `Needle`, means over prompts of one length."""
    device, cache = model.device, MirasCache(model.config.num_hidden_layers)
    for piece in torch.tensor([prompt.tokens for prompt in prompts], device=device).split(PIECE, dim=1):
        first = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    rows = [torch.tensor(candidate, device=device) for prompt in prompts for candidate in prompt.candidates]
    answers, choices = pad_sequence(rows, batch_first=True, padding_value=IGNORE), len(rows) // len(prompts)
    cache.batch_repeat_interleave(choices)
    rest = model(answers[:, :-1].clamp_min(0), past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first.repeat_interleave(choices, 0), rest], 1).float()
    return _scores(logits.unflatten(0, (-1, choices)), answers.unflatten(0, (-1, choices)))


def _scores(logits: Tensor, answers: Tensor) -> dict[str, float]:
    """logits [B, K, L, V] where the tokens of answers [B, K, L] are to be said, the right one the first of K."""
    said = -F.cross_entropy(logits.movedim(-1, 1), answers, ignore_index=IGNORE, reduction="none").sum(-1)
    right = (logits[:, 0].argmax(-1) == answers[:, 0]) | (answers[:, 0] == IGNORE)
    exact, found = right.all(-1), (said[:, :1] > said[:, 1:]).all(-1)
    margin = said[:, 0] - said[:, 1:].mean(-1)
    return {"exact": exact.float().mean().item(), "found": found.float().mean().item(), "margin": margin.mean().item()}


def _fill(backend: Tokenizer, sentences: list[str], room: int, start: int) -> list[list[int]]:
    """`room` tokens of consecutive sentences from `start` on; what is too much is cut off at the front."""
    hay: list[list[int]] = []
    while room > 0:
        hay.append(backend.encode(sentences[start % len(sentences)], add_special_tokens=False).ids)
        room, start = room - len(hay[-1]), start + 1
    while room < 0:
        first = hay.pop(0)
        room += len(first)
        if room > 0:
            hay.insert(0, first[-room:])
            break
    return hay
