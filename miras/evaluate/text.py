"""Text from a trained model, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.generation.streamers import BaseStreamer

from miras.data.tokenizer import plain_backend
from miras.errors import UsageError
from miras.hf import MirasForCausalLM

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Utf8Streamer(BaseStreamer):
    """Hands on text token by token, a character only once all its bytes are there.

    A token may be a part of a character (with a byte tokenizer every one is). Text is therefore decoded together with
    what was decoded last, and held back while it ends in half a character.

    Args:
        tokenizer: decodes; special tokens are not shown.
        write: takes each new piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self._ids: list[int] = []
        self._shown = 0  # tokens at the front that are shown already, kept as context for the decoder
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the next tokens; the first call is `generate` repeating the prompt, which is not shown."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        new = self._new()
        if new and not new.endswith(BROKEN):
            self.write(new)
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown

    def end(self) -> None:
        """Show what is left: bytes that never became a character, as replacement characters."""
        if new := self._new():
            self.write(new)
        self._ids, self._shown, self._prompt = [], 0, True

    def _new(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def generate(
    model: MirasForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    tokens: int,
    write: Callable[[str], None],
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> None:
    """Continue a text until `tokens` more tokens or the model ends it.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: text to continue; empty: a text from its beginning.
        tokens: at most so many.
        write: takes each new piece of text.
        temperature: 0 always takes the likeliest token; 1 samples what the model believes.
        top_k: sample among so many likeliest tokens; 0: among all.
        seed: of the sampling.

    Raises:
        UsageError: a number out of range.
    """
    for name, value, least in (("--tokens", tokens, 1), ("--temperature", temperature, 0), ("--top-k", top_k, 0)):
        if value < least:
            raise UsageError(f"{name} {value}: expected at least {least}.")
    set_seed(seed)
    ids = plain_backend(tokenizer).encode(prompt, add_special_tokens=False).ids or [tokenizer.eos_token_id]
    prompt_ids = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    streamer = Utf8Streamer(tokenizer, write)
    mask = torch.ones_like(prompt_ids)
    # The protocol that transformers types `generate` by asks for fields that only some of its models have.
    continue_text: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    continue_text(prompt_ids, attention_mask=mask, max_new_tokens=tokens, streamer=streamer, **sampling)
