"""Print `--help`: groups and their options, examples, flags, settings."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agentft.config.compose import compose, conf_dir, options
from agentft.config.settings import settings
from agentft.recipes.saved import ROOTS, SCHEMAS

_EXAMPLES = {
    "train": """\
  python train.py                                        a small model on synthetic conversations, minutes on a laptop
  python train.py sft_type.rank=16 training.epochs=2     other values, by their dotted names
  python train.py dataset=local dataset.path=my.jsonl    your own conversations
  python train.py experiment=msagent_7b_lora             a whole setting from conf/experiment/
  python train.py -m sft_type.rank=4,16 training.learning_rate=1e-4,3e-4     a sweep, 2 x 2 jobs
  python train.py --config-dir sweeps --config-name lora_rank_lr             a sweep from a file
  python train.py --config-dir runs/<run> --config-name config               a finished run again, in a new folder
  python train.py run_dir=runs/<run>                     resume an interrupted run, by its own settings
""",
    "evaluate": """\
  python evaluate.py run=runs/<run>                      the final weights of a run
  python evaluate.py run=runs/<run> checkpoint=best evaluation.conversations=50
""",
    "export": """\
  python -m agentft.export run=runs/<run>                        a whole model, for transformers, vLLM and the hubs
  python -m agentft.export run=runs/<run> merge=false out=mine   the adapter alone
  python -m agentft.export run=runs/<run> push=modelscope:owner/name         and upload it, private unless private=false
""",
    "audit": """\
  python -m agentft.audit dataset=local dataset.path=my.jsonl     what is in it, what is trained, what is wrong
  python -m agentft.audit dataset=local dataset.path=my.jsonl view=<id>       one conversation with its labels
  python -m agentft.audit dataset=local dataset.path=my.jsonl audit.fail_on=[unknown_tool,unreadable_call]
Exit code 0: all is well; 3: an invariant is broken, or a finding of audit.fail_on was made.
""",
}


_AS_MODULES = {"audit": "-m agentft.audit", "export": "-m agentft.export"}
"""Entry points inside the package, and how they are started."""


def help_text(program: str, config_name: str, config_dir: str | None = None, *, every: bool = False) -> str:
    """Return what `--help` prints; `every` lists the advanced settings and those of all options, too."""
    folders = [conf_dir()] + ([Path(config_dir)] if config_dir is not None else [])
    chosen: dict[str, str] = {}
    for entry in yaml.safe_load((conf_dir() / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            chosen.update({group.removeprefix("optional "): option for group, option in entry.items()})
    started = f"python {_AS_MODULES.get(config_name, program)}" if program.endswith(".py") else program
    lines = [f"usage: {started} [flags] [group=option ...] [setting=value ...]", ""]
    lines.append("Groups and their options (* is the default):")
    for group, default in chosen.items():
        for i, option in enumerate(options(group, folders)):
            path = next(p for folder in folders if (p := folder / group / f"{option}.yaml").is_file())
            star = "*" if option == default else " "
            words = textwrap.shorten(_first_sentence(path), 80, placeholder=" ...")
            lines.append(f"  {group if i == 0 else '':<12} {star}{option:<20} {words}")
    examples = _EXAMPLES.get(config_name, "").rstrip()
    if not program.endswith(".py"):
        examples = re.sub(r"python (-m agentft\.|)(\w+)(\.py|)(?= )", r"agentft-\2", examples)
    lines += ["", "Examples:", examples, ""]
    lines += [
        "Flags, before all settings:",
        "  --cfg job          print the composed settings and stop; with --resolve, references replaced",
        "  -m, --multirun     run once for each combination of values given as a,b,c",
        "  --config-dir DIR   search DIR besides conf/; --config-name NAME: another file to start from",
        "  --help-all         this, with the advanced settings and those of every option",
        "  --hydra-help       Hydra's own flags",
        "HYDRA_FULL_ERROR=1 in the environment: the traceback of an error instead of one line.",
        "",
        f"{'All settings' if every else 'Settings'}, with their defaults; their ranges: docs/configuration.md",
    ]
    composed = compose(config_name)
    root = ROOTS[f"schema_{config_name}"]
    listed = {name: setting for name, setting in settings(root, {} if every else chosen).items() if setting.is_value}
    shown = [name for name, setting in listed.items() if every or not setting.advanced]
    by_group = {
        group: [name for name in shown if name.rpartition(".")[0].partition(".")[0] == group]
        for group in ["", *SCHEMAS, "audit"]
    }
    for group, names in by_group.items():
        lines += ["", f"{group}:"] if group and names else []
        for name in names:
            begin = f"  {name:<38} {_shown(_value(composed, name, listed[name].default)):<16} "
            sentence = re.split(r"(?<=[.!?])\s", " ".join(listed[name].doc.split()), maxsplit=1)[0]
            lines.append(
                begin + textwrap.shorten(sentence, 120 - len(begin), placeholder=" ...", break_on_hyphens=False)
            )
    return "\n".join(lines) + "\n"


def _value(composed: DictConfig, name: str, default: Any) -> Any:
    try:
        return OmegaConf.select(composed, name, default=default, throw_on_missing=True)
    except OmegaConfBaseException:
        return dataclasses.MISSING


def _shown(value: Any) -> str:
    """Return a default as one would type it, a long one cut; nothing where a value has to be given."""
    match value:
        case dataclasses.MISSING:
            return ""
        case None:
            return "null"
        case bool():
            return str(value).lower()
    text = value.name if isinstance(value, Enum) else str(value)
    return text if len(text) <= 16 else f"{text[:13]}..."


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that opens a config file."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    return re.split(r"(?<=[.!?])\s|:\s*$", " ".join(comment), maxsplit=1)[0]
