"""What filled a GPU's memory when it ran out: every allocation with the line that made it, for PyTorch's memory viewer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

NAME = "out_of_memory-gpu{device}.pickle"
"""A file a device: ranks of one run share its folder."""


def snapshot_on_out_of_memory(folder: Path) -> None:
    """Record allocations from here on, and write them to `folder` at the moment when CUDA's memory runs out."""

    memory: Any = torch.cuda.memory

    def write(device: int, asked: int, total: int, free: int) -> None:
        path = folder / NAME.format(device=device)
        try:
            memory._dump_snapshot(str(path))
        except OSError as error:  # the allocator called this: its own error is the one to be heard
            log.warning("GPU %d is out of memory, and %s could not be written: %s", device, path, error)
            return
        log.warning(
            "GPU %d is out of memory: %.2f GB were asked for, %.2f of %.2f GB are free; %s shows what holds the rest at "
            "https://pytorch.org/memory_viz",
            *(device, asked / 1e9, free / 1e9, total / 1e9, path),
        )

    # PyTorch documents these names for users as they are.
    memory._record_memory_history(max_entries=100_000, stacks="python")
    # Present in CUDA builds alone.
    attach: Any = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None:
        attach(write)
