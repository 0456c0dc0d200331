"""Weight files read and written tensor by tensor, so that a checkpoint is never twice in memory."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ModelError
from agentft.model.file_names import file_inside, shard_files

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30
"""Bytes of tensors gathered before a converted shard is written: what a conversion needs besides the mapped source."""

SAFE_NAME, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_NAME, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Renamed = Iterable[tuple[str, "torch.Tensor"]]
"""What becomes of one tensor of the source: none, one or several of the target."""


def weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """Return the weight files of a model folder: safetensors where there are any, else pickles if they are allowed.

    Raises:
        ModelError: there are none, only pickles without the flag, or an index that names files outside the folder.
    """
    for name, index in ((SAFE_NAME, SAFE_INDEX), (PICKLE_NAME, PICKLE_INDEX)):
        has_index, has_file = (folder / index).is_file(), (folder / name).exists()
        if not has_index and not has_file:
            continue
        files = shard_files(folder / index) if has_index else [file_inside(folder, name, str(folder))]
        if not allow_pickle and (name == PICKLE_NAME or any(file.suffix != ".safetensors" for file in files)):
            raise pickle_refusal(str(folder))
        return files
    raise ModelError(f"{folder}: no weights; expected {SAFE_NAME}, {SAFE_INDEX} or the same as {PICKLE_NAME}")


def holds_weights(folder: Path) -> bool:
    """Return True where every weight file of a folder is there, with as many bytes as its header tells of."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in weight_files(folder, allow_pickle=False):
            with safe_open(file, framework="numpy"):
                pass
    except (ModelError, OSError, SafetensorError):
        return False
    return True


def save_model(model: Any, folder: Path) -> None:
    """Write weights and settings of a model of transformers; its own `save_pretrained` writes on rank 0 of a job alone."""
    from huggingface_hub import save_torch_state_dict

    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # of tied weights the first name
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def pickle_refusal(origin: str) -> ModelError:
    """Return the error for weights that exist as pickles only."""
    return ModelError(
        f"{origin}: its weights are pickles (.bin), which can hide code; read by torch's restricted reader "
        "with model.allow_pickle=true, or take a revision with safetensors"
    )


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's tensors by name, mapped from the disk rather than copied.

    Raises:
        ModelError: the file is damaged, or a pickle that holds anything but tensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: damaged or incomplete: {error}; fetch it again") from error
        return
    try:
        # Old files (before torch 1.6) are no zip archives and cannot be mapped.
        with path.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{path}: refused or damaged, not a pickle of tensors alone: {first}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path}: expected tensors by name, found {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{path}: {name} is no tensor but {type(tensor).__name__}")
        yield str(name), tensor


def rewrite_weights(
    files: Iterable[Path],
    folder: Path,
    rename: Callable[[str, torch.Tensor], Renamed],
    expected: Mapping[str, tuple[int, ...]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `files` into `folder` as safetensors shards, each tensor through `rename`; exactly `expected` must result.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape, or the disk is full.
    """
    writer = _ShardWriter(folder, shard_bytes)
    try:
        for path in files:
            for name, tensor in read_tensors(path):
                for new_name, part in rename(name, tensor):
                    _check_shape(path, name, new_name, tuple(part.shape), expected)
                    writer.add(new_name, part)
        if missing := sorted(expected.keys() - writer.names()):
            raise ModelError(
                f"{folder.name}: the checkpoint lacks {len(missing)} tensors, such as {', '.join(missing[:3])}; "
                "is a shard missing?"
            )
        writer.finish()
    except OSError as error:
        raise disk_error(error, folder) from error


def _check_shape(
    path: Path, name: str, new_name: str, found: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]
) -> None:
    if new_name not in expected:
        raise ModelError(f"{path}: {name} has no place in this architecture (it would be {new_name})")
    if found != expected[new_name]:
        raise ModelError(f"{path}: {name} gives {new_name} of shape {found}; config.json says {expected[new_name]}")


def check_free_disk(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot end.

    Raises:
        ModelError: fewer than `needed` bytes are free where `folder` is or will be.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ModelError(
            f"{existing}: {what} needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; "
            "make room or set model.cache_dir to a folder on another disk"
        )


def disk_error(error: OSError, folder: Path) -> ModelError:
    """Return what the user can do about an error of the file system while writing below `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"{folder.parent}: the disk is full; make room or set model.cache_dir to another disk")
    return ModelError(f"{folder.parent}: {error}")


class _ShardWriter:
    """Gathers tensors and writes a shard whenever enough have come together."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def names(self) -> set[str]:
        return {*self._pending, *(name for shard in self._shards for name in shard)}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and sum(t.numel() * t.element_size() for t in self._pending.values()) + size > (
            self._shard_bytes
        ):
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size

    def finish(self) -> None:
        """Write the rest, then name the shards by their number of all, as transformers expects."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / SAFE_NAME)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        (self._folder / SAFE_INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._pending:
            save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending = {}
