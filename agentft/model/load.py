"""Load a model: from its settings to a folder, a tokenizer and weights on a device, with the choices made said aloud."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.cache import build_once, cache_root
from agentft.data.template_choice import Layout, choose_template, stop_tokens
from agentft.data.tokens import SegmentEncoder
from agentft.errors import ModelError
from agentft.model import conversion, cuda
from agentft.model.config import (
    Attention,
    Dtype,
    KernelChoice,
    LoraConfig,
    ModelConfig,
    ModelSource,
    RandomShape,
    RewrittenHistory,
    SftConfig,
)
from agentft.model.conversion import needs_conversion
from agentft.model.cpu import attention as tiled_attention
from agentft.model.cpu.native import Kernels, load_kernels
from agentft.model.cuda import INSTALL as LIGER_INSTALL
from agentft.model.cuda import LigerKernels, load_liger
from agentft.model.file_names import read_json
from agentft.model.hub import FetchedModel, download_huggingface, download_modelscope, fetch_settings
from agentft.model.hub_clients import HuggingFace, ModelScope
from agentft.model.labelled_loss import causal_model
from agentft.model.quantization import import_peft, keep_weights_as_quantized, quantization_config
from agentft.model.random_weights import random_folder
from agentft.model.shards import holds_weights, weight_files
from agentft.model.wheel import converted_folder
from agentft.runtime import Device, computes_in_bf16

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SETTINGS_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files whose fields can make a loader import code."""

_ALWAYS = ("model_file", "custom_generate", "custom_pipelines")
"""Fields that exist to name code."""

_KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")
"""Endings of fields that choose a kernel; a name with a slash is fetched from a hub and run."""


def check_remote_code(folder: Path, *, trusted: bool) -> None:
    """Refuse a model that wants to bring its own Python code, unless it is `trusted`.

    An `auto_map` is no reason where transformers or a conversion knows the architecture: then the code beside the
    weights is never imported.

    Raises:
        ModelError: naming the file, the field and the setting.
    """
    config = folder / "config.json"
    known = config.is_file() and _is_known(read_json(config))
    for name in SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        for field, value in _fields_naming_code(read_json(path)):
            if field == "auto_map" and known and not trusted:
                log.info("%s: auto_map is ignored; the code beside the weights is not needed", path)
                continue
            if not trusted:
                raise ModelError(
                    f"{path}: {field} is {str(value)[:80]!r}: the model wants to run Python code that comes with it; "
                    "refused. If you have read that code and trust it: model.trust_remote_code=true"
                )
            log.warning("%s: %s=%s: Python code that came with the model will run", path, field, value)


def _is_known(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return needs_conversion(config) or config.get("model_type") in CONFIG_MAPPING_NAMES


def _fields_naming_code(value: Any) -> Iterator[tuple[str, Any]]:
    """Every field, however deep, that names code: without recursion, since the depth is the file's choice."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                for field, inner in fields.items():
                    if _names_code(str(field), inner):
                        yield str(field), inner
                    waiting.append(inner)
            case list() as items:
                waiting.extend(items)


def _names_code(field: str, value: Any) -> bool:
    if field == "auto_map" or field in _ALWAYS:
        return bool(value)
    return field.endswith(_KERNELS) and ("/" in str(value) or "kernel_config" in field) and bool(value)


_KERNEL_NEEDS = {
    KernelChoice.compiled: "model.kernels=compiled needs adapters, bf16, a CPU and a C compiler (cc, or the one that CC names)",
    KernelChoice.liger: f"model.kernels=liger needs a CUDA device and the package: {LIGER_INSTALL}",
}
_OURS = (tiled_attention.NAME, cuda.NAME)
_TORCH_NAMES = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32"}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on the local disk."""

    folder: Path
    fingerprint: str
    """Digest over settings, tokenizer and the headers of the weight files."""
    commit: str | None = None
    """What the asked revision stood for on the hub; None where there is none."""
    converted: bool = False
    """Rewritten from an old layout: the source itself cannot be loaded."""


def locate_model(config: ModelConfig) -> ModelFiles:
    """Find or fetch the model's files.

    Raises:
        ModelError: a setting that the source needs is missing, or the source has no such model.
    """
    commit = None
    match config.source:
        case ModelSource.wheel:
            folder = converted_folder(_needed(config, "wheel"), config.cache_dir)
        case ModelSource.modelscope | ModelSource.huggingface:
            fetched = _fetch(config)
            folder, commit = fetched.folder, fetched.commit
        case ModelSource.random:
            folder = _random(config)
        case ModelSource.local:
            folder = Path(config.id or _needed(config, "path")).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(f"model.path={folder}: expected a folder with config.json, weights and tokenizer")
    check_remote_code(folder, trusted=config.trust_remote_code)
    weight_files(folder, allow_pickle=config.allow_pickle)
    converted = conversion.needs_conversion(read_json(folder / "config.json"))
    if converted:
        folder = conversion.converted_folder(
            folder,
            fingerprint=fingerprint(folder),
            context=config.context,
            cache_dir=config.cache_dir,
            allow_pickle=config.allow_pickle,
        )
    return ModelFiles(folder, fingerprint(folder), commit, converted)


def _fetch(config: ModelConfig) -> FetchedModel:
    download, field = {
        ModelSource.modelscope: (download_modelscope, "modelscope_id"),
        ModelSource.huggingface: (download_huggingface, "huggingface_id"),
    }[config.source]
    return download(
        config.id or _needed(config, field),
        config.revision,
        config.cache_dir,
        offline=config.offline,
        allow_pickle=config.allow_pickle,
        trust_remote_code=config.trust_remote_code,
    )


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of the model's config.json; of a model on a hub nothing else is fetched.

    Raises:
        ModelError: see `locate_model`.
    """
    match config.source:
        case ModelSource.modelscope | ModelSource.huggingface:
            hub = ModelScope() if config.source is ModelSource.modelscope else HuggingFace()
            model_id = config.id or _needed(config, f"{config.source}_id")
            return fetch_settings(hub, model_id, config.revision, config.cache_dir, config.offline)
        case _:
            return read_json(locate_model(config).folder / "config.json")


def load_tokenizer(files: ModelFiles, config: ModelConfig) -> Any:
    """Load the tokenizer; it must be a fast one, since labels are found by the Rust tokenizer.

    Raises:
        ModelError: the folder has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    there = {path.name for path in files.folder.iterdir()}
    if "tekken.json" in there and not there & {"tokenizer.json", "tokenizer.model"}:
        raise ModelError(
            f"{files.folder}: tekken.json is the only tokenizer there, and is not read; take a repository of this model that "
            "has a tokenizer.json"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{files.folder}: cannot load the tokenizer: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{files.folder}: {type(tokenizer).__name__} is no fast tokenizer (no tokenizer.json)")
    return tokenizer


def resolve_dtype(requested: Dtype, device: Device) -> Dtype:
    """Return what is asked for, with `auto` as bf16 where the device computes in it, else fp32."""
    if requested is not Dtype.auto:
        return requested
    return Dtype.bf16 if computes_in_bf16(device) else Dtype.fp32


def choose_dtype(requested: Dtype, device: Device) -> torch.dtype:
    """Resolve `auto` to bf16 where the device computes in it, else fp32, and say which."""
    chosen = resolve_dtype(requested, device)
    if requested is Dtype.auto:
        log.info("model.dtype=auto: %s on %s", chosen, device.name)
    return torch_dtype(chosen)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return torch's own name of a number format, `auto` excepted."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH_NAMES[dtype])
    return found


def choose_attention(requested: Attention, device: Device, dtype: torch.dtype) -> str:
    """Resolve the attention setting to a name that transformers knows, and say which `auto` took.

    Raises:
        ModelError: `flash` or `flex` was asked for and cannot run here.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    fits = device.is_cuda and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available()
    match requested:
        case Attention.flash if not fits:
            raise ModelError(
                "model.attention=flash needs a CUDA device, bf16 or fp16, and the package: "
                "pip install --no-build-isolation flash-attn; model.attention=auto takes the fastest that is there"
            )
        case Attention.flash:
            return "flash_attention_2"
        case Attention.tiled:
            tiled_attention.register()
            return tiled_attention.NAME
        case Attention.flex:
            return cuda.register(device)
        case Attention.auto if not device.is_cuda and dtype is torch.bfloat16:
            log.info("model.attention=auto: tiled")
            return choose_attention(Attention.tiled, device, dtype)
        case Attention.auto:
            name = "flash_attention_2" if fits else "sdpa"
            log.info("model.attention=auto: %s", name)
            return name
        case _:
            return str(requested)


def choose_kernels(
    config: ModelConfig, sft: SftConfig, device: Device, dtype: torch.dtype
) -> Kernels | LigerKernels | None:
    """Load the row-wise functions that serve on this device, or None for torch's, and say what `auto` took.

    Raises:
        ModelError: `compiled` or `liger` was asked for and cannot run here.
    """
    asked = config.kernels
    if asked is KernelChoice.torch:
        return None
    wanted = asked
    if asked is KernelChoice.auto:
        wanted = KernelChoice.liger if device.is_cuda else KernelChoice.compiled
    kernels = _liger(device) if wanted is KernelChoice.liger else _compiled(config, sft, device, dtype)
    if asked is KernelChoice.auto:
        if device.is_cuda or _compiled_fits(sft, device, dtype):
            log.info("model.kernels=auto: %s", "torch" if kernels is None else wanted)
    elif kernels is None:
        raise ModelError(_KERNEL_NEEDS[asked] + "; model.kernels=auto takes torch where one of them is missing")
    return kernels


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a model is computed, chosen before anything is loaded."""

    device: Device
    dtype: torch.dtype
    attention: str
    """What transformers knows the attention by."""
    kernels: Kernels | LigerKernels | None
    """What computes row-wise parts in torch's place, where it serves."""
    quantization: Any
    """What transformers needs to load weights quantised, or None."""


def choose_compute(config: ModelConfig, sft: SftConfig, device: Device, *, compiles: bool = False) -> Compute:
    """Choose number format, attention and kernels for `device`, and say what each `auto` took.

    Args:
        compiles: torch's compiler will run over each block, so that no kernels of ours are loaded.

    Raises:
        ModelError: something that was asked for cannot run here.
    """
    import_peft()
    dtype = choose_dtype(config.dtype, device)
    attention = choose_attention(config.attention, device, dtype)
    quantization = quantization_config(sft, dtype)
    kernels = None if compiles else choose_kernels(config, sft, device, dtype)
    return Compute(device, dtype, attention, kernels, quantization)


def _liger(device: Device) -> LigerKernels | None:
    return load_liger() if device.is_cuda else None


def _compiled(config: ModelConfig, sft: SftConfig, device: Device, dtype: torch.dtype) -> Kernels | None:
    return load_kernels(config.cache_dir) if _compiled_fits(sft, device, dtype) else None


def _compiled_fits(sft: SftConfig, device: Device, dtype: torch.dtype) -> bool:
    import torch

    return device.kind == "cpu" and dtype is torch.bfloat16 and isinstance(sft, LoraConfig)


def choose_layout(config: ModelConfig, tokenizer: Any) -> Layout:
    """Return the layout that `config` names for a model with this tokenizer.

    Raises:
        ConfigError: there is none of that name, or the tokenizer lacks what it needs.
    """
    stable = config.rewritten_history is RewrittenHistory.stable
    return choose_template(config.template, tokenizer, config.stop_token, config.template_args, stable=stable)


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A model without its weights: what conversations become text and ids with."""

    files: ModelFiles
    tokenizer: Any
    template: Layout
    encoder: SegmentEncoder

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Of the tokens that end an answer."""
        return tuple(self.encoder.special_id(token) for token in stop_tokens(self.template))

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is masked in attention and loss by position, never by id."""
        pad_id: int | None = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad_id is None else pad_id


def load_chat_tokenizer(config: ModelConfig) -> ChatTokenizer:
    """Find or fetch the model's files, and load its tokenizer and chat template.

    Raises:
        ModelError: see `locate_model` and `load_tokenizer`.
        ConfigError: see `choose_layout`.
    """
    files = locate_model(config)
    tokenizer = load_tokenizer(files, config)
    return ChatTokenizer(files, tokenizer, choose_layout(config, tokenizer), SegmentEncoder(tokenizer))


def load_model(
    files: ModelFiles,
    config: ModelConfig,
    *,
    device: Device,
    dtype: torch.dtype | None,
    attention: str,
    quantization: Any = None,
) -> torch.nn.Module:
    """Load the weights in `dtype` onto `device`, in evaluation mode; `quantization` from `quantization_config`.

    An `attention` that the model's own code does not know leaves it with eager attention, or with the only one it has.
    With `dtype` None they keep the files' own. On a CPU they are then the mapped files: no copy is made, what is not
    touched is not read, and all processes of a machine share the pages.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantized = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device.kind}}

    def load(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=dtype or "auto",
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            **quantized,
        )

    # Models that do not ask transformers' interface would take our names for others of theirs, or end in a KeyError.
    ours = attention in _OURS
    try:
        try:
            model = load("eager" if ours else attention)
        except (KeyError, AttributeError, ImportError, ValueError):
            if ours or attention == "eager":
                raise
            model = load("eager")
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"{files.folder}: cannot load the model: {error}") from error
    if ours:
        with suppress(ValueError):
            take_attention(model, attention)
    # Packed or padded training rows must never meet a cache; generation passes its own.
    model.config.use_cache = False
    if quantization is None:
        model = model.to(device.kind)
    keep_weights_as_quantized(model)
    module: torch.nn.Module = model.eval()
    return module


def take_attention(model: torch.nn.Module, name: str) -> str:
    """Let the model compute attention as transformers knows it by `name`, and return what it takes.

    Raises:
        ValueError: transformers knows that the model cannot.
    """
    from transformers.utils import logging as transformers_logging

    causal = causal_model(model)
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of what it does not set, which the caller sees
    try:
        if name in _OURS:
            # Ours compute what torch's kernels do: not for models whose attention these cannot, with sinks or capped scores.
            causal.set_attn_implementation("sdpa")
        causal.set_attn_implementation(name)
    finally:
        transformers_logging.set_verbosity(said)
    return tiled_attention.attention_of(causal)


def fingerprint(folder: Path) -> str:
    """Digest over a model folder: small files whole, weight files by name, size and safetensors header."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(length, 100_000_000)))
        elif path.suffix == ".bin":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
        elif path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and path.is_file():
            digest.update(path.name.encode() + b":" + path.read_bytes())
    return digest.hexdigest()


def _random(config: ModelConfig) -> Path:
    shape = config.shape or RandomShape()
    key = hashlib.sha256(json.dumps([vars(shape), config.context, 2]).encode()).hexdigest()[:16]
    target = cache_root(config.cache_dir) / "models" / f"random-{key}"
    return build_once(target, lambda folder: random_folder(shape, config.context, folder), is_whole=holds_weights)


def _needed(config: ModelConfig, field: str) -> str:
    value = getattr(config, field)
    if not value:
        either = "" if field == "wheel" else "model.id or "
        raise ModelError(f"model.source={config.source} needs {either}model.{field}; model={config.name} has none")
    return str(value)
