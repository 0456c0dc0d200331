"""Declarations of tools: OpenAI's as they are, others in OpenAI's shape, from a column or out of a system text.

A system text may hold them as the numbered list of MSAgent-Bench, one JSON object a tool, or between `<tools>` marks or in
brackets as other datasets write them. A list of tools is context, so a flaw in it costs no conversation: an entry that is no
JSON keeps its name where a pattern finds it, and `problem` says what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentft.data.calls import MAX_JSON_DEPTH, Json, end_of_bracket, is_encodable, json_depth, literal
from agentft.errors import FormatError

Tools = tuple[dict[str, Json], ...]

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

_LISTS_TRIED = 5
_TOOLS_BLOCK = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_LIST = re.compile(r"\[\s*\{")
_CLAUSE = re.compile(r".+?(?:[。；;]\s*|\.(?=\s|\Z)\s*|\n\s*|\Z)", re.DOTALL)
_EXAMPLE = re.compile(
    r"<tool_call>\s*[{\[].*?</tool_call>|[^.\n]*\bformat:\s*Thought:\s*Action:?\s*Action Input:[ \t]*\n?", re.DOTALL
)
_CALL_WORDS = re.compile(r"</?tool_call>|</?tools>|\[func\w*\(")
"""Words of a system text about how to write calls: the layout says that itself."""


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """What a conversation offers: a declared tool, or an entry of the numbered list."""

    name: str
    """Empty where not even a name could be found."""
    description: str
    parameters: tuple[dict[str, Any], ...] | None
    """One object per declared parameter with at least a `name`; None where there is no declaration, or none to be read."""
    problem: str | None = None
    """What is wrong with the entry, None where nothing is."""
    place: tuple[int, int] = (0, 0)
    """Where in the system text the entry begins, its number included, and ends."""
    entry: dict[str, Any] | None = None
    """The JSON object of the list; None where there is none that can be used."""

    @property
    def parameter_names(self) -> frozenset[str] | None:
        """The declared names, None where they are unknown."""
        if self.parameters is None:
            return None
        return frozenset(parameter["name"] for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Lifted:
    """A system text without its list of tools."""

    text: str
    tools: Tools
    words_left_out: bool = False
    """So are its words about how to write a call."""
    problem: tuple[str, str] | None = None
    """Why it cannot stand in another layout: a reason and its detail."""


def read_tools(tools: object) -> Tools:
    """Read a column of declarations, a list or its text; raise FormatError where it is no list of objects with names."""
    if isinstance(tools, str):
        tools = literal(tools, "tools_unreadable") if tools.strip() else []
    if not isinstance(tools, (list, type(None))):
        raise FormatError("tools_unreadable", "the tools are no list")
    return tuple(_tool(tool) for tool in tools or [])


def _tool(tool: object) -> dict[str, Json]:
    if isinstance(tool, str):
        tool = literal(tool, "tools_unreadable")
    if not isinstance(tool, dict):
        raise FormatError("tools_unreadable", "a tool is no object")
    if "function" in tool:
        read = dict(tool) if "type" in tool else {"type": "function", **tool}
    else:
        declared = {key: value for key, value in tool.items() if key != "type" or value not in ("function", "custom")}
        schema = declared.get("parameters")
        if "input_schema" in declared:  # Anthropic's name
            declared["parameters"] = declared.pop("input_schema")
        elif isinstance(schema, dict) and schema and "properties" not in schema and _are_objects(schema):
            declared["parameters"] = {"type": "object", "properties": schema}  # xLAM writes the properties alone
        read = {"type": "function", "function": declared}
    function = read["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormatError("tools_unreadable", "a tool has no name")
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict) or not isinstance(schema.get("properties") or {}, dict):
        detail = f"parameters of {function['name'][:40]!r} are no JSON schema of an object"
        raise FormatError("tools_unreadable", detail)
    return read


def clauses(text: str) -> list[str]:
    """Cut a text into sentences and the like, each with the blanks behind it."""
    return _CLAUSE.findall(text)


def lift_listed(text: str) -> Lifted | None:
    """Take the declarations out of a system text that holds them between `<tools>` marks or as a list; None: it has none."""
    for listed, before, after in _lists_in(text):
        try:
            tools = read_tools(listed)
        except FormatError:
            continue
        if tools:
            introduction = clauses(before.rstrip())
            if introduction and introduction[-1].endswith((":", "：")):  # "Here are the tools:"
                introduction.pop()
            rest = "".join(introduction) + "\n\n" + after.strip()
            words = clauses(_EXAMPLE.sub("", rest))
            kept = "".join(clause for clause in words if not _CALL_WORDS.search(clause)).strip()
            kept = re.sub(r"\n{3,}", "\n\n", kept)
            return Lifted(kept, tools, bool(_EXAMPLE.search(rest) or _CALL_WORDS.search(rest)))
    return None


def _lists_in(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield what may be a list of tools, and the text before and after it."""
    for found in _TOOLS_BLOCK.finditer(text):
        if body := found[1].strip():
            listed = body if body.startswith("[") else f"[{','.join(_objects(body))}]"
            yield listed, text[: found.start()], text[found.end() :]
    for number, start in enumerate(found.start() for found in _LIST.finditer(text)):
        end = end_of_bracket(text, start)
        if end is None or number == _LISTS_TRIED:
            return
        if '"name"' in text[start:end] or "'name'" in text[start:end]:
            yield text[start:end], text[:start], text[end:]


def _objects(text: str) -> Iterator[str]:
    """Yield the objects of a text, one after the other."""
    start = text.find("{")
    while start >= 0 and (end := end_of_bracket(text, start)) is not None:
        yield text[start:end]
        start = text.find("{", end)


def lift_numbered(system: str) -> Lifted | None:
    """Take the numbered list out of a system text; None where an entry says more than declarations of functions hold."""
    pieces: list[str] = []
    functions: list[OfferedTool] = []
    position = 0
    for tool in read_offered_tools(system):
        found = _functions_of(tool)
        if found is None:
            return None
        functions += found
        pieces.append(system[position : tool.place[0]])
        position = tool.place[1]
    pieces.append(system[position:])
    declarations = map(_declaration, functions)
    tools = {json.dumps(declaration): declaration for declaration in declarations}
    return Lifted("\n\n".join(piece.strip() for piece in pieces if piece.strip()), tuple(tools.values()))


def _functions_of(tool: OfferedTool) -> tuple[OfferedTool, ...] | None:
    """Return the functions that an entry declares, maybe as a plugin or as `paths`; None: it says more, or is unreadable."""
    entry = tool.entry
    if entry is None:
        return None
    if not tool.problem and _FIELDS.issuperset(entry):
        return (tool,)
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
    return tuple(functions)


def _declaration(tool: OfferedTool) -> dict[str, Any]:
    """Return one tool as the function declaration that chat layouts share: a name, a description, a JSON schema."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in tool.parameters or ():
        schema = {key: value for key, value in parameter.items() if key not in ("name", "required", "required_fields")}
        if "required_fields" in parameter:  # what the readers of other layouts call a nested object's own list
            schema["required"] = parameter["required_fields"]
        properties[parameter["name"]] = schema
        if parameter.get("required") in (True, "true", "True"):
            required.append(parameter["name"])
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def tool_entry(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a declaration of OpenAI's shape as an entry of the numbered list."""
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
    """Read the numbered tool list of a system text; equal texts may give the same objects, to be left as they are."""
    return _read_remembered(system) if len(system) < _REMEMBERED_CHARACTERS else _read(system)


def _read(system: str) -> tuple[OfferedTool, ...]:
    tools: list[OfferedTool] = []
    position = 0
    while len(tools) < MAX_TOOLS and (match := _ENTRY.search(system, position)) is not None:
        tools.append(_read_entry(system, match))
        position = tools[-1].place[1]
    return tuple(tools)


# Conversations of one domain share their system text; reading it once saves time and, where all are kept, memory.
_read_remembered = lru_cache(maxsize=512)(_read)


def _read_entry(system: str, number: re.Match[str]) -> OfferedTool:
    """Return the tool whose JSON follows its number in the list; one that cannot be used keeps a name where one is found."""
    start = number.end()
    entry, end, problem = _decoded(system, start)
    line_end = system.find("\n", end)
    trailing = system[end : line_end if line_end >= 0 else len(system)].strip() if entry is not None else ""
    usable = None if trailing else entry
    name, description, declared = (entry.get(key) if entry else None for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not name:
        following = _ENTRY.search(system, start)
        until = following.start() if following else len(system)
        named = _NAME.search(system, start, until)
        place = (number.start(), until if usable is None else end)
        return OfferedTool(named[1] if named else "", "", None, problem or "no name", place, usable)
    # Without the field (some describe a whole API under `paths` instead) what can be given is not known.
    parameters = None if declared is None else _read_parameters(declared)
    if trailing:
        problem = f"text after the entry: {trailing[:40]!r}"
    elif parameters is None and declared is not None:
        problem = "parameters are neither a list of named objects nor a JSON schema"
    description = description if isinstance(description, str) else ""
    return OfferedTool(name, description, parameters, problem, (number.start(), end), usable)


def _decoded(system: str, start: int) -> tuple[dict[str, Any] | None, int, str | None]:
    """Return the object at a place of a system text, where it ends, and why there is none that can be used."""
    try:
        entry, end = _DECODER.raw_decode(system, start)
    except (ValueError, RecursionError) as error:
        return None, start, f"no JSON: {error}"
    if json_depth(system[start:end]) > MAX_JSON_DEPTH:
        # Whoever reads or writes it later may stand deeper in the stack than this.
        return None, start, f"nested deeper than {MAX_JSON_DEPTH} levels"
    if _SURROGATE_ESCAPE.search(system, start, end) and not is_encodable(json.dumps(entry, ensure_ascii=False)):
        return None, start, "a lone surrogate"
    return entry, end, None


def _read_parameters(declared: object) -> tuple[dict[str, Any], ...] | None:
    """Read a list of named objects, or the properties of a JSON schema; None where it is neither."""
    if isinstance(declared, list):
        named = all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in declared)
        return tuple(declared) if named else None
    properties = declared.get("properties", {}) if isinstance(declared, dict) else None
    if not isinstance(properties, dict) or not _are_objects(properties):
        return None
    required = declared.get("required")  # type: ignore[attr-defined]
    names = set(map(str, required)) if isinstance(required, list) else set()
    return tuple({**value, "name": name, "required": name in names} for name, value in properties.items())


def _are_objects(values: dict[str, Any]) -> bool:
    return all(isinstance(value, dict) for value in values.values())
