"""What decides the losses of a training, and what of it differs from the run that saved a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentft.errors import CheckpointError

log = logging.getLogger(__name__)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name each value that two identities do not share: `training.seed was 1, is 2`."""
    # As a checkpoint holds it: in JSON an enumeration or a path has become text.
    before, now = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(current, default=str))))
    return [
        f"{key} was {before.get(key, 'not recorded')}, is {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def require_same(checkpoint: Path, saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: bool) -> list[str]:
    """Return what differs where that is allowed, and say so in the log.

    A training may move to another engine or number of ranks: the law of the loop makes its next losses equal but for the
    order in which they are summed. Then it may have other threads and devices, too.

    Raises:
        CheckpointError: something differs and may not.
    """
    changed = differences(saved, current)
    if changed and not (allow or _only_moved(changed)):
        raise CheckpointError(
            f"{checkpoint} belongs to another training: {'; '.join(changed)}. Use another run folder, "
            "or go on regardless with training.allow_changes=true"
        )
    for change in changed:
        log.warning("going on although %s", change)
    return changed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value)


def _only_moved(changed: list[str]) -> bool:
    names = {change.split(" was ", 1)[0] for change in changed}
    return bool(names & {"engine", "ranks"}) and names <= {"engine", "ranks", "threads", "device"}
