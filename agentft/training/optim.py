"""The optimiser and the learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from agentft.training.config import Schedule, TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) over the trained parameters; only matrices decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
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
