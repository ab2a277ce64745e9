"""Comparing models at equal size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from miras.hf import MirasForCausalLM
from miras.train.config import TrainConfig
from miras.train.run import model_config


def equal_hidden(configs: Mapping[str, TrainConfig], **shared: Any) -> dict[str, int]:
    """SwiGLU widths, multiples of 8, that give every model the parameters of Yaad at the usual width.

    One yardstick for all sets of models, so that a model has the same width wherever it is compared.

    Args:
        configs: the models by name.
        shared: fields of `TrainConfig` that the yardstick has as well.
    """
    base = TrainConfig(**{**shared, "model": "yaad"})
    usual = model_config(base).intermediate_size
    wanted = parameters(base, usual)
    unit = parameters(base, usual + 1) - wanted
    return {n: usual + round((wanted - parameters(config, usual)) / unit / 8) * 8 for n, config in configs.items()}


def parameters(config: TrainConfig, hidden: int) -> int:
    """Parameters of the model of a run with SwiGLUs of this width, over a byte's vocabulary."""
    with torch.device("meta"):
        return MirasForCausalLM(model_config(replace(config, hidden=hidden))).num_parameters()
