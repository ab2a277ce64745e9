"""Comparing models at equal size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from miras.hf import MirasForCausalLM
from miras.train.config import TrainConfig
from miras.train.run import model_config


def equal_hidden(configs: Mapping[str, TrainConfig]) -> dict[str, int]:
    """SwiGLU widths, multiples of 8, that give every model the parameters of the largest one at the usual width."""
    base = next(iter(configs.values()))
    usual = model_config(replace(base, hidden=None)).intermediate_size
    counts = {name: parameters(config, usual) for name, config in configs.items()}
    unit = parameters(base, usual + 1) - parameters(base, usual)
    most = max(counts.values())
    return {name: usual + round((most - count) / unit / 8) * 8 for name, count in counts.items()}


def parameters(config: TrainConfig, hidden: int) -> int:
    """Parameters of the model of a run with SwiGLUs of this width, over a byte's vocabulary."""
    with torch.device("meta"):
        return MirasForCausalLM(model_config(replace(config, hidden=hidden))).num_parameters()
