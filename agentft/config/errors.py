"""Explain in one line what is wrong with a setting, a value or an option, with the nearest name that exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import ValidationError

from agentft.config.compose import dotted, options
from agentft.config.settings import OLD_OPTIONS, Setting, settings
from agentft.recipes.saved import RENAMED, SCHEMAS
from agentft.settings import accepted, members


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain(
    error: Exception, overrides: Sequence[Override], root: type, choices: Mapping[str, str], folders: Sequence[Path]
) -> str:
    """Return what Hydra or OmegaConf refused of a composition; `choices` are the options of the groups."""
    for override in overrides:
        key = override.key_or_group
        if not key.startswith("hydra") and not options(key, folders) and key not in settings(root, choices, folders):
            return unknown_setting(key, root, choices, folders)
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
        return where + unknown_setting(key, root, choices, folders)
    if key and (isinstance(origin, ValidationError) or "ValidationError" in text):
        return where + wrong_value(key, text, overrides, settings(root, choices, folders))
    if isinstance(origin, AssertionError):  # OmegaConf, for model.shape.hidden=8 while model.shape is null
        nested = [o.key_or_group for o in overrides if o.key_or_group.count(".") > 1]
        return f"{', '.join(nested)}: what it belongs to is null; give the whole, <setting>={{<name>:<value>}}"
    return where + (f"{key}: " if key and key not in str(origin) else "") + first_line(origin)


def unknown_option(group: str, option: str, found: Sequence[str]) -> str:
    """Return `model=smolm2: no such option; did you mean model=smollm2-360m? (model has: ...)`"""
    near = nearest(option, found)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={option}: no such option{hint} ({group} has: {', '.join(found)})"


def wrong_value(key: str, text: str, overrides: Sequence[Override], known: Mapping[str, Setting]) -> str:
    """Return `sft_type.rank=abc: expected a whole number`."""
    given = next((o for o in overrides if o.key_or_group == key and not o.is_sweep_override()), None)
    quoted = re.search(r"[Vv]alue '([^']*)'", text)
    value = given.get_value_element_as_str() if given is not None else quoted[1] if quoted else None
    shown = key if value is None else f"{key}={value}"
    if key not in known:
        return f"{shown}: {first_line(Exception(text))}"
    near = nearest(value or "", members(known[key].hint))
    hint = f"; did you mean {key}={near}?" if near else ""
    return f"{shown}: expected {accepted(known[key].hint, known[key].number)}{hint}"


def unknown_setting(key: str, root: type, choices: Mapping[str, str], folders: Sequence[Path] = ()) -> str:
    """Return `sft_type.rnak: no such setting; did you mean sft_type.rank? (sft_type=lora has: alpha, dropout, ...)`"""
    if key.startswith("hydra."):
        return f"{key}: no such setting of Hydra; see --hydra-help and --cfg hydra"
    if key.split(".")[-1] == "_target_":
        return f"{key}: refused; agentft calls nothing that a config names"
    known = settings(root, choices, folders)
    group, _, rest = key.partition(".")
    owners = [
        f"{group}={option}"
        for option in options(group, folders)
        if group in SCHEMAS and key in settings(root, {**choices, group: option}, folders)
    ]
    if owners:
        return f"{key}: {rest} belongs to {' and '.join(owners)} ({_has(group, known, choices)})"
    # The deepest part that exists, and what is wrong below it.
    parent, _, name = key.rpartition(".")
    while parent and not any(other.startswith(f"{parent}.") for other in known):
        parent, _, name = parent.rpartition(".")
    last = key.rpartition(".")[2]
    by_name = {other.rpartition(".")[2]: other for other in reversed(known)}
    if key in RENAMED:
        suggestion = RENAMED[key]
    elif near := nearest(name, [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]):
        suggestion = dotted(parent, near)
    elif (now := {old.partition(".")[2]: new for old, new in RENAMED.items()} | OLD_OPTIONS).get(last) in known:
        suggestion = now[last]
    else:
        suggestion = by_name.get(nearest(last, list(by_name)) or "", "")
    if not suggestion:
        return f"{key}: no such setting ({_has(parent, known, choices)})"
    listed = _has(parent, known, choices)
    # A long list hides the answer.
    return f"{key}: no such setting; did you mean {suggestion}?" + (f" ({listed})" if len(listed) < 100 else "")


def _has(parent: str, known: Mapping[str, Setting], choices: Mapping[str, str]) -> str:
    names = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    chosen = choices.get(parent, "").removeprefix("schema_") if parent in SCHEMAS else ""
    owner = f"{parent}={chosen} has" if chosen else f"{parent} has" if parent else "there are"
    return f"{owner}: {', '.join(sorted(name for name in names if name != 'name'))}"


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
