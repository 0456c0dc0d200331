"""The README of an exported model: what it is, how to load it, what it was measured at; no paths, no secrets."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Any

import yaml

from agentft.errors import RunError
from agentft.model.config import LoraConfig, ModelSource
from agentft.recipes.config import TrainConfig
from agentft.runs import RunFolder, read_json

_PACKAGES = ("agentft", "torch", "transformers", "peft", "bitsandbytes")


def model_card(run: RunFolder, trained: TrainConfig, record: dict[str, Any], step: int, *, adapter_alone: bool) -> str:
    """Return the text of README.md."""
    model = trained.model
    base = model.id or model.huggingface_id or model.modelscope_id or model.wheel or model.name
    if model.source is ModelSource.local:
        base = model.name  # a folder of the machine that trained says nothing to others
    front = {
        "base_model": base,
        "library_name": "peft" if adapter_alone else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["agent", "tool-use", "agentft"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, fine-tuned for tools",
        "",
        f"{'An adapter beside' if adapter_alone else 'A whole model made from'} `{base}`, step {step} of a run of agentft.",
        "Licence and terms are those of the base model" + (f": {model.notes}" if model.notes else "."),
        "",
        *_usage(trained, adapter_alone),
        "",
        *_measured(run, step),
        "## How it was trained",
        "",
        *_table(_facts(trained, record)),
    ]
    return "\n".join(lines) + "\n"


def _usage(trained: TrainConfig, adapter_alone: bool) -> list[str]:
    how = "peft.AutoPeftModelForCausalLM" if adapter_alone else "transformers.AutoModelForCausalLM"
    lines = [
        "## Use",
        "",
        f"Load with `{how}`; the chat template writes the layout of training (`{trained.model.template}`), and",
        "`generation_config.json` stops where training stopped: greedy, at the token that ends a step. A tool's result is a",
        "message of the role `tool`.",
    ]
    if trained.model.template == "msagent":
        lines += [
            "The tools stand in the system text as a numbered list of JSON, and calls come between `<|startofthink|>` and",
            '`<|endofthink|>`. Where a server offers stop texts, give it `"<|startofexec|>"`.',
        ]
    return lines


def _measured(run: RunFolder, step: int) -> list[str]:
    """What the run measured at its end; nothing for a checkpoint of another step."""
    try:
        metrics = read_json(run.metrics("after"))["metrics"]
        if read_json(run.summary_file)["steps"] != step:
            return []
    except (RunError, KeyError):
        return []
    rows = {
        name: f"{values['value']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
        for name, values in metrics.items()
        if all(isinstance(values.get(key), int | float) for key in ("value", "low", "high"))
    }
    return ["## Measured on held-out conversations", "", "With 95 % intervals.", "", *_table(rows), ""] if rows else []


def _facts(trained: TrainConfig, record: dict[str, Any]) -> dict[str, str]:
    training = trained.training
    sft = {key: _plain(value) for key, value in asdict(trained.sft_type).items() if key != "default_learning_rate"}
    if isinstance(trained.sft_type, LoraConfig):
        sft["targets"] = ", ".join(trained.sft_type.targets or trained.model.lora_targets)
    packages = record.get("packages", {})
    return {
        "method": ", ".join(f"{key} {value}" for key, value in sft.items()),
        "base": f"fingerprint {record['model_fingerprint'][:16]}, commit {record.get('model_commit') or 'none'}",
        "data": f"{trained.dataset.name}, fingerprint {record['data_fingerprint'][:16]}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule.value}",
        "conversations a step": f"{training.micro_batch} x {training.accumulation}",
        "longest": f"{trained.dataset.max_length} tokens",
        "dtype": str(record["dtype"]),
        "seed": str(trained.seed),
        "packages": ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name)),
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
