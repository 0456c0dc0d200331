"""Write, read and choose checkpoints: written beside their place, synced, renamed, read only if every digest holds."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from agentft.cache import file_digest
from agentft.errors import CheckpointError
from agentft.runtime import World
from agentft.training.config import Resume, TrainingConfig
from agentft.training.run_fingerprint import require_same

log = logging.getLogger(__name__)

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor will be, before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorStream:
    """Named tensors that exist one at a time.

    Making one may be collective: then every rank goes through the stream.
    """

    kinds: Mapping[str, TensorSpec]
    make: Callable[[str], torch.Tensor]
    """Name -> tensor on any device."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors, on the CPU."""
        for name in self.kinds:
            yield name, self.make(name).detach().cpu()

    def join_collective(self) -> None:
        """Make every tensor and keep none: what ranks other than 0 do while rank 0 writes."""
        for name in self.kinds:
            self.make(name)


def stream_of(tensors: Mapping[str, torch.Tensor]) -> TensorStream:
    """Return tensors that are there already as a stream."""
    return TensorStream({name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__)


def write_stream(stream: TensorStream, path: Path) -> None:
    """Write a stream as one file of https://github.com/huggingface/safetensors#format, holding one tensor at a time."""
    # Wide numbers first, so that every tensor is aligned.
    names = sorted(stream.kinds, key=lambda name: -stream.kinds[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        kind = stream.kinds[name]
        header[name] = {"dtype": _CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [at, at + kind.bytes]}
        at += kind.bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        ordered = TensorStream({name: stream.kinds[name] for name in names}, stream.make)
        for name, tensor in ordered:
            if tuple(tensor.shape) != stream.kinds[name].shape or tensor.dtype != stream.kinds[name].dtype:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced as {stream.kinds[name]}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


_NAME = re.compile(r"step-\d+")
_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint in memory: groups of tensors by file, and everything else as JSON."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, TensorStream], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint under `root` and return its folder; whoever reads it sees all of it or nothing.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    target = root / f"step-{step:06d}"
    work = root / f".step-{step:06d}.{os.getpid()}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, stream in tensors.items():
            write_stream(stream, work / f"{name}.safetensors")
        (work / _STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        _write_manifest(work)
        if target.exists():
            set_aside(target)
        work.rename(target)
        _sync(root)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        needed = sum(kind.bytes for stream in tensors.values() for kind in stream.kinds.values())
        free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
        raise CheckpointError(
            f"{target}: cannot write the checkpoint: {error}. It needs {needed:,} bytes and more for its state, {free:,} "
            "are free; earlier checkpoints are intact"
        ) from error
    return target


def load_checkpoint(path: Path, *, check: bool = True) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest, unless that has just been done.

    Raises:
        CheckpointError: it is damaged.
    """
    if check and (problem := find_damage(path)):
        raise CheckpointError(f"{path}: {problem}")
    state = read_state(path)
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path=path, step=state["step"], tensors=tensors, state=state)


def read_state(path: Path) -> dict[str, Any]:
    """Return everything of a whole checkpoint but its tensors."""
    state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return state


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or None."""
    try:
        text = (path / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)["files"]
        if text != _manifest_text(manifest):
            return f"{_MANIFEST} is not as it was written"
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
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_step_of)


def newest_whole(root: Path, *, fallback: bool = True) -> Path | None:
    """Return the newest checkpoint that is whole, saying loudly which were not; None where there are none at all.

    Raises:
        CheckpointError: all of them are damaged, or the newest is and `fallback` is off.
    """
    paths = list_checkpoints(root)
    for path in reversed(paths):
        problem = find_damage(path)
        if problem is None:
            return path
        if not fallback:
            raise CheckpointError(
                f"{path} is damaged ({problem}); training.fallback=true resumes from the checkpoint before it"
            )
        log.warning("checkpoint %s is damaged (%s); falling back to the one before", path, problem)
    if paths:
        raise CheckpointError(
            f"{root}: all {len(paths)} checkpoints are damaged; to start afresh, choose another run folder "
            "or delete this one's checkpoints"
        )
    return None


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is not to be used again to `<name>.aside-<n>`, where a person can still look at it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def clear_unfinished(root: Path, after: int) -> None:
    """Make room before a training resumes from step `after`; only the process that holds the run folder may do this.

    What a killed process left half done is removed, and checkpoints of later steps, which could not be used, are set aside.

    Raises:
        CheckpointError: such a checkpoint cannot be renamed.
    """
    for path in root.glob(".step-*") if root.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(root):
        if _step_of(path) > after:
            try:
                log.warning("checkpoint %s is not used; it is now %s", path, set_aside(path).name)
            except OSError as error:
                raise CheckpointError(f"{path} is not used and cannot be set aside: {error}") from error


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints beyond the newest `keep` and the best one."""
    for path in list_checkpoints(root)[:-keep]:
        if _step_of(path) != best_step:
            # Renamed first: killed in between, half a checkpoint must not look like a damaged one.
            gone = path.with_name(f".{path.name}.gone")
            try:
                path.rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                log.warning("old checkpoint %s cannot be deleted: %s", path, error)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write_manifest(folder: Path) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}
    manifest = folder / _MANIFEST
    manifest.write_text(_manifest_text(listed), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _manifest_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"version": 1, "files": files}, indent=1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training begins."""

    checkpoint: Path | None
    """Whole, and of this training; None: the first step."""
    changes: dict[str, str]
    """What differs from the run that saved it, and may."""


def find_start(checkpoints: Path, config: TrainingConfig, identity: Mapping[str, Any], world: World) -> Start:
    """Find where a training begins, and change nothing. Rank 0 looks and checks, so that all ranks take the same.

    Raises:
        CheckpointError: `resume` cannot be honoured, or the checkpoint belongs to another training.
    """
    if config.resume is Resume.never:
        if list_checkpoints(checkpoints):
            raise CheckpointError(f"{checkpoints} has checkpoints; training.resume=auto resumes from the newest")
        return Start(None, {})
    path = world.broadcast(newest_whole(checkpoints, fallback=config.fallback) if world.is_main else None)
    if path is None:
        if config.resume is Resume.must:
            raise CheckpointError(f"{checkpoints}: no checkpoint to resume from; training.resume=auto starts afresh")
        return Start(None, {})
    return Start(path, require_same(path, read_state(path)["identity"], identity, allow=config.allow_changes))
