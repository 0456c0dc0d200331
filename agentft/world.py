"""Name the processes of one job: which one this is, and the few things they exchange.

A job on one process has a world of one, in which every exchange returns what it was given. Between several processes
objects and small numbers go through gloo on the CPU, tensors through the device's own backend. Exchanges are collective:
every rank makes the same ones in the same order.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentft.errors import ConfigError

if TYPE_CHECKING:
    import torch


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the positions that each rank works on, in their order; the shares cover the list once.

    Costly items go first, each to the rank that has least so far among those that have not their number yet. No rank gets
    more than its even number of items, rounded up: where every item is an exchange between ranks, that decides the time.
    """
    most = -(-len(costs) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for position in sorted(range(len(costs)), key=lambda at: -costs[at]):
        rank = min((r for r in range(ranks) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return [sorted(share) for share in shares]


T = TypeVar("T")

HEARTBEAT_VARIABLE = "AGENTFT_HEARTBEAT_DIR"
"""Environment variable by which a launcher tells its ranks where to write their heartbeats."""


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
        if self.size > 1:
            import torch.distributed as dist

            # An object through gloo, and not `dist.barrier`, which on GPUs would make a kernel of its own.
            dist.all_gather_object([None] * self.size, None)

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
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks of several numbers, in fp64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(each) for each in sums.tolist()]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return flag if self.size == 1 else self.totals([flag])[0] > 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor summed over ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def keep_alive(self, where: str) -> Iterator[None]:
        """Send heartbeats during work of unknown length, of which some ranks may do all while others wait for them.

        They go on, on every rank, as long as one rank computes, reads or writes. Ranks that only wait do none of these, so a
        hang inside is still seen.
        """
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

    def heartbeat(self, where: str) -> None:
        """Write down how far this rank is, for whoever watches: a rank that has hung is the one that stays behind.

        Costs one small write to a file, and nothing where nobody watches.
        """
        folder = os.environ.get(HEARTBEAT_VARIABLE)
        if folder:
            path = Path(folder) / f"rank-{self.rank}"
            path.write_text(f"{time.time():.3f} {os.getpid()} {where}\n", encoding="utf-8")


_WORK_KEY = "agentft-work"
"""Counter in the store: how often a rank of the job was seen to work."""

_WORK_SECONDS = 0.02
"""CPU seconds in a second of the clock above which a process works; one that waits takes a tenth of it."""

_FOR_EVER = timedelta(days=365)


def _work_done() -> tuple[float, int]:
    """Return what this process, the asking thread apart, and its ended children have done so far: CPU seconds, and bytes
    read and written."""
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


def join_world(device_kind: str, timeout_seconds: float) -> World:
    """Meet the other ranks that a launcher has started, by the variables it has set (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Args:
        device_kind: `cuda` adds NCCL for tensors on GPUs; objects and CPU tensors go through gloo in any case.
        timeout_seconds: An exchange that takes longer ends the process, where nobody watches the heartbeats.

    Raises:
        ConfigError: after a restart the ranks would look for dead ones.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    _require_fresh_addresses()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_kind == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # The agent's store outlives the ranks: after a restart the addresses of the dead ones would be found in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "any"
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if HEARTBEAT_VARIABLE in os.environ:
        # Whoever watches the heartbeats can tell a rank that waits for long work from one that has hung; an exchange cannot.
        dist.distributed_c10d._set_pg_timeout(_FOR_EVER)
    return World(rank, size, local_rank, store)


def _require_fresh_addresses() -> None:
    """Refuse restarts over several machines in one store: their agents count attempts differently, so no rank could tell
    the addresses of this attempt from those of the last."""
    given = os.environ
    if (
        int(given.get("GROUP_WORLD_SIZE", "1")) > 1
        and int(given.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        and given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        raise ConfigError(
            f"torchrun over {given['GROUP_WORLD_SIZE']} machines with --max-restarts={given['TORCHELASTIC_MAX_RESTARTS']}: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on each machine, so that every attempt meets anew; "
            "without --max-restarts it is not needed"
        )


def leave_world() -> None:
    """Close the connections to the other ranks, if there are any."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
