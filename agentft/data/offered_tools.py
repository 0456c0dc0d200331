"""The tools that a system text offers: a numbered list with one JSON object per tool, read with tolerance.

A list of tools is context, so a flaw in it costs no conversation: an entry that is no JSON keeps its name where a
pattern finds it, and `problem` says what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentft.data.literals import MAX_JSON_DEPTH, is_encodable, json_depth

MAX_TOOLS = 2_000
"""More numbered entries than any genuine prompt has; the rest of a longer list is left unread."""

_REMEMBERED_CHARACTERS = 20_000

_ENTRY = re.compile(r"^[ \t]*\d{1,4}[.、)][ \t]*(?=\{)", re.MULTILINE)
_NAME = re.compile(r'"(?:name|api_name)"\s*:\s*"([^"\\\n]{1,200})"')
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder(strict=False)
_FIELDS = frozenset({"name", "description", "parameters", "url"})
"""Of an entry; any other is more than a function declaration holds."""
_PATH_FIELDS = _FIELDS | {"method", "model_id"}
_PLUGIN_FIELDS = frozenset({"plugin_name", "plugin_owner", "plugin_type", "plugin_schema_for_model"})


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """One entry of the tool list."""

    name: str
    """Empty where not even a name could be found."""
    description: str
    parameters: tuple[dict[str, Any], ...] | None
    """One object per declared parameter with at least a `name`; None where there is no declaration, or none to be read."""
    url: str | None = None
    problem: str | None = None
    """What is wrong with the entry, None where nothing is."""
    place: tuple[int, int] = (0, 0)
    """Where in the system text the entry begins, its number included, and ends."""
    other_fields: bool = False
    """Whether the entry says more than a function declaration holds."""

    @property
    def parameter_names(self) -> frozenset[str] | None:
        """The declared names, None where they are unknown."""
        if self.parameters is None:
            return None
        return frozenset(parameter["name"] for parameter in self.parameters)


def tool_entry(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a declaration of OpenAI's shape as an entry of the MSAgent list."""
    function = tool.get("function", tool)
    schema = function.get("parameters") or {}
    properties = schema.get("properties") or {}
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    parameters = []
    for name, given in properties.items():
        details = given if isinstance(given, dict) else {}
        parameter = {"name": name, "description": details.get("description") or "", "required": name in required}
        # A nested object's own list of required names would hide whether this parameter is required.
        rest = {("required_fields" if key == "required" else key): value for key, value in details.items()}
        parameters.append(parameter | {k: v for k, v in rest.items() if k not in parameter and v is not None})
    description = function.get("description")
    return {
        "name": function["name"],
        "description": description if isinstance(description, str) else "",
        "parameters": parameters,
    }


def uncarried_parts(tool: dict[str, Any]) -> list[str]:
    """Return the names of what a declaration of OpenAI's shape holds and `tool_entry` does not."""
    function = tool.get("function", tool)
    levels = (
        (tool, {"type", "function"}),
        (function if "function" in tool else {}, {"name", "description", "parameters"}),
        (function.get("parameters") or {}, {"type", "properties", "required"}),
    )
    return [
        str(key)[:40]
        for level, known in levels
        for key, value in level.items()
        if key not in known and value is not None
    ]


def declared_tools(tools: Iterable[dict[str, Any]]) -> tuple[OfferedTool, ...]:
    """Return what declarations of OpenAI's shape offer."""
    entries = map(tool_entry, tools)
    return tuple(OfferedTool(e["name"], e["description"], tuple(e["parameters"])) for e in entries)


def read_offered_tools(system: str) -> tuple[OfferedTool, ...]:
    """Read the numbered tool list of a system text; a text without one offers no tool.

    Equal texts may give the same objects: treat them as read-only.
    """
    return _read_remembered(system) if len(system) < _REMEMBERED_CHARACTERS else _read(system)


def functions_of(system: str, tool: OfferedTool) -> tuple[tuple[OfferedTool, ...], int] | None:
    """Return the functions that an entry of the list declares, and where it ends in the system text.

    An entry may be a plugin around its schema (`plugin_schema_for_model`), and may hold its functions as `paths`. None where
    it says more than declarations of functions hold, or cannot be read.
    """
    if not tool.problem and not tool.other_fields:
        return (tool,), tool.place[1]
    start = system.find("{", tool.place[0])
    try:
        entry, end = _DECODER.raw_decode(system, start)
    except (ValueError, RecursionError):
        return None
    if system[end:].partition("\n")[0].strip() or json_depth(system[start:end]) > MAX_JSON_DEPTH:
        return None
    if isinstance(entry.get("plugin_schema_for_model"), dict) and entry.keys() <= _PLUGIN_FIELDS:
        entry = entry["plugin_schema_for_model"]
    paths = entry.get("paths", [entry])
    if not isinstance(paths, list) or not entry.keys() <= {*_FIELDS, "paths"}:
        return None
    functions: list[OfferedTool] = []
    for path in paths:
        if not isinstance(path, dict) or not path.keys() <= _PATH_FIELDS or not isinstance(path.get("name"), str):
            return None
        parameters = _read_parameters(path.get("parameters"))
        if parameters is None:
            return None
        description = path.get("description") or entry.get("description")
        functions.append(OfferedTool(path["name"], description if isinstance(description, str) else "", parameters))
    return tuple(functions), end


def _read(system: str) -> tuple[OfferedTool, ...]:
    tools: list[OfferedTool] = []
    position = 0
    while len(tools) < MAX_TOOLS:
        match = _ENTRY.search(system, position)
        if match is None:
            break
        tool = _read_entry(system, match)
        tools.append(tool)
        position = tool.place[1]
    return tuple(tools)


# Conversations of one domain share their system text; reading it once saves time and, where all are kept, memory.
_read_remembered = lru_cache(maxsize=512)(_read)


def _read_entry(system: str, number: re.Match[str]) -> OfferedTool:
    """The tool whose JSON follows its number in the list."""
    start = number.end()
    try:
        entry, end = _DECODER.raw_decode(system, start)
    except (ValueError, RecursionError) as error:
        return _recover_entry(system, number, f"no JSON: {error}")
    if json_depth(system[start:end]) > MAX_JSON_DEPTH:
        # Whoever reads or writes it later may stand deeper in the stack than this.
        return _recover_entry(system, number, f"nested deeper than {MAX_JSON_DEPTH} levels")
    if _SURROGATE_ESCAPE.search(system, start, end) and not is_encodable(json.dumps(entry, ensure_ascii=False)):
        return _recover_entry(system, number, "a lone surrogate")
    line_end = system.find("\n", end)
    trailing = system[end : line_end if line_end >= 0 else len(system)].strip()
    problem = f"text after the entry: {trailing[:40]!r}" if trailing else None
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        return _recover_entry(system, number, "no name")
    description = entry.get("description")
    declared = entry.get("parameters")
    # Without the field (some describe a whole API under `paths` instead) what can be given is not known.
    parameters = None if declared is None else _read_parameters(declared)
    if parameters is None and declared is not None and problem is None:
        problem = "parameters are neither a list of named objects nor a JSON schema"
    url = entry.get("url")
    return OfferedTool(
        name=name,
        description=description if isinstance(description, str) else "",
        parameters=parameters,
        url=url if isinstance(url, str) else None,
        problem=problem,
        place=(number.start(), end),
        other_fields=not _FIELDS.issuperset(entry),
    )


def _recover_entry(system: str, number: re.Match[str], problem: str) -> OfferedTool:
    start = number.end()
    following = _ENTRY.search(system, start)
    end = following.start() if following else len(system)
    named = _NAME.search(system, start, end)
    name = named[1] if named else ""
    return OfferedTool(name=name, description="", parameters=None, problem=problem, place=(number.start(), end))


def _read_parameters(declared: object) -> tuple[dict[str, Any], ...] | None:
    if isinstance(declared, dict):
        return _from_json_schema(declared)
    if not isinstance(declared, list):
        return None
    for parameter in declared:
        if not isinstance(parameter, dict) or not isinstance(parameter.get("name"), str):
            return None
    return tuple(declared)


def _from_json_schema(schema: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    properties = schema.get("properties", {})
    if not isinstance(properties, dict) or not all(isinstance(value, dict) for value in properties.values()):
        return None
    required = schema.get("required")
    names = set(map(str, required)) if isinstance(required, list) else set()
    return tuple({**value, "name": name, "required": name in names} for name, value in properties.items())
