"""Define the settings of the group `distributed`: the engine, its processes and its machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agentft.errors import ConfigError
from agentft.settings import Settings


class EngineKind(StrEnum):
    single = "single"
    """One process, in the program that was started."""
    ddp = "ddp"
    """Every rank holds everything; gradients are summed (torch's DistributedDataParallel)."""
    deepspeed = "deepspeed"
    """DeepSpeed ZeRO, by `distributed.deepspeed`."""
    fsdp = "fsdp"
    """Weights, gradients and optimiser in shards (torch's `fully_shard`)."""


@dataclass(kw_only=True)
class ElasticConfig(Settings, group="distributed.elastic", affects="nothing"):
    """What becomes of a job whose rank dies."""

    max_restarts: int = field(default=0, metadata={"minimum": 0, "maximum": 1000})
    """How often all ranks start again, from the last good checkpoint, before the job fails."""
    grace: int = field(default=30, metadata={"minimum": 1, "maximum": 86400})
    """Seconds that the other ranks have to end by themselves before they are killed."""


@dataclass(kw_only=True)
class DistributedConfig(Settings, group="distributed", affects="losses"):
    """Ranks, where they are, and what divides the work. The training is the same with every engine."""

    name: str
    """The option of the group `distributed`."""
    engine: EngineKind = field(default=EngineKind.single, metadata={"advanced": True})
    """What holds weights, gradients and optimiser."""
    nproc: int | None = field(default=None, metadata={"minimum": 1, "maximum": 1024})
    """Ranks on each machine; null: one for each visible GPU, without GPUs one."""
    nnodes: int | None = field(default=None, metadata={"minimum": 1, "maximum": 10**5})
    """Machines; null: those of the launcher's or SLURM's job step (`SLURM_STEP_NUM_NODES`), else one."""
    rdzv_endpoint: str | None = field(default=None, metadata={"advanced": True, "affects": "nothing"})
    """`host:port` of the first machine, the same on all; null: the first host that the launcher or SLURM names."""
    timeout: float = field(
        default=1800.0, metadata={"advanced": True, "above": 0, "maximum": 10**6, "affects": "nothing"}
    )
    """Seconds in which no rank gets anywhere, after which the job is ended and the slowest rank is named. A rank that fetches
    weights or prepares data gets somewhere as long as it computes, reads or writes."""
    elastic: ElasticConfig = field(default_factory=ElasticConfig, metadata={"advanced": True})
    """What becomes of a job whose rank dies."""
    deepspeed: dict[str, Any] = field(default_factory=dict, metadata={"advanced": True})
    """DeepSpeed's own configuration, key by key, for `engine=deepspeed`; `+distributed.deepspeed.<key>` adds one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is EngineKind.single and ((self.nproc or 1) > 1 or (self.nnodes or 1) > 1):
            raise ConfigError(
                f"distributed=single is one process; for {self.nproc or 1} x {self.nnodes or 1} choose distributed=ddp, "
                "fsdp or one of deepspeed_*"
            )
        if self.deepspeed and self.engine is not EngineKind.deepspeed:
            raise ConfigError(f"distributed.deepspeed: given, but distributed.engine={self.engine} does not read it")
