"""List every setting with its type, default and meaning, read from the dataclasses of the packages."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agentft.config.compose import conf_dir
from agentft.model.config import TrustConfig
from agentft.recipes.config import TrainConfig
from agentft.recipes.saved import SCHEMAS
from agentft.settings import Number, numbers

OLD_OPTIONS = {
    "model_type": "model",
    "sft_type": "sft_type",
    "output_dir": "output_dir",
    "dataset": "dataset",
    "dataset_sample": "dataset.max_samples",
    "dataset_test_ratio": "dataset.test_ratio",
    "max_length": "dataset.max_length",
    "dtype": "model.dtype",
    "lora_rank": "sft_type.rank",
    "lora_alpha": "sft_type.alpha",
    "lora_dropout_p": "sft_type.dropout",
    "batch_size": "training.per_device_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "eval_steps": "evaluation.eval_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "logging_steps": "training.logging_steps",
    "use_flash_attn": "model.attention",
}
"""Options of the script `llm_sft.py` that agentft replaces, and where each now is."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its type, its default and the sentences below it in its dataclass."""

    hint: Any
    default: Any
    """`dataclasses.MISSING` where a value has to be given."""
    doc: str
    number: Number | None
    """Its range; None: not a number."""
    advanced: bool

    @property
    def is_value(self) -> bool:
        """Return whether one types a value for it: not for a group, whose own settings are listed."""
        return not any(dataclasses.is_dataclass(part) for part in (self.hint, *typing.get_args(self.hint)))


def settings(
    root: type = TrainConfig, choices: Mapping[str, str] | None = None, folders: Sequence[Path] = ()
) -> dict[str, Setting]:
    """Return every setting by its dotted name; of a group without a choice, those of all its schemas."""
    found = dict(_settings_of(root, ""))
    for group in SCHEMAS:
        if group in found and found[group].hint is not TrustConfig:
            chosen = _schema_of(group, (choices or {}).get(group), folders or [conf_dir()])
            for schema in [chosen] if chosen is not None else reversed(SCHEMAS[group].values()):
                found.update(_settings_of(schema, f"{group}."))
    return found


def _schema_of(group: str, option: str | None, folders: Sequence[Path]) -> type | None:
    """Return the class of an option, by the defaults list of its file."""
    if option is None or option in SCHEMAS[group]:
        return SCHEMAS[group].get(option or "")
    for folder in folders:
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            for base in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []):
                if isinstance(base, str) and base not in ("_self_", option):
                    return _schema_of(group, base, folders)
    return None


def _settings_of(schema: type, prefix: str, *, advanced: bool = False) -> Iterator[tuple[str, Setting]]:
    hints, docs, ranges = typing.get_type_hints(schema), _field_docs(schema), numbers(schema)
    for field in dataclasses.fields(schema):
        name, hint = field.name, hints[field.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        hidden = advanced or field.metadata.get("advanced", False)
        yield prefix + name, Setting(hint, default, docs.get(name, ""), ranges.get(name), hidden)
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _settings_of(part, f"{prefix}{name}.", advanced=hidden)


def _field_docs(schema: type) -> dict[str, str]:
    """Return the docstring below each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match following:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = inspect.cleandoc(text)
    return docs
