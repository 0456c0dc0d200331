"""The factor that keeps the gradients of fp16 from vanishing, where parameters are in shards.

Micikevicius et al., 2018, Mixed Precision Training (arXiv 1710.03740). The rule and the saved form are those of torch's
`GradScaler`, which knows one device: halved after a step whose gradient is not finite, doubled after 2,000 that are.
Whether it is finite is read off the norm over all ranks, so every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """What the loss is multiplied by before the backward pass; 1 where fp16 is not in use."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = 65536.0 if enabled else 1.0
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradient was finite, or was not and has been left out."""
        if not self.enabled:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.factor *= _BACKOFF
        elif self._good_steps == _INTERVAL:
            self.factor, self._good_steps = self.factor * _GROWTH, 0

    def state(self) -> dict[str, Any]:
        """Return what `torch.amp.GradScaler.state_dict` would; empty where it is not in use."""
        if not self.enabled:
            return {}
        return {
            "scale": self.factor,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": _INTERVAL,
            "_growth_tracker": self._good_steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state, of `GradScaler` too."""
        if self.enabled and state:
            self.factor, self._good_steps = float(state["scale"]), int(state["_growth_tracker"])
