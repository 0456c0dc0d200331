"""Read and write weight files tensor by tensor, so that no model is ever whole in memory."""

from __future__ import annotations

import json
import pickle
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from agentft.errors import ModelError

LONGEST_NAME = 1024
"""Characters in a path inside a repository; file systems take 255 in each part."""

_DRIVE = re.compile(r"[A-Za-z]:")


def check_file_names(names: Iterable[Any], origin: str) -> list[str]:
    """Return `names` if each is a plain relative path with forward slashes, inside the folder it is relative to.

    Raises:
        ModelError: a name that is absolute, climbs with `..`, names a drive or a network share, or hides a control
            character; the message names `origin`.
    """
    checked = []
    for name in names:
        if problem := _problem(name):
            raise ModelError(f"{origin}: refused the file name {str(name)[:120]!r}: {problem}; nothing was written")
        checked.append(str(name))
    return checked


def _problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return "not text"
    parts = name.split("/")
    problems = {
        f"expected 1 to {LONGEST_NAME} characters, found {len(name)}": not 0 < len(name) <= LONGEST_NAME,
        "it holds a control character": any(unicodedata.category(character) == "Cc" for character in name),
        "it is not Unicode text": any(unicodedata.category(character) == "Cs" for character in name),
        "it holds a backslash": "\\" in name,
        "it is absolute": not parts[0],
        "it names a home folder": parts[0].startswith("~"),
        "a part of it is empty or dots, such as `..`": any(not part.rstrip(". ") for part in parts),
        "it names a drive": any(_DRIVE.match(part) for part in parts),
        "a part of it is longer than 255 bytes": any(len(part.encode(errors="surrogatepass")) > 255 for part in parts),
    }
    return next((problem for problem, found in problems.items() if found), None)


def file_inside(folder: Path, name: str, origin: str) -> Path:
    """Return the file `name` of `folder`; raise ModelError for an unsafe name, no such file, or a link out of the folder."""
    check_file_names([name], origin)
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{origin}: names {name}, and there is no such file in {folder}")
    if not path.resolve().is_relative_to(_storage(folder)):
        raise ModelError(
            f"{path}: refused, a symbolic link that leaves the model's folder (to {path.resolve()}); "
            "put the file itself there"
        )
    return path


def shard_files(index: Path) -> list[Path]:
    """Return the weight files that a shard index (`*.index.json`) names, each checked and present, or raise ModelError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a `weight_map` from tensor to file")
    names = sorted(set(check_file_names(weight_map.values(), str(index))))
    return [file_inside(index.parent, name, str(index)) for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that came with a model; raise ModelError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _storage(folder: Path) -> Path:
    """Return where a model's files may lie: its folder; in the Hugging Face cache also the store that snapshots link into."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real


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


def follow_umask(folder: Path) -> None:
    """Give weights the mode of the settings beside them: safetensors lets only their owner read them."""
    mode = next(folder.glob("*.json")).stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def auto_class(hf_config: Any) -> Any:
    """Return what loads the language model of a config: as an image-text model where transformers has no other."""
    import transformers

    kind = type(hf_config)
    images = kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only_images = images and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForImageTextToText if only_images else transformers.AutoModelForCausalLM


def empty_model(hf_config: Any, *, trust_remote_code: bool = False) -> Any:
    """Build the language model of a transformers config without memory for its weights."""
    with torch.device("meta"):
        return auto_class(hf_config).from_config(hf_config, trust_remote_code=trust_remote_code)


def pickle_refusal(origin: str) -> ModelError:
    """Return the error for weights that exist as pickles only."""
    return ModelError(
        f"{origin}: its weights are pickles (.bin), which can hide code; read by torch's restricted reader "
        "with model.allow_pickle=true, or take a revision with safetensors"
    )


def read_names(path: Path) -> list[str]:
    """Return the names of a file's tensors; raise ModelError where it is damaged."""
    if path.suffix != ".safetensors":
        return [name for name, _ in read_tensors(path)]
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged or incomplete: {error}; fetch it again") from error


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's tensors by name, mapped from the disk rather than copied.

    Raises:
        ModelError: the file is damaged, or a pickle that holds anything but tensors.
    """
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
) -> None:
    """Write `files` into `folder` as safetensors shards, each tensor through `rename`; exactly `expected` must result.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape, or the disk is full.
    """

    def renamed() -> Renamed:
        for path in files:
            for name, tensor in read_tensors(path):
                for new, part in rename(name, tensor):
                    if new not in expected:
                        raise ModelError(f"{path}: {name} has no place in this architecture (it would be {new})")
                    if (found := tuple(part.shape)) != expected[new]:
                        raise ModelError(
                            f"{path}: {name} gives {new} of shape {found}; config.json says {expected[new]}"
                        )
                    yield new, part

    try:
        written = _write_shards(renamed(), folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder.parent}: the weights cannot be written ({error}); if the disk is full, make room or choose another one: "
            "model.cache_dir for a conversion, out for an export"
        ) from error
    if missing := sorted(expected.keys() - written):
        raise ModelError(
            f"{folder.name}: the checkpoint lacks {len(missing)} tensors, such as {', '.join(missing[:3])}; "
            "is a shard missing?"
        )


def _write_shards(tensors: Renamed, folder: Path) -> set[str]:
    """Write a file whenever enough tensors have come together, named as transformers expects; return the tensors' names."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    gathered: dict[str, torch.Tensor] = {}
    total = held = 0

    def write() -> None:
        save_file(gathered, folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append([*gathered])
        gathered.clear()

    for name, tensor in tensors:
        if gathered and held + tensor.nbytes > SHARD_BYTES:
            write()
            held = 0
        gathered[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    if gathered:
        write()
    weight_map = {}
    for number, names in enumerate(shards):
        file = SAFE_NAME if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return {*weight_map}
