"""List every setting with its type, default and meaning, read from the dataclasses of the packages."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

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


def conf_dir() -> Path:
    """The folder of the config groups: inside an installed package, else beside it in the repository."""
    here = Path(__file__).resolve().parent.parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The options of a group: the files of `conf/<group>/`; none if there is no such group."""
    if not group:
        return []
    return sorted({path.stem for folder in folders or [conf_dir()] for path in (folder / group).glob("*.yaml")})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its type and the sentences below it in its dataclass."""

    hint: Any
    default: Any
    doc: str
    number: Number | None
    """Its range; None: not a number."""


def settings(
    root: type = TrainConfig, choices: Mapping[str, str] | None = None, folders: Sequence[Path] = ()
) -> dict[str, Setting]:
    """Every setting by its dotted name; of a group without a choice, those of all its schemas."""
    found: dict[str, Setting] = {}
    for field, setting in _fields(root):
        if field not in SCHEMAS or setting.hint is TrustConfig:
            found[field] = setting
            for part in _dataclasses_in(setting.hint):
                found.update({f"{field}.{name}": inner for name, inner in _fields(part)})
            continue
        chosen = _schema_of(field, (choices or {}).get(field), folders or [conf_dir()])
        for schema in [chosen] if chosen is not None else SCHEMAS[field].values():
            for name, inner in _fields(schema):
                found.setdefault(f"{field}.{name}", inner)
                for deeper in _dataclasses_in(inner.hint):
                    found.update({f"{field}.{name}.{deepest}": s for deepest, s in _fields(deeper)})
        found.setdefault(field, setting)
    return found


def _schema_of(group: str, option: str | None, folders: Sequence[Path]) -> type | None:
    """Class of an option, by the defaults list of its file."""
    if option is None or option in SCHEMAS[group]:
        return SCHEMAS[group].get(option or "")
    for folder in folders:
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            for base in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []):
                if isinstance(base, str) and base not in ("_self_", option):
                    return _schema_of(group, base, folders)
    return None


def _fields(schema: type) -> Iterator[tuple[str, Setting]]:
    hints = typing.get_type_hints(schema)
    docs, ranges = _field_docs(schema), numbers(schema)
    for field in dataclasses.fields(schema):
        name = field.name
        yield name, Setting(hints[name], field.default, docs.get(name, ""), ranges.get(name))


def _field_docs(schema: type) -> dict[str, str]:
    """The docstring below each field, of the class and its bases."""
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


def _dataclasses_in(hint: Any) -> list[type]:
    return [
        part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part) and isinstance(part, type)
    ]


def members(hint: Any) -> list[str]:
    """Names of the values of a setting that takes one of an enumeration; none of any other."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, Enum):
            return list(part.__members__)
    return []


def in_words(setting: Setting) -> str:
    """Return what a setting accepts, as a user reads it."""
    return _type_in_words(setting.hint) if setting.number is None else str(setting.number)


def _type_in_words(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return f"{' or '.join(_type_in_words(part) for part in parts)} or null"
    if typing.get_origin(hint) is list:
        return "a list like [a,b]"
    if names := members(hint):
        return f"one of {', '.join(names)}"
    return {bool: "true or false", str: "text"}.get(hint, "settings by name")


def dotted(parent: str, name: str) -> str:
    """The full name of `name` below `parent`, which is empty at the top."""
    return f"{parent}.{name}" if parent else name
