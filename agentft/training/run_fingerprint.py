"""Compare what decides the losses of a training with that of the run that saved a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentft.errors import CheckpointError

log = logging.getLogger(__name__)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return each value that two fingerprints do not share, by its dotted name: `training.seed` -> `1 -> 2`."""
    # As a checkpoint holds it: in JSON an enumeration or a path has become text.
    before, now = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(current, default=str))))
    return {
        key: f"{before.get(key, 'not recorded')} -> {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def described(changes: Mapping[str, str]) -> str:
    """Return what `differences` found in one line."""
    return "; ".join(f"{name}: {change}" for name, change in changes.items())


def require_same(
    checkpoint: Path, saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: bool
) -> dict[str, str]:
    """Return what differs where that is allowed, and log it.

    A training may move to another engine or number of ranks, then with other threads and devices: its next losses are equal but
    for the order in which they are summed.

    Raises:
        CheckpointError: something differs and may not.
    """
    changes = differences(saved, current)
    moved = bool(changes.keys() & {"engine", "ranks"}) and changes.keys() <= {"engine", "ranks", "threads", "device"}
    if changes and not (allow or moved):
        raise CheckpointError(
            f"{checkpoint} belongs to another training: {described(changes)}. Use another run folder, "
            "or resume anyway with training.allow_changes=true"
        )
    for name, change in changes.items():
        log.warning("resuming with changed setting %s: %s", name, change)
    return changes


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value)
