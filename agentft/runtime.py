"""Describe what a process of a job runs on: its device, threads and seeds, and its rank among the other processes.

In a world of one every exchange returns what it was given. Exchanges are collective: every rank makes the same ones in the
same order. torch is imported inside the functions.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from agentft.errors import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# --- Device ---


@dataclass(frozen=True, slots=True)
class Device:
    """The device that holds the tensors."""

    kind: str
    """`cpu`, `cuda` or `mps`: what torch understands."""
    name: str
    threads: int
    """CPU threads of torch; they decide the last bits of a loss, so they are recorded."""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


def set_up(threads: int | None) -> Device:
    """Fix the number of CPU threads and pick the device: CUDA where present, else the CPU."""
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(threads or min(available_cores(), int(given) if given.isdigit() and int(given) else 2**15))
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), torch.get_num_threads())
    capability = torch.backends.cpu.get_cpu_capability()
    return Device("cpu", f"CPU ({capability}, {torch.get_num_threads()} threads)", torch.get_num_threads())


def available_cores() -> int:
    """Return the cores that this process may use; fewer than the machine has inside a container or a CPU set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, int(min([cores, *cpu_quotas(cgroup_folders("cpu"))])))


def cgroup_folders(
    controller: str, table: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Return the folders of the control groups that this process is in, of both versions, each with those above it.

    A job of SLURM or a scope of systemd has its limits in an inner one.
    """
    try:
        lines = table.read_text().splitlines()
    except OSError:  # no Linux
        return []
    folders = [root, root / controller]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inner = PurePosixPath(path.lstrip("/"))
        if ".." not in inner.parts and (not controllers or controller in controllers.split(",")):
            top = root / controller if controllers else root
            folders += [top / inner, *(top / above for above in inner.parents)]
    return list(dict.fromkeys(folders))


def cpu_quotas(folders: Sequence[Path]) -> list[float]:
    """Return the limits of control groups in cores."""
    quotas = []
    for folder in folders:
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):  # no such file, or `max`: no limit
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                if quota > 0:
                    quotas.append(quota / period)
    return quotas


def computes_in_bf16(device: Device) -> bool:
    """Return whether bf16 matrix products run in hardware; elsewhere they are emulated and slower than fp32."""
    import torch

    if device.is_cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_bytes(device: Device) -> int:
    """Return the largest memory use so far: of the CUDA allocator on a GPU, else of this process's resident set."""
    if device.is_cuda:
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use_bytes(kind: str) -> int:
    """Return the memory held now: by the CUDA allocator for `cuda`, else by this process."""
    if kind == "cuda":
        import torch

        return int(torch.cuda.memory_reserved())
    import psutil

    return int(psutil.Process().memory_info().rss)


# --- World ---

HEARTBEAT_VARIABLE = "AGENTFT_HEARTBEAT_DIR"
"""Environment variable by which a launcher tells its ranks where to write their heartbeats."""

_WORK_KEY = "agentft-work"
"""Counter in the store: how often a rank of the job was seen to work."""

_WORK_SECONDS = 0.02
"""CPU seconds in a second of the clock above which a process works; one that waits takes a tenth of it."""


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among those of this machine: the number of its GPU."""
    store: Any = field(default=None, repr=False, compare=False)
    """A `torch.distributed.Store` that all ranks of the job share; None on one process."""

    @property
    def is_main(self) -> bool:
        """Return whether this rank prints and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)  # through gloo: on GPUs `dist.barrier` would make a kernel of its own

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the others: what it leaves on the disk they find."""
        if not self.is_main:
            self.barrier()
        result = work()
        if self.is_main:
            self.barrier()
        return result

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the others' are ignored."""
        box = [value]
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank."""
        found = [value] * self.size
        if self.size > 1:
            import torch.distributed as dist

            dist.all_gather_object(found, value)
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks of several numbers, in fp64."""
        if self.size == 1:
            return list(values)
        import torch

        return list(map(float, self.sum(torch.tensor(values, dtype=torch.float64)).tolist()))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return self.totals([flag])[0] > 0

    def heartbeat(self, where: str) -> None:
        """Write down how far this rank is, where somebody watches: one that has hung stays behind."""
        if folder := os.environ.get(HEARTBEAT_VARIABLE):
            line = f"{time.time():.3f} {os.getpid()} {where}\n"
            Path(folder, f"rank-{self.rank}").write_text(line, encoding="utf-8")

    @contextmanager
    def keep_alive(self, where: str) -> Iterator[None]:
        """Send heartbeats on every rank as long as one of them computes, reads or writes: for work of unknown length."""
        self.heartbeat(where)
        if HEARTBEAT_VARIABLE not in os.environ:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch_work, args=(where, done), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch_work(self, where: str, done: threading.Event) -> None:
        seconds, moved = _work_done()
        heard = 0
        while not done.wait(1.0):
            now_seconds, now_moved = _work_done()
            works = now_seconds - seconds > _WORK_SECONDS or now_moved - moved > 1 << 16
            seconds, moved = now_seconds, now_moved
            before, heard = heard, self.store.add(_WORK_KEY, int(works)) if self.store is not None else int(works)
            if heard > before or works:
                self.heartbeat(where)


def _work_done() -> tuple[float, int]:
    """Return CPU seconds and bytes moved of this process, the asking thread apart, and of its ended children."""
    times = os.times()
    seconds = time.process_time() - time.thread_time() + times.children_user + times.children_system
    moved = 0
    with suppress(OSError):  # Linux says it
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            moved += int(value) if name in ("rchar", "wchar") else 0
    return seconds, moved


ALONE = World()
"""World of a job on one process."""


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the positions that each rank works on, in their order; the shares cover the list once.

    No rank gets more than its even number of items: where every item is an exchange, that decides the time.
    """
    most = -(-len(costs) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for position in sorted(range(len(costs)), key=lambda at: -costs[at]):  # costly ones to the rank with the least
        rank = min((r for r in range(ranks) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return [sorted(share) for share in shares]


def join_world(device_kind: str, timeout_seconds: float) -> World:
    """Meet the other ranks that a launcher has started, by the variables it has set (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    An exchange that takes longer than `timeout_seconds` ends the process, where nobody watches the heartbeats.

    Raises:
        ConfigError: after a restart the ranks would look for dead ones.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    given = os.environ
    machines, restarts = int(given.get("GROUP_WORLD_SIZE", "1")), int(given.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if machines > 1 and restarts > 0 and given.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Agents of several machines count attempts differently: addresses of the last attempt would pass for this one's.
        raise ConfigError(
            f"torchrun over {machines} machines with --max-restarts={restarts}: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "for torchrun on each machine, so that every attempt meets anew; without --max-restarts it is not needed"
        )
    local_rank = int(given["LOCAL_RANK"])
    if device_kind == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # The agent's store outlives the ranks: after a restart the addresses of the dead ones would be found in it.
    attempt = given.get("TORCHELASTIC_RESTART_COUNT", "0") if given.get("GROUP_WORLD_SIZE") == "1" else "any"
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if HEARTBEAT_VARIABLE in given:
        # Whoever watches the heartbeats can tell a rank that waits for long work from one that has hung; an exchange cannot.
        dist.distributed_c10d._set_pg_timeout(timedelta(days=365))
    return World(rank, size, local_rank, store)


def leave_world() -> None:
    """Close the connections to the other ranks, if there are any."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
