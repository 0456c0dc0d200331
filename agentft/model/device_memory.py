"""How much memory a device has and how much of it is free: a GPU, or this machine or container."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from agentft.runtime import Device

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files that hold a container's limit and what it uses, of both versions of control groups."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device."""

    free: int
    total: int


def device_memory(device: Device) -> DeviceMemory | None:
    """Return the memory of `device`: of the GPU, or of this machine or container; None where nobody tells."""
    if device.is_cuda:
        import torch

        return DeviceMemory(*torch.cuda.mem_get_info())
    machine = _machine()
    limits = [machine] if machine is not None else []
    for limit, used in _CGROUPS:
        if (most := _number(Path(limit))) is not None:
            limits.append(DeviceMemory(most - (_number(Path(used)) or 0), most))
    if not limits:
        return None
    return DeviceMemory(min(each.free for each in limits), min(each.total for each in limits))


def _machine() -> DeviceMemory | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return DeviceMemory(_available(page), os.sysconf("SC_PHYS_PAGES") * page)


def _available(page: int) -> int:
    """Memory that can be had without swapping: Linux's own estimate, else pages that are free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or `max`: no limit
        return None
