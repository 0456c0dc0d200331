"""Hold the model in training, its optimiser and its schedule: on one device here, on many in `agentft.distributed`.

With every engine the gradient after `micro_batch(last=True)` is the sum over all ranks and micro-batches of what was given to
`backward`, and a checkpoint holds whole tensors by parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from agentft.data.batches import Batch
from agentft.errors import CheckpointError
from agentft.model.adapters import kept_parameters, load_trained_state
from agentft.model.labelled_loss import LabelledLoss
from agentft.runtime import ALONE, World
from agentft.training.checkpoint import TensorStream, stream_of
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


class Engine(Protocol):
    """Holds the model in training."""

    name: str
    world: World
    model: nn.Module
    """The model as the recipe loaded it; its parameters are whole only inside `unsharded()`."""
    autocast: torch.dtype | None
    """What a pass outside the loss must set to compute as the loss does."""
    optimizer: torch.optim.Optimizer
    """Its `param_groups` carry the learning rate that the schedule sets."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround one forward and backward pass; with `last` the gradients are then summed over ranks.

        Every rank makes the same number of them, since some engines exchange weights in every pass.
        """

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the summed, weighted cross-entropy of this rank's batch: a scalar, fp32."""

    def backward(self, share: torch.Tensor) -> None:
        """Add the gradient of a share of the step's loss."""

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradient down to the L2 norm `limit` and return its norm before that, over all ranks' parameters."""

    def step(self) -> None:
        """Update the weights and forget the gradient."""

    def zero_grad(self) -> None:
        """Forget the gradient without an update, clipped or not."""

    def unsharded(self) -> AbstractContextManager[None]:
        """Inside, `model` holds whole parameters on every rank and can be run by each alone: evaluation, generation."""

    def weights(self, *, frozen: bool = False) -> TensorStream:
        """Return what a checkpoint keeps of the weights, or with `frozen` all, whole, by name. Collective to go through."""

    def optimizer_state(self) -> TensorStream:
        """Return the optimiser's tensors, whole, as `<parameter>.<slot>`. Collective to go through."""

    def settings(self) -> dict[str, Any]:
        """Return what else decides the next update, as JSON."""

    def load(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> None:
        """Take up what any engine saved, on any number of ranks.

        Raises:
            CheckpointError: the optimiser's tensors are not those of these parameters.
            ConfigError: the saved weights train other parameters.
        """


_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """The factor of the loss in the backward pass under fp16, by the rule and in the saved form of torch's `GradScaler`.

    Whether a gradient is finite is read off the norm over all ranks, so every rank decides alike. Micikevicius et al., 2018,
    Mixed Precision Training (arXiv 1710.03740).
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = 65536.0 if enabled else 1.0
        self.finite = True
        """The gradient of this step can be taken; else the step is left out."""
        self._good_steps = 0
        self._checked = False

    def check(self, norm: torch.Tensor) -> None:
        """Note whether the gradient of this step is finite, by its norm."""
        self.finite = not self.enabled or bool(torch.isfinite(norm))
        self._checked = True

    def update(self) -> None:
        """Set the factor of the next step, where the gradient of this one was checked."""
        if self.enabled and self._checked:
            self._good_steps = self._good_steps + 1 if self.finite else 0
            if not self.finite:
                self.factor *= _BACKOFF
            elif self._good_steps == _INTERVAL:
                self.factor, self._good_steps = self.factor * _GROWTH, 0
        self.finite, self._checked = True, False

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


class SingleEngine:
    """One process, one device, plain torch; the others are like it where they do not say otherwise."""

    name = "single"
    unsharded: staticmethod[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __init__(
        self, objective: LabelledLoss, config: TrainingConfig, *, fp16: bool = False, world: World = ALONE
    ) -> None:
        self.world = world
        self.objective: Any = objective
        self.model = objective.model
        self.autocast = objective.autocast
        self.optimizer: torch.optim.Optimizer = build_optimizer(objective, config)
        self._scale = LossScale(enabled=fp16)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.objective(batch)
        return loss

    def backward(self, share: torch.Tensor) -> None:
        # DDP and FSDP take the mean over ranks; the step's loss is a sum, whose denominator all ranks share already. Under
        # fp16 the loss keeps its size, so that the same steps overflow as on one process.
        factor = self._scale.factor if self._scale.enabled else self.world.size
        (share * factor).backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float) -> torch.Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._scale.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.world.size / self._scale.factor)
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._scale.check(whole)
        return whole

    def step(self) -> None:
        if self._scale.finite:
            self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self._scale.update()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self, *, frozen: bool = False) -> TensorStream:
        return self._stream(dict(self.model.named_parameters()) if frozen else kept_parameters(self.model))

    def optimizer_state(self) -> TensorStream:
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return self._stream(
            {
                f"{names[parameter]}.{slot}": torch.as_tensor(value)
                for parameter, slots in self.optimizer.state.items()
                for slot, value in slots.items()
            }
        )

    def _stream(self, tensors: Mapping[str, Any]) -> TensorStream:
        return stream_of({name: tensor.detach() for name, tensor in tensors.items()})

    def settings(self) -> dict[str, Any]:
        return {"groups": plain_groups(self.optimizer), "scaler": self._scale.state()}

    def load(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> None:
        load_trained_state(self.model, dict(weights))
        load_optimizer(self.optimizer, self.model, optimizer, settings["groups"])
        self._scale.load(settings.get("scaler", {}))


def plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of the parameter groups without the parameters, as JSON."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Put `plain_groups` back; raise CheckpointError for another number of groups."""
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimiser has {len(groups)} groups of parameters, this one {len(optimizer.param_groups)}"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def slots_by_parameter(tensors: Mapping[str, torch.Tensor], known: set[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Sort `<parameter>.<slot>` by parameter; raise CheckpointError for a tensor of no known one."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        if name not in known:
            raise CheckpointError(
                f"the checkpoint's optimiser has a state for {name!r}, which this model does not train"
            )
        found.setdefault(name, {})[slot] = tensor
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Put a saved state into an optimiser over whole parameters."""
    restore_groups(optimizer, groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = slots_by_parameter(tensors, {name for p, name in names.items() if p.requires_grad})
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: states[name] for index, name in enumerate(ordered) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
