"""Every rank holds the whole model; gradients are summed while the backward pass still runs.

Li et al., 2020, PyTorch Distributed (arXiv 2006.15704).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from agentft.data.batches import Batch
from agentft.model.adapters import kept_parameters
from agentft.model.labelled_loss import LabelledLoss
from agentft.training.config import TrainingConfig
from agentft.training.engine import SingleEngine
from agentft.world import World


class DdpEngine(SingleEngine):
    """`SingleEngine` with gradients summed over ranks at the end of each step."""

    name = "ddp"

    def __init__(self, objective: LabelledLoss, config: TrainingConfig, *, world: World, fp16: bool = False) -> None:
        super().__init__(objective, config, fp16=fp16, world=world)
        device = next(objective.parameters()).device
        # Every rank has read the same files, so only what is computed or drawn is sent: writing rank 0's frozen weights over
        # those of a mapped file would copy it.
        for parameter in kept_parameters(self.model).values():
            dist.broadcast(parameter.data, src=0)
        self._wrapped = DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            init_sync=False,
        )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self._wrapped(batch)
        return loss

    def backward(self, share: torch.Tensor) -> None:
        # DDP takes the mean over ranks; the step's loss is a sum, whose denominator all ranks share already. Under fp16 the
        # loss keeps its size, so that the same steps overflow as on one process.
        super().backward(share if self._scales else share * self.world.size)

    def clip(self, limit: float) -> torch.Tensor:
        if self._scales:
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.mul_(self.world.size)
        return super().clip(limit)
