"""What is wrong with a setting, a value or an option, in one line, with the nearest name that exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

from agentft.config.groups import options
from agentft.config.known_settings import Setting, dotted, in_words, members, settings
from agentft.config.old_options import OLD_OPTIONS
from agentft.recipes.saved import SCHEMAS

KEEP_IN_ENVIRONMENT = (
    "configs are saved: put it into the environment instead (WANDB_API_KEY, MODELSCOPE_API_TOKEN, HF_TOKEN)"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown_option(group: str, option: str, found: Sequence[str]) -> str:
    """`model=smolm2: no such option; did you mean model=smollm2-360m? (model has: ...)`"""
    near = nearest(option, found)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={option}: no such option{hint} ({group} has: {', '.join(found)})"


def wrong_value(key: str, text: str, overrides: Sequence[Override], known: Mapping[str, Setting]) -> str:
    """`sft_type.rank=abc: expected a whole number`"""
    given = next((o for o in overrides if o.key_or_group == key and not o.is_sweep_override()), None)
    quoted = re.search(r"[Vv]alue '([^']*)'", text)
    value = given.get_value_element_as_str() if given is not None else quoted[1] if quoted else None
    shown = key if value is None else f"{key}={value}"
    if key not in known:
        return f"{shown}: {first_line(Exception(text))}"
    near = nearest(value or "", members(known[key].hint))
    hint = f"; did you mean {key}={near}?" if near else ""
    return f"{shown}: expected {in_words(known[key])}{hint}"


def unknown_setting(key: str, root: type, choices: Mapping[str, str], folders: Sequence[Path] = ()) -> str:
    """`sft_type.rnak: no such setting; did you mean sft_type.rank? (sft_type=lora has: alpha, dropout, ...)`"""
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
    if near := nearest(name, [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]):
        suggestion = dotted(parent, near)
    elif OLD_OPTIONS.get(last) in known:
        suggestion = OLD_OPTIONS[last]
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
    """The word most like `word`, or the only one that contains it; None if there is neither."""
    lowered = {candidate.lower(): candidate for candidate in words}
    if close := difflib.get_close_matches(word.lower(), lowered, 1, 0.6):
        return lowered[close[0]]
    parts = [candidate for candidate in words if len(word) > 2 and (word.lower() in candidate.lower())]
    return parts[0] if len(parts) == 1 else None
