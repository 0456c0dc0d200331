"""Runs one step under RLIMIT_AS, where the system itself refuses the larger micro-batches: run by test_guards.py."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import torch

from agentft.training.loop import accumulate_within_memory

WIDTH = 3_000
ROOM = 500_000_000
"""Bytes beyond what the process has mapped: 16 rows of WIDTH x WIDTH floats need 576 MB at once, 8 rows 288 MB."""


def main() -> None:
    torch.set_num_threads(1)
    weight = torch.ones(WIDTH, requires_grad=True)
    (weight.sum() * 2).backward()  # what autograd maps at its first use is not what is measured
    weight.grad = None
    refused: list[str] = []

    def attempt(rows: int) -> int:
        for _ in range(16 // rows):
            try:
                (weight * torch.ones(rows, WIDTH, WIDTH)).sum().backward()
            except (RuntimeError, MemoryError) as error:
                refused.append(str(error)[:120])
                raise
        return rows

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, resource.RLIM_INFINITY))

    def forget() -> None:
        weight.grad = None

    size, _ = accumulate_within_memory(attempt, 16, forget, step=1)
    print(
        json.dumps(
            {
                "refused": refused,
                "size": size,
                "gradient": float(weight.grad.sum()),
                "expected": float(16 * WIDTH * WIDTH),
            }
        )
    )


if __name__ == "__main__":
    main()
