"""Weights, gradients and optimiser in shards by torch's `fully_shard` (FSDP2), gathered one block at a time.

Zhao et al., 2023, PyTorch FSDP (arXiv 2304.11277); the second version keeps each parameter apart, so frozen weights in
bf16 and adapters in fp32 live in one block.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from agentft.distributed.engines import ShardedEngine, blocks_of, sharded_dtype, wanted_dtype
from agentft.model.labelled_loss import LabelledLoss
from agentft.runtime import World
from agentft.training.checkpoint import TensorSpec, TensorStream
from agentft.training.config import TrainingConfig

_FEW = 0.1
"""Share of trained parameters below which their whole gradients may wait on each rank for the end of a step."""


class FsdpEngine(ShardedEngine):
    """Every rank keeps its slice of each parameter."""

    name = "fsdp"

    def __init__(
        self,
        objective: LabelledLoss,
        config: TrainingConfig,
        *,
        world: World,
        fp16: bool = False,
        frozen: torch.dtype | None = None,
    ) -> None:
        parameters = list(objective.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        self._waits = trained < _FEW * sum(p.numel() for p in parameters)
        self._shard(objective, world, frozen)
        super().__init__(objective, config, fp16=fp16, world=world)

    def _shard(self, objective: LabelledLoss, world: World, frozen: torch.dtype | None) -> None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(kind, (world.size,))
        dtype = sharded_dtype(objective)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        self._blocks = blocks = typing.cast("list[Any]", blocks_of(objective.model, self.name))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=policy)
        # What a backward pass gathers ahead follows from the passes before it otherwise, evaluation's too, and a rank that
        # had nothing to evaluate would then gather other weights than the rest. The first block has none before it.
        for before, block in zip([blocks[0], *blocks], blocks, strict=False):
            block.set_modules_to_backward_prefetch([before])
        _cast_shards(objective, frozen)
        # Evaluation runs blocks before the whole has run once, which alone makes the root known publicly.
        root: Any = objective
        root._get_fsdp_state()._lazy_init()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self.objective.set_requires_gradient_sync(last or not self._waits)
        return nullcontext()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        shards: list[Any] = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        try:
            for block in self._blocks:
                block.set_reshard_after_forward(False)
            for module in shards:
                module.unshard()
            yield
        finally:
            for module in shards:
                module.reshard()
            for block in self._blocks:
                block.set_reshard_after_forward(True)

    def load(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> None:
        kept, states = self._take_up(weights, optimizer, settings)
        for name, parameter in kept.items():
            with torch.no_grad():
                parameter.copy_(_like(parameter, weights[name]))
            if name in states:
                self.optimizer.state[parameter] = {
                    slot: _like(parameter, value) if value.ndim else value.clone()
                    for slot, value in states[name].items()
                }

    def _stream(self, tensors: Mapping[str, Any]) -> TensorStream:
        def gather(name: str) -> torch.Tensor:
            tensor = tensors[name].detach()
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        return TensorStream({name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, gather)


def _cast_shards(objective: nn.Module, frozen: torch.dtype | None) -> None:
    """Cast this rank's shards, one at a time: what is trained to fp32, the rest to `frozen`."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        return tensor.to(wanted_dtype(tensor, torch.float32, frozen))

    # `Module.to` casts all parameters alike.
    if any(wanted_dtype(p, torch.float32, frozen) is not p.dtype for p in objective.parameters()):
        objective._apply(cast)  # type: ignore[no-untyped-call]


def _like(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """Cut a whole tensor as `parameter` is cut. Every rank has it whole, so nothing is sent."""
    assert isinstance(parameter, DTensor)
    placed = whole.to(device=parameter.to_local().device, dtype=parameter.dtype)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)
