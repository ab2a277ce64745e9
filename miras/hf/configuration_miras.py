"""One configuration for all rules and hybrids."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from miras.errors import UsageError
from miras.mixer import Mixer, mixer_from_config
from miras.registry import to_config
from miras.variants import pattern, variant


class MirasConfig(PreTrainedConfig):
    """Configuration of `MirasForCausalLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: size D of the stream.
        intermediate_size: hidden size of each SwiGLU; None: 8/3 of `hidden_size`, rounded up to a multiple of 8.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of each mixer.
        mixer: a pattern of variants, "yaad" or "yaad,sliding_window", a mixer, or a list of mixers (or names, or what
            `Mixer.to_config` gives), repeated over the layers. Saved as the list, so that a checkpoint says exactly
            what it is.
        chunk: tokens per chunk, where `mixer` is a pattern.
        gates: "head" or "channel", see `MirasLayer`.
        gate_rank: rank of channel gates.
        conv_size: width of the short convolution.
        rope: rotate q and k before a memory.
        context_length: context length that retention's time constants are spread up to; not a limit.
        initializer_range: kept for tools that look for it; see `miras.model` for the initialisation.
        use_cache: return states from `forward`.
        tie_word_embeddings: the output layer shares the embedding.

    Raises:
        UsageError: unknown variants or parts of a rule.
    """

    model_type = "miras"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as transformers declares it)

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 128,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        mixer: str | Mixer | list[Any] = "yaad",
        chunk: int | None = None,
        gates: str = "head",
        gate_rank: int = 32,
        conv_size: int = 4,
        rope: bool = False,
        context_length: int = 2048,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or -(-8 * hidden_size // 3 // 8) * 8
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.gates = gates
        self.gate_rank = gate_rank
        self.conv_size = conv_size
        self.rope = rope
        self.context_length = context_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.mixer = [to_config(part) for part in _mixers(mixer, num_hidden_layers, chunk)]
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def mixers(self) -> tuple[Mixer, ...]:
        """One mixer per layer."""
        return tuple(mixer_from_config(config) for config in self.mixer)


def _mixers(mixer: str | Mixer | list[Any], layers: int, chunk: int | None) -> tuple[Mixer, ...]:
    if isinstance(mixer, str):
        return pattern(mixer, layers, chunk)
    if chunk is not None:
        raise UsageError("MirasConfig: chunk goes with a pattern of names; a mixer or rule already holds its own.")
    given = [mixer] if isinstance(mixer, Mixer | dict) else list(mixer)
    if not given:
        raise UsageError("MirasConfig: mixer is an empty list; write a pattern such as 'yaad' or a list of rules.")
    parts = [variant(p) if isinstance(p, str) else p if isinstance(p, Mixer) else mixer_from_config(p) for p in given]
    return tuple(parts[i % len(parts)] for i in range(layers))
