"""Where the time of a training goes, and what a person sees of it while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


class Clock:
    """Adds up wall seconds by phase. On CUDA the phases show launch times: kernels run on after a phase ends."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        """`tell` hears the name of every phase that begins."""
        self._tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the body to `name`."""
        if self._tell is not None:
            self._tell(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def training_seconds(self) -> float:
        """Seconds of the steps themselves, without evaluation and saving."""
        return sum(self.seconds.get(name, 0.0) for name in ("data", "forward", "backward", "optimiser"))


@dataclass
class Meter:
    """What this process has worked through, over all ranks: for the words beside the progress bar."""

    tokens: int = 0
    targets: int = 0
    positions: int = 0

    def add(self, *, tokens: int, targets: int, positions: int) -> None:
        """Count one step."""
        self.tokens += tokens
        self.targets += targets
        self.positions += positions

    def words(self, clock: Clock, loss: float, memory_bytes: int) -> dict[str, str]:
        """Return what to show: loss, speed, share of tokens with a label, share of positions that are padding, memory."""
        return {
            "loss": f"loss {loss:.3f}",
            "speed": f"{self.tokens / max(clock.training_seconds, 1e-9):,.0f} tokens/s",
            "labelled": f"{self.targets / max(self.tokens, 1):.0%} labelled",
            "padding": f"{1 - self.tokens / max(self.positions, 1):.0%} padding",
            "memory": f"{memory_bytes / 1e9:.1f} GB",
        }


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Return one line: each phase with its seconds and share, longest first."""
    whole = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {spent:.1f} s ({spent / whole:.0%})" for name, spent in ordered)
