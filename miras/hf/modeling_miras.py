"""One modelling file for all mixers: `Backbone` as a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from miras.errors import UsageError
from miras.hf.cache import MirasCache
from miras.hf.configuration_miras import MirasConfig
from miras.layer import MirasLayer
from miras.layout import layout
from miras.model import Backbone, SwiGLU, init_module


class MirasPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MirasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # no assisted decoding: a memory cannot unlearn rejected tokens
    # What sets and holds the memory stays in float32 whatever the model is loaded in.
    _keep_in_fp32_modules_strict = ["memory", "slow", "gates"]  # noqa: RUF012

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a MirasCache itself

    def initialize_weights(self) -> None:
        """Initialise what was not loaded.

        The library's own walk passes over modules without parameters of their own, and so over every `MirasLayer`.
        """
        self.apply(self._init_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "_is_hf_initialized", False):
            return
        # Parameters that were loaded carry a mark and keep their values.
        own = list(module.parameters(recurse=isinstance(module, MirasLayer | SwiGLU)))
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) < len(own):
            init_module(module, self.config.num_hidden_layers)
        for parameter, value in loaded:
            parameter.copy_(value)
        module._is_hf_initialized = True  # type: ignore[assignment]


class MirasModel(MirasPreTrainedModel):
    """The stack without an output layer.

    Args:
        config: the configuration.
    """

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.vocab_size,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.mixers(),
            config.gates,
            config.gate_rank,
            config.conv_size,
            config.rope,
            config.context_length,
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.backbone.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of tokens."""
        self.backbone.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MirasCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens to hidden states.

        Args:
            input_ids: int [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: 0/1 [B, at least T]; its last T columns say which of these tokens exist.
            past_key_values: states after the tokens before.
            inputs_embeds: instead of `input_ids`.
            use_cache: return the states; None: as the configuration says, but not while training.
            cu_seqlens: int [N + 1], sequences packed into one row.
            **kwargs: what other models of the library take and this one has no use for (positions, say).

        Raises:
            UsageError: neither or both of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("MirasModel: give either input_ids or inputs_embeds.")
        x: Tensor = input_ids if input_ids is not None else inputs_embeds  # type: ignore[assignment]
        mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -x.shape[1] :].bool()
            # Looking costs nothing on a CPU, and an unpadded batch takes the shorter way.
            mask = None if mask.device.type == "cpu" and bool(mask.all()) else mask
        where = layout(x.shape[0], x.shape[1], mask, cu_seqlens, x.device)
        states = None if past_key_values is None else past_key_values.states() or None
        hidden, after = self.backbone(x, states, where)
        cache = None
        if self.config.use_cache and not self.training if use_cache is None else use_cache:
            cache = MirasCache(len(after)) if past_key_values is None else past_key_values
            cache.put(after, x.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


class MirasForCausalLM(MirasPreTrainedModel, GenerationMixin):
    """Language model: `MirasModel` and an output layer.

    Args:
        config: the configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MirasConfig) -> None:
        super().__init__(config)
        self.model = MirasModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MirasCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens to logits, and with `labels` (int [B, T], -100 where there is none) to the mean loss of the next.

        The first token of a packed sequence is no target of the sequence before it. Other arguments as in `MirasModel`.
        """
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cu_seqlens)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.index_fill(1, cu_seqlens[1:-1].long(), -100)
            items = {n: kwargs[n] for n in ("num_items_in_batch",) if n in kwargs}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(MirasConfig.model_type, MirasConfig)
AutoModel.register(MirasConfig, MirasModel)
AutoModelForCausalLM.register(MirasConfig, MirasForCausalLM)
