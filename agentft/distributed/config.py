"""Define the settings of the group `distributed`, and decide where its ranks run, before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import zlib
from collections.abc import Mapping
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
    """Restarts of a job whose rank dies."""

    max_restarts: int = field(default=0, metadata={"minimum": 0, "maximum": 1000})
    """Restarts of all ranks, from the last good checkpoint, before the job fails."""
    grace: int = field(default=30, metadata={"minimum": 1, "maximum": 86400})
    """Seconds that the other ranks have to end before they are killed."""


@dataclass(kw_only=True)
class DistributedConfig(Settings, group="distributed", affects="losses"):
    """Ranks, where they are, and what divides the work. The training is the same with every engine."""

    name: str = field(metadata={"advanced": True})
    """The option of the group `distributed`."""
    engine: EngineKind = field(default=EngineKind.single, metadata={"advanced": True})
    """Division of weights, gradients and optimiser state among the ranks."""
    nproc: int | None = field(default=None, metadata={"minimum": 1, "maximum": 1024})
    """Ranks on each machine; null: one for each visible GPU, without GPUs one."""
    nnodes: int | None = field(default=None, metadata={"minimum": 1, "maximum": 10**5})
    """Machines; null: those of the launcher's or SLURM's job step (`SLURM_STEP_NUM_NODES`), else one."""
    rdzv_endpoint: str | None = field(default=None, metadata={"advanced": True, "affects": "nothing"})
    """`host:port` of the first machine, the same on all; null: the first host that the launcher or SLURM names."""
    timeout: float = field(
        default=1800.0, metadata={"advanced": True, "above": 0, "maximum": 10**6, "affects": "nothing"}
    )
    """Seconds without progress of any rank after which the job is ended and the slowest rank is named. A rank that fetches
    weights or prepares data makes progress as long as it computes, reads or writes."""
    elastic: ElasticConfig = field(default_factory=ElasticConfig, metadata={"advanced": True})
    """Restarts of a job whose rank dies."""
    deepspeed: dict[str, Any] = field(default_factory=dict, metadata={"advanced": True})
    """DeepSpeed's own configuration, key by key, for `engine=deepspeed`."""


@dataclass(frozen=True, slots=True)
class LaunchTopology:
    """The processes of a job and the point where their machines meet."""

    nproc: int
    """Ranks on each machine."""
    nnodes: int
    node: int
    """Number of this machine; -1 where the machines find out when they meet."""
    endpoint: str
    """`host:port`; port 0: any that is free, which no other job can have."""
    job: str
    """Name that tells this job's ranks from those of another at the same endpoint."""

    @property
    def ranks(self) -> int:
        return self.nproc * self.nnodes


def choose_topology(
    config: DistributedConfig, *, gpus: int, job: str, environ: Mapping[str, str] | None = None
) -> LaunchTopology:
    """Return where ranks run, from the settings, the GPUs that are visible, and SLURM's variables.

    Raises:
        ConfigError: the machines would not find each other, or there are fewer GPUs than ranks.
    """
    environ = os.environ if environ is None else environ
    nproc = config.nproc or max(gpus, 1)
    if gpus and nproc > gpus:
        raise ConfigError(
            f"distributed.nproc={nproc}: {gpus} GPU(s) are visible; each rank needs one of its own. "
            "Give distributed.nproc at most that, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    count, number, first, step = _given_nodes(environ)
    nnodes = config.nnodes or count
    if nnodes == 1:
        return LaunchTopology(nproc, 1, 0, "127.0.0.1:0", job)
    if config.rdzv_endpoint is not None:
        if not re.fullmatch(r"[^:\s]+:\d+", config.rdzv_endpoint):
            raise ConfigError(f"distributed.rdzv_endpoint={config.rdzv_endpoint}: expected host:port")
        return LaunchTopology(nproc, nnodes, number, config.rdzv_endpoint, step or "agentft")
    if not first or not step:
        raise ConfigError(
            f"distributed.nnodes={nnodes}: the machines need a point to meet; give the same "
            "distributed.rdzv_endpoint=<first host>:<port> and the same run_dir=... on each"
        )
    # Two jobs on one host must not meet: the port follows from the job.
    return LaunchTopology(nproc, nnodes, number, f"{first}:{20000 + zlib.crc32(step.encode()) % 20000}", step)


def _given_nodes(environ: Mapping[str, str]) -> tuple[int, int, str, str]:
    """Read the machines of this job: how many, number of this one, first host, and name of the job.

    The sweep launcher's variables come first, then SLURM's, of which the step's number of machines counts: a batch script
    without `srun` runs on the first alone.
    """
    if "AGENTFT_NODES" in environ:
        count, number = int(environ["AGENTFT_NODES"]), int(environ["AGENTFT_NODE"])
        return count, number, environ["AGENTFT_FIRST_HOST"], environ["AGENTFT_JOB_ID"]
    count = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    if count == 1:
        return 1, -1, "", ""
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '0')}"
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    return count, int(environ.get("SLURM_NODEID", "-1")), first_host(hosts) if hosts else "", step


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's short form: `gpu[07-09,12],cpu1` begins with `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise ConfigError(
            f"SLURM's list of hosts, {nodelist!r}: no host can be read from it; give distributed.rdzv_endpoint"
        )
    return match[1] + (match[2] or "") + match[3]


def require_engine(config: DistributedConfig, *, gpus: int, fp16_weights: bool) -> None:
    """Refuse an engine that cannot run on this machine, or not in fp16 where weights of the model are trained.

    Raises:
        ConfigError: says what is missing and how to get it.
    """
    if config.engine is not EngineKind.deepspeed:
        return
    if fp16_weights:
        raise ConfigError(
            f"distributed={config.name} with model.dtype=fp16: DeepSpeed trains adapters beside a model in fp16, not the "
            "model itself; choose model.dtype=bf16, or distributed=fsdp"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"distributed={config.name} needs the package deepspeed: pip install deepspeed (Linux)")
    if "optimizer" in config.deepspeed:
        missing = [] if shutil.which(os.environ.get("CXX", "g++")) else ["a C++ compiler (g++, or $CXX)"]
        if gpus and not os.environ.get("CUDA_HOME") and shutil.which("nvcc") is None:
            missing.append("nvcc, by CUDA_HOME")
        if missing:
            raise ConfigError(
                f"distributed={config.name}: distributed.deepspeed.optimizer makes DeepSpeed compile its own Adam at first "
                f"use, which needs {' and '.join(missing)}; or leave that key out: torch's AdamW needs none"
            )
