"""Share what engines need that cut parameters into shards: names, saved settings, weights that stay small, loss scaling.

Micikevicius et al., 2018, Mixed Precision Training (arXiv 1710.03740). The rule and the saved form are those of torch's
`GradScaler`, which knows one device: halved after a step whose gradient is not finite, doubled after 2,000 that are.
Whether it is finite is read off the norm over all ranks, so every rank decides alike.

A model for such an engine is loaded with its files' own number format: its weights are then the mapped files themselves,
which no rank copies. They are cast here, once they are cut (FSDP2) or a block at a time before that (ZeRO), so a rank
never holds more than its shard and the block in work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from agentft.errors import ConfigError
from agentft.model.adapters import kept_parameters, require_same_parameters
from agentft.model.labelled_loss import LabelledLoss, causal_model
from agentft.training.engine import plain_groups, restore_groups, slots_by_parameter
from agentft.world import World

_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """What the loss is multiplied by before the backward pass; 1 where fp16 is not in use."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = 65536.0 if enabled else 1.0
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradient was finite, or was not and has been left out."""
        if not self.enabled:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.factor *= _BACKOFF
        elif self._good_steps == _INTERVAL:
            self.factor, self._good_steps = self.factor * _GROWTH, 0

    def state(self) -> dict[str, Any]:
        """Return what `torch.amp.GradScaler.state_dict` would; empty where it is not in use."""
        if not self.enabled:
            return {}
        return {
            "scale": self.factor,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": _INTERVAL,
            "_growth_tracker": self._good_steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state, of `GradScaler` too."""
        if self.enabled and state:
            self.factor, self._good_steps = float(state["scale"]), int(state["_growth_tracker"])


class ShardedEngine:
    """The part of an engine that does not ask who cuts the parameters."""

    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    _scale: LossScale

    def settings(self) -> dict[str, Any]:
        return {"groups": plain_groups(self.optimizer), "scaler": self._scale.state()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _take_up(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> tuple[dict[str, nn.Parameter], dict[str, dict[str, torch.Tensor]]]:
        """Check what was saved and take up the settings: (kept parameters, the optimiser's slots), both by name."""
        kept = kept_parameters(self.model)
        require_same_parameters({name: whole_shape(p) for name, p in kept.items()}, weights)
        states = slots_by_parameter(optimizer, set(self._trained()))
        restore_groups(self.optimizer, settings["groups"])
        self._scale.load(settings.get("scaler", {}))
        return kept, states


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter before it was cut."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def blocks_of(model: nn.Module, option: str) -> list[nn.Module]:
    """Return the decoder's blocks, in order.

    Raises:
        ConfigError: the model has no list of them; `option` is who asks.
    """
    layers = getattr(causal_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"distributed={option}: {type(model).__name__} has no list of blocks to shard; choose ddp")
    return list(layers)


def wanted_dtype(parameter: nn.Parameter, trained: torch.dtype, frozen: torch.dtype | None) -> torch.dtype:
    """Return what a parameter is to be kept in; `frozen` None leaves a frozen one as it was loaded."""
    if not parameter.is_floating_point():
        return parameter.dtype
    return trained if parameter.requires_grad else (frozen or parameter.dtype)


def sharded_dtype(objective: LabelledLoss) -> torch.dtype | None:
    """Return the dtype that trained weights are cast to in shards, before they are gathered, and end the autocast.

    Autocast would keep the cast copy of every gathered weight until the end of the pass, which is the whole model.
    """
    dtype, objective.autocast = objective.autocast, None
    return dtype
