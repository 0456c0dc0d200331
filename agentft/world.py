"""The processes of one job: which one this is, and the few things they tell each other.

A job on one process has a world of one, in which every exchange returns what it was given. Between several processes
objects and small numbers go through gloo on the CPU, tensors through the device's own backend. Exchanges are collective:
every rank makes the same ones in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MARKS_VARIABLE = "AGENTFT_MARKS_DIR"
"""The environment variable by which a launcher tells its ranks where to say how far they are."""


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among those of this machine: the number of its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            # An object through gloo, and not `dist.barrier`, which on GPUs would make a kernel of its own.
            dist.all_gather_object([None] * self.size, None)

    def first(self, work: Callable[[], T]) -> T:
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

    def mark(self, where: str) -> None:
        """Say how far this rank is, for whoever watches: a rank that has hung is the one whose mark is behind.

        Costs one small write to a file, and nothing where nobody watches.
        """
        folder = os.environ.get(MARKS_VARIABLE)
        if folder:
            path = Path(folder) / f"rank-{self.rank}"
            path.write_text(f"{time.time():.3f} {os.getpid()} {where}\n", encoding="utf-8")


ALONE = World()
"""The world of a job on one process."""


def join_world(device_kind: str, timeout_seconds: float) -> World:
    """Meet the other ranks that a launcher has started, by the variables it has set (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Args:
        device_kind: `cuda` adds NCCL for tensors on GPUs; objects and CPU tensors go through gloo in any case.
        timeout_seconds: An exchange that takes longer ends the process.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if device_kind == "cuda":
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # The agent's store outlives the ranks: after a restart the addresses of the dead ones would be found in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "any"
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return world


def leave_world() -> None:
    """Close the connections to the other ranks, if there are any."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
