"""AdamW for a language model around memories: what decays and what does not, and the course of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from miras.sources import GateMaker

BETAS = (0.9, 0.95)
LAST_RATE = 0.1
"""The cosine ends at this share of the highest learning rate."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: weights of linear maps, which decay, and everything else, which does not.

    Decay pulls towards zero, which means "no map" for a linear map. For an initial memory, its slow parameters, a gate,
    a norm, a filter or an embedding zero means something else (a gate half open, a dead memory).

    Args:
        model: whose parameters; one that is shared counts as what it is first, so a tied embedding does not decay.
        weight_decay: of the first group.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    in_gates = {id(p) for m in model.modules() if isinstance(m, GateMaker) for p in m.parameters()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings - in_gates
    decayed = [p for p in model.parameters() if id(p) in linear]
    kept = [p for p in model.parameters() if id(p) not in linear]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, warmup: int, steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW, and a linear warm-up followed by a cosine down to a tenth.

    Args:
        model: on the device that it is trained on.
        learning_rate: the highest.
        weight_decay: see `parameter_groups`.
        warmup: steps of rising learning rate.
        steps: all steps.
    """
    groups = parameter_groups(model, weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=LAST_RATE)
    return optimizer, schedule
