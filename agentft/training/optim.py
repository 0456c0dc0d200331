"""The optimiser and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from agentft.training.config import Schedule, TrainingConfig


def build_optimizer(
    model: nn.Module, config: TrainingConfig, rate_factors: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) over the trained parameters; only matrices decay.

    Args:
        rate_factors: part of a parameter's name -> its peak rate over the others'; None: as the model itself says.
    """
    rate_factors = getattr(model, "rate_factors", {}) if rate_factors is None else rate_factors
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((f for part, f in rate_factors.items() if part in name), 1.0)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    # Those at the plain rate first: the first group's rate is the one that is logged.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != 1.0, -item[0][1]))
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": factor * config.learning_rate}
            for (factor, decay), parameters in ordered
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate_factor(step: int, *, total: int, config: TrainingConfig) -> float:
    """Rate of step `step` (from 0) over the peak rate: linear warm-up, then cosine, linear or flat."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    floor = config.min_learning_rate_ratio
    match config.schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return floor + (1 - floor) * (1 - progress)
        case Schedule.cosine:
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer, total: int, config: TrainingConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule over `total` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, total=total, config=config))
