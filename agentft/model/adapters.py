"""Choose what is trained: adapters on a frozen model, its last blocks, or the model itself.

PiSSA's paper, and peft, take s B0 A0 out of the frozen weight. Here a second, frozen adapter takes it out: y = W x + s B A x -
s B0 A0 x. So W keeps its bits, and a checkpoint holds both adapters: singular vectors differ from one machine to the next.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from agentft.errors import ConfigError
from agentft.model.config import (
    ALL_LINEAR,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    LoraStart,
    ModelConfig,
    QloraConfig,
    SftConfig,
)
from agentft.model.fused import LigerKernels, fuse_layers
from agentft.model.quantization import dense_weight

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

START = "start"
"""Name of the frozen adapter, -B0 A0."""

_ITERATIONS = 16
"""Subspace iterations; the paper finds 4 enough to train as well as with exact vectors."""

_SEED = 20240403


def train_last_blocks(model: Any, sft: FreezeConfig) -> Any:
    """Freeze `model` but for what `sft` names, which becomes fp32; raise ConfigError where it has fewer blocks."""
    blocks, norm = decoder_blocks(model)
    if sft.layers > len(blocks):
        raise ConfigError(f"sft_type.layers={sft.layers}: the model has {len(blocks)} blocks; sft_type=full trains all")
    chosen = list(blocks[len(blocks) - sft.layers :])
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if sft.embeddings:
        chosen.append(embeddings)
    if sft.head:
        chosen += [norm, head]
    model.requires_grad_(False)
    for module in chosen:
        module.float().requires_grad_(True)
    for module in (*blocks, norm, head):
        # Where there is no autocast, bf16 would meet fp32.
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    return model


def decoder_blocks(model: Any) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """Return the blocks of a decoder and the norm behind them, whatever they are called; no blocks where it has no list."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for part in model.get_decoder().modules():
        children = list(part.children())
        for at, child in enumerate(children):
            if isinstance(child, torch.nn.ModuleList) and len(child) == depth:  # the outermost: experts lie in layers
                norms = (each for each in children[at + 1 :] if any(True for _ in each.parameters()))
                return list(child), next(norms, torch.nn.Identity())
    return [], torch.nn.Identity()


def _cast_inputs(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand a module its input in its own dtype."""
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):  # cosines and sines of the positions
            return tuple(cast(item) for item in value)
        return value.to(dtype) if getattr(value, "is_floating_point", bool)() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def is_start(name: str) -> bool:
    """Return whether a parameter of this name belongs to the frozen adapter."""
    return f".{START}." in name


def begin_with_principal_part(model: Any, sft: LoraConfig) -> None:
    """Set the adapters of a peft model to the principal parts of their weights, and add the frozen ones.

    Raises:
        ConfigError: `sft_type.rank` exceeds the rank that a weight can have.
    """
    config = model.peft_config["default"]
    model.add_adapter(START, type(config)(**{**config.to_dict(), "lora_dropout": 0.0}))
    model.base_model.set_adapter(["default", START])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(_SEED)
        for name, layer in model.named_modules():
            if START not in getattr(layer, "lora_A", {}):
                continue
            a_RI, b_OR = _principal_part(name, dense_weight(layer.get_base_layer()), sft)
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)
            layer.lora_A[START].weight.copy_(a_RI)
            layer.lora_B[START].weight.copy_(-b_OR)
    for name, parameter in model.named_parameters():
        if is_start(name):
            parameter.requires_grad_(False)


def _principal_part(name: str, weight_OI: torch.Tensor, sft: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A `[R, I]` and B `[O, R]` with s B A the best approximation of the weight at that rank."""
    if sft.rank > min(weight_OI.shape):
        raise ConfigError(f"sft_type.rank={sft.rank}: {name} has rank {min(weight_OI.shape)} at most")
    columns = min(2 * sft.rank, *weight_OI.shape)
    u_OR, sizes_R, v_IR = torch.svd_lowrank(weight_OI, q=columns, niter=_ITERATIONS)
    roots_R = (sizes_R[: sft.rank] / sft.scaling).sqrt()
    return (v_IR[:, : sft.rank] * roots_R).T.contiguous(), (u_OR[:, : sft.rank] * roots_R).contiguous()


def attach_lora(model: Any, sft: LoraConfig, model_config: ModelConfig) -> Any:
    """Freeze `model` and put adapters beside what `sft.targets` names.

    Raises:
        ConfigError: nothing has such a name, or peft does not adapt it.
    """
    from peft import get_peft_model

    targets = find_targets(model, sft, model_config)
    if targets.left:
        log.warning("peft cannot adapt quantised weights of this architecture in %s: left as they are", targets.left)
    try:
        adapted = get_peft_model(model, peft_config(sft, targets))
    except ValueError as error:  # a layer that the library does not adapt in this architecture
        raise ConfigError(f"{_setting(sft)}: {error}") from error
    if targets.parameters and sft.dropout:
        _drop_inputs_of_layers(adapted, sft.dropout)
        log.info("sft_type.dropout=%g for layers; adapters of experts have none, since peft adds them up", sft.dropout)
    if sft.start is LoraStart.pissa:
        begin_with_principal_part(adapted, sft)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if sft.start is not LoraStart.pissa:
        _draw(adapted)
    return adapted


def _setting(sft: LoraConfig) -> str:
    """Return the setting that names the layers."""
    return "model.lora_targets" if sft.targets is None else "sft_type.targets"


def _drop_inputs_of_layers(adapted: Any, dropout: float) -> None:
    """Give layers their dropout where peft was told none, as it has to be beside adapted parameters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for module in adapted.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)


def _draw(adapted: Any) -> None:
    """Draw A anew as peft does, but in fp32 on the CPU: dtype and device of the layer beside it decide nothing."""
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight_RI = module.lora_A["default"].weight
            drawn_RI = torch.nn.init.kaiming_uniform_(torch.empty(weight_RI.shape), a=math.sqrt(5))
            weight_RI.data.copy_(drawn_RI)


@dataclass(frozen=True, slots=True)
class Targets:
    """What adapters stand beside."""

    layers: dict[str, torch.nn.Module]
    """Linear layers by their names in the model."""
    parameters: dict[str, torch.nn.Parameter]
    """Parameters that are no linear layer, such as the experts of a layer in one tensor `[experts, ., .]`."""
    modules: list[str]
    """Ends of names that stand for `layers` alone: peft's `target_modules`."""
    parameter_ends: list[str]
    """The same of `parameters`: peft's `target_parameters`."""
    left: str = ""
    """Layers that were asked for and cannot be adapted here."""


def peft_config(sft: LoraConfig, targets: Targets) -> Any:
    """Return peft's settings for adapters as `sft` says."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType
    from transformers.pytorch_utils import Conv1D

    return PeftLoraConfig(
        r=sft.rank,
        lora_alpha=sft.alpha,
        lora_dropout=0.0 if targets.parameters else sft.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameter_ends or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.layers.values()),
        bias="none",
        use_rslora=sft.rslora,
        use_dora=sft.dora,
        task_type=TaskType.CAUSAL_LM,
    )


def find_targets(model: Any, sft: LoraConfig, model_config: ModelConfig) -> Targets:
    """Find what `sft.targets`, or else the model's `lora_targets`, stands for; weights are not looked at.

    An entry is the end of a path, of one or more parts: of linear layers or of other parameters in the decoder, or the output
    head. `all-linear` is every linear layer and every expert but the head, the routers, and layers whose adapter would not
    train.

    Raises:
        ConfigError: nothing has such a name, its adapter would not train, or the method cannot adapt it.
    """
    wanted, setting = sft.targets or model_config.lora_targets, _setting(sft)
    layers, parameters = _adaptable(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    holders = Counter(map(id, every.values()))
    useless = {name: reason for name in layers if (reason := _useless(model, name, holders))}
    head = model.get_output_embeddings()
    if wanted == [ALL_LINEAR]:
        chosen = {n for n, layer in layers.items() if layer is not head and not _is_router(n)}
        experts = {name for name in parameters if is_expert(model, name)}
    else:
        chosen, experts = _named(layers, wanted), _named(parameters, wanted)
        if unknown := [end for end in wanted if not _named([*layers, *parameters], [end])]:
            others = (name for name, layer in layers.items() if layer is not head)
            known = sorted({name.rpartition(".")[2] for name in others})
            known += sorted({".".join(n.split(".")[-2:]) for n in parameters if is_expert(model, n)})
            raise ConfigError(
                f"{setting}: no linear layer or expert is called {', '.join(unknown)}; model={model_config.name} has: "
                f"{', '.join(known)}, or {ALL_LINEAR}"
            )
        for end in wanted:
            if (found := _named(layers, [end])) and found <= useless.keys():
                reason = useless[min(found)]
                raise ConfigError(
                    f"{setting}: {end} of model={model_config.name} {reason}; leave it out, or take {ALL_LINEAR}"
                )
    chosen -= useless.keys()
    own_names = {name.rpartition(".")[2] for name in chosen}
    taken = _named(chosen, (name for name in own_names if _is_taken_by_peft(model, name)))
    chosen, left = chosen - taken, ""
    if isinstance(sft, QloraConfig):
        left = ", ".join(sorted({name.rpartition(".")[2] for name in taken}))
    else:
        experts |= {f"{name}.weight" for name in taken}
    if experts and (sft.dora or sft.start is LoraStart.pissa):
        option = "sft_type.dora=true" if sft.dora else "sft_type.start=pissa"
        raise ConfigError(
            f"{option}: {', '.join(_ends(experts, (), 2)[:3])} of model={model_config.name} take plain adapters only; name "
            "other layers in sft_type.targets"
        )
    return Targets(
        {name: layers[name] for name in layers if name in chosen},
        {name: every[name] for name in every if name in experts},
        _ends(chosen, (name for name, _ in model.named_modules() if name not in chosen)),
        _ends(experts, (name for name in every if name not in experts), 2),
        left,
    )


def _adaptable(model: Any) -> tuple[dict[str, torch.nn.Module], dict[str, torch.nn.Parameter]]:
    """Return by name the decoder's linear layers with the head, and its other parameters of 2 or 3 axes.

    A vision tower beside the decoder never runs on text.
    """
    from transformers.pytorch_utils import Conv1D

    inside = {*model.get_decoder().modules(), model.get_output_embeddings()}
    layers, parameters = {}, {}
    for name, module in model.named_modules():
        if module not in inside or isinstance(module, torch.nn.Conv1d | torch.nn.Embedding):
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            layers[name] = module
        else:
            own = module.named_parameters(recurse=False)
            parameters.update({f"{name}.{each}": tensor for each, tensor in own if tensor.ndim in (2, 3)})
    return layers, parameters


def _named(names: Iterable[str], ends: Iterable[str]) -> set[str]:
    """Return the names whose last dotted parts are one of `ends`."""
    dotted = tuple(f".{end}" for end in ends)
    return {name for name in names if f".{name}".endswith(dotted)}


def _ends(chosen: set[str], others: Iterable[str], parts: int = 1) -> list[str]:
    """Return the shortest ends of names, of at least so many parts, that all `chosen` have and no other has, sorted."""
    ends, apart, left = set(), [name.split(".") for name in others], {name: name.split(".") for name in chosen}
    while left:
        taken = {tuple(name[-parts:]) for name in apart}
        for name in [n for n, path in left.items() if tuple(path[-parts:]) not in taken or parts >= len(path)]:
            ends.add(".".join(left.pop(name)[-parts:]))
        parts += 1
    return sorted(ends)


def is_expert(model: Any, name: str) -> bool:
    """Return whether a parameter holds the weights of several experts."""
    module, _, own = name.rpartition(".")
    owner = model.get_submodule(module)
    return getattr(owner, own).ndim == 3 and "expert" in f"{module}.{type(owner).__name__}".lower()


def _is_router(name: str) -> bool:
    """Return whether a layer scores the experts, or weighs a shared one."""
    return any("router" in part or part in ("gate", "shared_expert_gate") for part in name.split("."))


def _useless(model: Any, name: str, holders: Mapping[int, int]) -> str | None:
    """Return why an adapter beside this layer would not do what it is for, or None; `holders` counts a parameter's names."""
    parent, _, own = name.rpartition(".")
    block: Any = model.get_submodule(parent)
    if hasattr(block, "A_log") and _hands_on_weight(block.__class__, own):
        return "hands its bare weight to a kernel, which would not see the adapter"
    if holders[id(model.get_submodule(name).weight)] > 1:
        return "shares its weight with another layer, which a merged adapter would change too"
    return None


@cache
def _hands_on_weight(block: Any, layer: str) -> bool:
    """Return whether the code of a state-space block uses the weight of a layer without calling the layer."""
    return re.search(rf"self\.{layer}\.weight\b(?!\.(dtype|device|shape))", inspect.getsource(block)) is not None


def _is_taken_by_peft(model: Any, name: str) -> bool:
    """Return whether peft takes a layer's name for that of experts, since an older transformers called them so.

    Layers of that name, such as those of a shared expert, are adapted by the parameter they hold.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    trial = PeftLoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # it takes some names only together
        return True
    return name not in trial.target_modules


def write_adapter(
    state: dict[str, torch.Tensor],
    sft: LoraConfig,
    peft_settings: Any,
    folder: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Write an adapter, by its names in training, as peft reads it; a PiSSA start is folded into twice the rank.

    Args:
        peft_settings: those of this training, from `peft_config`.
        base: what peft loads the model from.
        revision: of that base on its hub.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = plain_adapter_state(state)
    save_file({k: v.contiguous() for k, v in plain.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(peft_settings)
    config.target_modules, config.target_parameters = sorted(config.target_modules), config.target_parameters or None
    if sft.start is LoraStart.pissa:
        # Twice the rank with the same factor: alpha / r, or alpha / sqrt(r).
        config.r, config.lora_alpha = 2 * sft.rank, sft.alpha * (math.sqrt(2) if sft.rslora else 2)
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))


def plain_adapter_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by peft's names, each joined with its frozen one: [B, -B0] [A; A0], scaled as before."""
    plain = {}
    for name, tensor in state.items():
        if is_start(name):
            continue
        start = state.get(name.replace(".default.", f".{START}.")) if ".default." in name else None
        if start is not None:
            tensor = torch.cat([tensor, start], 0 if ".lora_A." in name else 1)
        name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
        plain[name.replace(".default.", ".")] = tensor
    return plain


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({self.trained / self.total:.2%})"


def prepare_for_training(
    model: Any,
    sft: SftConfig,
    model_config: ModelConfig,
    liger: LigerKernels | None = None,
    *,
    cast: bool = True,
) -> torch.nn.Module:
    """Make `model` trainable as `sft` says, with the leaner layers of `fused.py`; what is trained is kept in fp32.

    Without `cast` a full fine-tuning leaves the weights as they were loaded, for an engine that casts its shards.

    Raises:
        ConfigError: the model has no such layers.
    """
    match sft:
        case LoraConfig():
            trainable = attach_lora(model, sft, model_config)
        case FullConfig():
            trainable = model.float() if cast else model
            trainable.requires_grad_(True)
        case FreezeConfig():
            trainable = train_last_blocks(model, sft)
        case _:
            raise ConfigError(f"sft_type={sft.name}: unknown")
    fuse_layers(trainable, liger, adapted=isinstance(sft, LoraConfig))
    if isinstance(sft, LoraConfig):
        _log_adapters(trainable, sft)
    module: torch.nn.Module = trainable
    return module


def _log_adapters(adapted: Any, sft: LoraConfig) -> None:
    """Log how many decoder layers have an adapter, warn of what the others are made of, and name what keeps peft's forward."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    unfused = sum(isinstance(module, LoraLayer) and "forward" not in vars(module) for module in adapted.modules())
    if unfused:
        reasons = {
            "DoRA": sft.dora,
            "a PiSSA start": sft.start is LoraStart.pissa,
            "a quantised base": isinstance(sft, QloraConfig),
            "experts": any(isinstance(module, ParamWrapper) for module in adapted.modules()),
        }
        told = ", ".join(reason for reason, holds in reasons.items() if holds) or "unsupported shape"
        log.info("%d LoRA layers use PEFT's forward (%s)", unfused, told)
    model = adapted.get_base_model()
    layers, _ = decoder_blocks(model)
    missed = [layer for layer in layers if not any(isinstance(module, LoraLayer) for module in layer.modules())]
    count = count_parameters(adapted)
    reached = f"adapters in {len(layers) - len(missed)} of {len(layers)} layers"
    log.info("%s, %s of %s parameters", reached, f"{count.trained:,}", f"{count.total:,}")
    if not missed:
        return
    parts: dict[str, set[str]] = defaultdict(set)
    for module in (module for layer in missed for module in layer.modules()):
        linear = (name for name, child in module.named_children() if isinstance(child, torch.nn.Linear))
        parts[type(module).__name__].update(linear)
    told = ", ".join(f"{part} ({', '.join(sorted(names))})" for part, names in sorted(parts.items()) if names)
    log.warning(
        "%s: the others stay as they are; they have %s; sft_type.targets names what is adapted",
        *(reached, told or "no linear layer"),
    )


def rate_factors(sft: SftConfig) -> Mapping[str, float]:
    """Return by part of a parameter's name what its learning rate is over the others'; empty: all alike."""
    if isinstance(sft, LoraConfig) and sft.learning_rate_ratio != 1.0:
        return {".lora_B.": sft.learning_rate_ratio}
    return {}


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count parameters, tied ones once."""
    parameters = list(model.parameters())
    return ParameterCount(
        trained=sum(p.numel() for p in parameters if p.requires_grad), total=sum(p.numel() for p in parameters)
    )


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return by name, sharing memory with the model, what a checkpoint keeps: all that the files of the model do not hold."""
    return {name: p.detach() for name, p in kept_parameters(model).items()}


def kept_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return by name the parameters that a checkpoint keeps: the trained ones, and the frozen start of a PiSSA adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or is_start(name)}


def load_trained_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the model; raise ConfigError unless it trains exactly those."""
    current = kept_parameters(model)
    require_same_parameters({name: tuple(p.shape) for name, p in current.items()}, state)
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(state[name])


def require_same_parameters(current: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor]) -> None:
    """Raise ConfigError for saved weights that are not those of the kept parameters, given by name and shape."""
    if current.keys() != state.keys():
        odd = sorted(current.keys() ^ state.keys())
        raise ConfigError(f"the saved weights train other parameters than this model: {', '.join(odd[:4])} ...")
    for name, shape in current.items():
        if shape != tuple(state[name].shape):
            raise ConfigError(f"{name}: saved shape {tuple(state[name].shape)}, this model has {shape}")


def save_final(
    model: Any, sft: SftConfig, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter (or the whole model) as safetensors with its tokenizer, loadable without agentft.

    `weights` are the parameters by name (of an adapter the kept ones), where the model holds them in shards.
    """
    if isinstance(sft, LoraConfig):
        state = {name: t.cpu() for name, t in (trained_state(model) if weights is None else weights).items()}
        config = model.peft_config["default"]
        write_adapter(state, sft, config, folder, base=config.base_model_name_or_path)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
