"""List the settings, explain in one line what is wrong with one, and print `--help`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from agentft.config.compose import OF_OTHERS, compose, conf_dir, dotted, options, schemas_of
from agentft.model.config import TrustConfig
from agentft.recipes.config import RENAMED, ROOTS, SCHEMAS, TrainConfig
from agentft.settings import Number, accepted, default_of, hints_of, members, numbers


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


def settings(root: type = TrainConfig, schemas: Mapping[str, str] | None = None) -> dict[str, Setting]:
    """Return every setting by its dotted name; of a group that `schemas` gives no schema, those of all its schemas."""
    found = dict(_settings_of(root, ""))
    for group, known in SCHEMAS.items():
        if group in found and found[group].hint is not TrustConfig:
            chosen = (schemas or {}).get(group)
            for schema in [known[chosen]] if chosen is not None else reversed(known.values()):
                found.update(_settings_of(schema, f"{group}."))
    return found


def _settings_of(schema: type, prefix: str, *, advanced: bool = False) -> Iterator[tuple[str, Setting]]:
    hints, docs, ranges = hints_of(schema), _field_docs(schema), numbers(schema)
    for field in dataclasses.fields(schema):
        name, hint = field.name, hints[field.name]
        hidden = advanced or field.metadata.get("advanced", False)
        yield prefix + name, Setting(hint, default_of(field), docs.get(name, ""), ranges.get(name), hidden)
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _settings_of(part, f"{prefix}{name}.", advanced=hidden)


@functools.cache
def _field_docs(schema: type) -> Mapping[str, str]:
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


# --- What is wrong ---


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain(
    error: Exception, overrides: Sequence[Override], root: type, schemas: Mapping[str, str], folders: Sequence[Path]
) -> str:
    """Return what Hydra or OmegaConf refused of a composition; `schemas` names that of each group."""
    known = settings(root, schemas)
    for override in overrides:
        key = override.key_or_group
        if not (options(key, folders) or key in known or key.startswith(("hydra", *OF_OTHERS))):
            return unknown_setting(key, root, schemas)
        if override.is_add() and f"already at '{key}'" in str(error):
            return f"{key}: is there already; leave out the +"
        if override.is_delete():
            return f"{key}: settings cannot be removed; {key}=null where that is allowed"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if not group:
            return f"--config-name {option}: no such file in conf/ or --config-dir"
        return unknown_option(group, option, [o for o in error.options or () if not o.startswith("schema_")])
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {error}"
    origin: BaseException = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    text = f"{error}\n{origin}"
    in_file = re.search(r"In '([^']+)'", text)
    where = f"{in_file[1]}.yaml: " if in_file else ""
    key = getattr(origin, "full_key", None) or next(iter(re.findall(r"full_key: (\S+)", text)), "")
    if key and re.search(r"Key '.*' (not in|is not in struct)", text):
        line = where + unknown_setting(key, root, schemas)
        typed = next((o.input_line for o in overrides if where and o.key_or_group == key.partition(".")[0]), None)
        return line + (f"; leave out {typed} or that file" if typed else "")
    if key in known and (isinstance(origin, ValidationError) or "ValidationError" in text):
        quoted = re.search(r"[Vv]alue '([^']*)'", text)
        value = origin.value if isinstance(origin, ValidationError) else quoted and quoted[1]
        return where + wrong_value(key, value, known)
    if isinstance(origin, AssertionError):  # OmegaConf, for model.shape.hidden=8 while model.shape is null
        nested = [o.key_or_group for o in overrides if o.key_or_group.count(".") > 1]
        return f"{', '.join(nested)}: what it belongs to is null; give the whole, <setting>={{<name>:<value>}}"
    return where + (f"{key}: " if key and key not in str(origin) else "") + first_line(origin)


def unknown_option(group: str, option: str, found: Sequence[str]) -> str:
    """Return `model=smolm2: no such option; did you mean model=smollm2-360m? (model has: ...)`"""
    near = nearest(option, found)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={option}: no such option{hint} ({group} has: {', '.join(found)})"


def wrong_value(key: str, value: Any, known: Mapping[str, Setting]) -> str:
    """Return `sft_type.rank=abc: expected a whole number from 1 to 16,384`."""
    shown = "null" if value is None else str(value)
    near = nearest(shown, members(known[key].hint))
    hint = f"; did you mean {key}={near}?" if near else ""
    return f"{key}={shown}: expected {accepted(known[key].hint, known[key].number)}{hint}"


def unknown_setting(key: str, root: type, schemas: Mapping[str, str]) -> str:
    """Return `sft_type.rnak: no such setting; did you mean sft_type.rank? (sft_type=lora has: alpha, dropout, ...)`"""
    if key.startswith("hydra."):
        return f"{key}: no such setting of Hydra; see --hydra-help and --cfg hydra"
    if key.split(".")[-1] == "_target_":
        return f"{key}: refused; agentft calls nothing that a config names"
    known = settings(root, schemas)
    group, _, rest = key.partition(".")
    owners = [_owner(group, name) for name in SCHEMAS.get(group, ()) if key in settings(root, {**schemas, group: name})]
    if owners:
        return f"{key}: {rest} belongs to {' and '.join(owners)}{_has(group, known, schemas)}"
    # The deepest part that exists, and what is wrong below it.
    parent, _, name = key.rpartition(".")
    while parent and not any(other.startswith(f"{parent}.") for other in known):
        parent, _, name = parent.rpartition(".")
    last = key.rpartition(".")[2]
    by_name = {other.rpartition(".")[2]: other for other in reversed(known)}
    near = nearest(name, [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent])
    now = {old.partition(".")[2]: new for old, new in RENAMED.items()}
    suggestions = (
        RENAMED.get(key),
        near and dotted(parent, near),
        now.get(last) if now.get(last) in known else None,
        by_name.get(nearest(last, list(by_name)) or ""),
    )
    suggestion = next(filter(None, suggestions), None)
    hint = f"; did you mean {suggestion}?" if suggestion else ""
    return f"{key}: no such setting{hint}{_has(parent, known, schemas)}"


def _has(parent: str, known: Mapping[str, Setting], schemas: Mapping[str, str]) -> str:
    """Return ` (sft_type=lora has: alpha, dropout, ...)`; of many names nothing, since a long list hides the answer."""
    names = sorted({key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent} - {"name"})
    owner = (
        f"{_owner(parent, schemas[parent])} has" if parent in schemas else f"{parent} has" if parent else "there are"
    )
    return f" ({owner}: {', '.join(names)})" if len(names) < 14 else ""


def _owner(group: str, schema: str) -> str:
    return f"{group}={schema.removeprefix('schema_')}" if len(SCHEMAS[group]) > 1 else group


def missing_value(keys: Sequence[str], root: type) -> str:
    """`dataset.path: missing; give dataset.path=<value>`, and what the setting means."""
    known = settings(root)
    key = keys[0]
    doc = known[key].doc.split("\n")[0] if key in known else ""
    others = f" (missing too: {', '.join(keys[1:])})" if keys[1:] else ""
    return f"{key}: missing; give {key}=<value>{others}" + (f". {doc}" if doc else "")


def nearest(word: str, words: Sequence[str]) -> str | None:
    """Return the word most like `word`, or the only one that contains it; None if there is neither."""
    lowered = {candidate.lower(): candidate for candidate in words}
    if close := difflib.get_close_matches(word.lower(), lowered, 1, 0.6):
        return lowered[close[0]]
    parts = [candidate for candidate in words if len(word) > 2 and (word.lower() in candidate.lower())]
    return parts[0] if len(parts) == 1 else None


# --- Help ---

_AS_MODULES = {"audit": "-m agentft.audit", "export": "-m agentft.export"}
"""Entry points inside the package, and how they are started."""


def help_text(program: str, config_name: str, config_dir: str | None = None, *, every: bool = False) -> str:
    """Return what `--help` prints; `every` lists the advanced settings and those of all options, too."""
    folders = [conf_dir()] + ([Path(config_dir)] if config_dir is not None else [])
    composed = compose(config_name, config_dir=config_dir, with_hydra=True)
    choices = [each for each in composed.hydra.runtime.choices.items() if options(each[0], folders)]
    started = f"python {_AS_MODULES.get(config_name, program)}" if program.endswith(".py") else program
    lines = [f"usage: {started} [flags] [group=option ...] [setting=value ...]", ""]
    lines.append("Groups and their options (* is the default):")
    for group, default in reversed(choices):
        for i, option in enumerate(options(group, folders)):
            path = next(p for folder in folders if (p := folder / group / f"{option}.yaml").is_file())
            star = "*" if option == default else " "
            begin = f"  {group if i == 0 else '':<12} {star}{option:<20} "
            lines.append(begin + textwrap.shorten(_first_sentence(path), 117 - len(begin), placeholder=" ..."))
    examples = str(composed.hydra.help.footer).rstrip()
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
    root, schemas = ROOTS[f"schema_{config_name}"], {} if every else schemas_of(composed)
    listed = {name: setting for name, setting in settings(root, schemas).items() if setting.is_value}
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
