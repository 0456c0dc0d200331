"""Where the ranks of a job are to run, and whether they can: decided before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Places:
    """The processes of a job and the point where their machines meet."""

    nproc: int
    """Ranks on each machine."""
    nnodes: int
    node: int
    """Number of this machine; -1 where the machines find out when they meet."""
    endpoint: str
    """`host:port`; port 0: any that is free, which no other job can have."""
    job: str
    """What tells this job's ranks from those of another at the same endpoint."""

    @property
    def ranks(self) -> int:
        return self.nproc * self.nnodes


def choose_places(
    config: DistributedConfig, *, gpus: int, job: str, environ: Mapping[str, str] | None = None
) -> Places:
    """Say where ranks run, from the settings, the GPUs that are visible, and SLURM's variables.

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
    nodes = _given_nodes(environ)
    nnodes = config.nnodes or nodes.count
    if nnodes == 1:
        return Places(nproc, 1, 0, "127.0.0.1:0", job)
    if config.rdzv_endpoint is not None:
        if not re.fullmatch(r"[^:\s]+:\d+", config.rdzv_endpoint):
            raise ConfigError(f"distributed.rdzv_endpoint={config.rdzv_endpoint}: expected host:port")
        return Places(nproc, nnodes, nodes.number, config.rdzv_endpoint, nodes.job or "agentft")
    if not nodes.first or not nodes.job:
        raise ConfigError(
            f"distributed.nnodes={nnodes}: the machines need a point to meet; give the same "
            "distributed.rdzv_endpoint=<first host>:<port> and the same run_dir=... on each"
        )
    # Two jobs on one host must not meet: the port follows from the job.
    port = 20000 + zlib.crc32(nodes.job.encode()) % 20000
    return Places(nproc, nnodes, nodes.number, f"{nodes.first}:{port}", nodes.job)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """What the surroundings say of the machines of this job."""

    count: int = 1
    number: int = -1
    first: str = ""
    job: str = ""


def _given_nodes(environ: Mapping[str, str]) -> _Nodes:
    """Read the machines from the sweep launcher's variables, else from SLURM's.

    Of SLURM it is the step's number of machines that counts: a batch script without `srun` runs on the first alone.
    """
    if "AGENTFT_NODES" in environ:
        count, number = int(environ["AGENTFT_NODES"]), int(environ["AGENTFT_NODE"])
        return _Nodes(count, number, environ["AGENTFT_FIRST_HOST"], environ["AGENTFT_JOB_ID"])
    count = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    if count == 1:
        return _Nodes()
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '0')}"
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    return _Nodes(count, int(environ.get("SLURM_NODEID", "-1")), first_host(hosts) if hosts else "", step)


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
    if _compiles_ops(config) and not _can_compile():
        raise ConfigError(
            f"distributed={config.name}: distributed.deepspeed.optimizer makes DeepSpeed compile its own Adam at first "
            "use, and there is no C++ compiler (g++, or $CXX); install one, or leave that key out: torch's AdamW needs none"
        )
    if gpus and not os.environ.get("CUDA_HOME") and shutil.which("nvcc") is None and _compiles_ops(config):
        raise ConfigError(
            f"distributed={config.name}: compiling DeepSpeed's operators for a GPU needs nvcc; set CUDA_HOME, or leave "
            "distributed.deepspeed.optimizer out"
        )


def _compiles_ops(config: DistributedConfig) -> bool:
    return "optimizer" in config.deepspeed


def _can_compile() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None
