"""Set up the machine for a run: device, threads, number formats, seeds. torch is imported inside the functions."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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

    torch.set_num_threads(threads or available_cores())
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), torch.get_num_threads())
    capability = torch.backends.cpu.get_cpu_capability()
    return Device("cpu", f"CPU ({capability}, {torch.get_num_threads()} threads)", torch.get_num_threads())


def available_cores() -> int:
    """Return the cores that this process may use; fewer than the machine has inside a container or a CPU set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


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
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use_bytes(kind: str) -> int:
    """Return the memory held now: by the CUDA allocator for `cuda`, else by this process."""
    if kind == "cuda":
        import torch

        return int(torch.cuda.memory_reserved())
    import psutil

    return int(psutil.Process().memory_info().rss)


def torch_device(device: Device) -> torch.device:
    """Return torch's own object for a device."""
    import torch

    return torch.device(device.kind)
