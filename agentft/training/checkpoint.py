"""Checkpoints: safetensors and JSON, written beside their place, synced, renamed, and read only if every digest holds."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from agentft.errors import CheckpointError
from agentft.model.cache import file_digest
from agentft.training.tensor_stream import TensorStream, stream_of, write_stream

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint in memory: groups of tensors by file, and everything else as JSON."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor] | TensorStream], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint under `root` and return its folder; whoever reads it sees all of it or nothing.

    Of a stream one tensor at a time is held.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    target = root / f"step-{step:06d}"
    work = root / f".step-{step:06d}.{os.getpid()}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, group in tensors.items():
            stream = group if isinstance(group, TensorStream) else stream_of(group)
            write_stream(stream, work / f"{name}.safetensors")
        (work / _STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        _write_manifest(work)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        _sync(root)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(
            f"{target}: cannot write the checkpoint: {error}; earlier checkpoints are intact"
        ) from error
    return target


def load_checkpoint(path: Path, *, check: bool = True) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest, unless that has just been done.

    Raises:
        CheckpointError: a file is missing, extra, of another size or of another digest.
    """
    if check and (problem := find_damage(path)):
        raise CheckpointError(f"{path}: {problem}")
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path=path, step=state["step"], tensors=tensors, state=state)


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in manifest.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, the manifest says {expected['bytes']}"
            if file_digest(path / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
        extra = {file.name for file in path.iterdir()} - manifest.keys() - {_MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"files that the manifest does not list: {', '.join(sorted(extra))}" if extra else None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders under `root`, oldest step first, by number and not by name or time."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest_whole(root: Path) -> Path | None:
    """Return the newest checkpoint that is whole, saying loudly which were not; None where there are none at all.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged. Starting afresh then is the user's decision.
    """
    paths = list_checkpoints(root)
    for path in reversed(paths):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, problem)
    if paths:
        raise CheckpointError(
            f"{root}: all {len(paths)} checkpoints are damaged; to start afresh, choose another run folder "
            "or delete this one's checkpoints"
        )
    return None


def load_newest(root: Path) -> Checkpoint | None:
    """Load `newest_whole`."""
    path = newest_whole(root)
    return None if path is None else load_checkpoint(path, check=False)


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints beyond the newest `keep` and the best one."""
    for path in list_checkpoints(root)[:-keep]:
        if path.name != f"step-{best_step or 0:06d}":
            shutil.rmtree(path)


def _write_manifest(folder: Path) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": listed}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
