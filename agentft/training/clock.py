"""Where the time of a training goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up wall seconds by phase. On CUDA the phases show launch times: kernels run on after a phase ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._first: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the body to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def count(self, name: str, total: int) -> int:
        """Return how far the counter `name` has moved since it was first seen by this clock."""
        return total - self._first.setdefault(name, total)


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Return one line: each phase with its seconds and share, longest first."""
    whole = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {spent:.1f} s ({spent / whole:.0%})" for name, spent in ordered)
