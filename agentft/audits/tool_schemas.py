"""Check the arguments of calls against the JSON schemas that their tools declare.

A declaration is data from a stranger. Only the keywords of `_KEPT` reach the validator, each with a value of the kind it
expects: no references (they could fetch), no patterns (they could run for ever), no depth beyond `_MAX_DEPTH`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from agentft.data.calls import ToolCall
from agentft.data.literals import JsonRefused, read_json
from agentft.data.tools import OfferedTool

Problem = tuple[str, str, str]
"""Code of `agentft.audits.findings`, topic, detail."""

_MAX_DEPTH = 12
_MAX_ERRORS = 20
"""Schema errors reported for one call."""

_TYPES = {
    **dict.fromkeys(("string", "str", "text", "date", "datetime", "time"), "string"),
    **dict.fromkeys(("integer", "int", "long", "int32", "int64"), "integer"),
    **dict.fromkeys(("number", "float", "double", "decimal"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "set"), "array"),
    **dict.fromkeys(("object", "dict", "map", "json"), "object"),
    **dict.fromkeys(("null", "none"), "null"),
}
"""What declarations call a type -> its name in JSON schema; other names say nothing and are left out."""

_KEPT: dict[str, type | tuple[type, ...]] = {
    "enum": list,
    "minimum": (int, float),
    "maximum": (int, float),
    "exclusiveMinimum": (int, float),
    "exclusiveMaximum": (int, float),
    "minLength": int,
    "maxLength": int,
    "minItems": int,
    "maxItems": int,
    "additionalProperties": bool,
}
"""Keyword -> the values it may have here; `type`, `properties`, `items`, `required` and the unions are read apart."""


def check_request(request: ToolCall, offered: Sequence[OfferedTool]) -> list[Problem]:
    """What is wrong with a request, given the tools that its system text offers.

    One tool can be listed several times, under several urls: the declaration that fits best counts.
    """
    if not offered:
        return [("call_without_tool_list", request.name, f"{_short(request.name)} is called, no tool is offered")]
    declared = [tool for tool in offered if tool.name == request.name]
    if not declared:
        return [("unknown_tool", request.name, f"{_short(request.name)} is called, it is not in the tool list")]
    return min((_check_declared(request, tool) for tool in declared), key=len)


def schema_of(parameters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of an MSAgent parameter list, `[{"name", "description", "required", "type"?, ...}, ...]`."""
    properties = {parameter["name"]: _clean(parameter, _MAX_DEPTH, named=True) for parameter in parameters}
    return {"type": "object", "properties": properties, "required": required_names(parameters)}


def required_names(parameters: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the parameters that a call must have."""
    return [parameter["name"] for parameter in parameters if _is_true(parameter.get("required"))]


def _check_declared(request: ToolCall, tool: OfferedTool) -> list[Problem]:
    if tool.parameters is None:
        return []
    problems: list[Problem] = []
    given = request.arguments
    for name in required_names(tool.parameters):
        if name not in given:
            topic = f"{request.name}.{name}"
            problems.append(("missing_parameter", topic, f"{_short(request.name)} needs {_short(name)}"))
    known = {parameter["name"] for parameter in tool.parameters}
    for name in given:
        if name not in known:
            topic = f"{request.name}.{name}"
            problems.append(("undeclared_parameter", topic, f"{_short(request.name)} does not declare {_short(name)}"))
    try:
        problems.extend(_schema_problems(request, tool.parameters))
    except RecursionError:
        problems.append(("argument_breaks_schema", request.name, "the arguments are nested too deeply to check"))
    return problems


def _schema_problems(request: ToolCall, parameters: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    validator = _validator(json.dumps(parameters, sort_keys=True, default=str))
    if validator is None:
        return
    errors = validator.iter_errors(request.arguments)
    for _, error in zip(range(_MAX_ERRORS), errors, strict=False):
        path = ".".join(map(str, error.absolute_path))
        top = str(error.absolute_path[0]) if error.absolute_path else ""
        code = "argument_as_text" if _is_right_as_text(error) else "argument_breaks_schema"
        detail = f"{_short(request.name)}: {path}: {_in_words(error)}"
        yield code, f"{request.name}.{top}", detail


@lru_cache(maxsize=4096)
def _validator(parameters_json: str) -> Any:
    """The validator of a parameter list; None where its schema allows anything."""
    from jsonschema import Draft202012Validator

    schema = schema_of(json.loads(parameters_json))
    if not any(schema["properties"].values()):
        return None
    # Missing parameters of the call itself have a code of their own.
    return Draft202012Validator({**schema, "required": []})


def _clean(declared: object, depth: int, *, named: bool = False) -> dict[str, Any]:
    """The part of a declaration that is checked; `named` entries have a name and a truth value for `required`."""
    if not isinstance(declared, dict) or depth == 0:
        return {}
    schema: dict[str, Any] = {
        key: value
        for key, value in declared.items()
        if key in _KEPT and isinstance(value, _KEPT[key]) and (_KEPT[key] is bool or not isinstance(value, bool))
    }
    if not schema.get("enum", [None]):
        del schema["enum"]  # an empty choice is a declaration without one
    if types := _types(declared.get("type")):
        nullable = _is_true(declared.get("nullable")) or None in schema.get("enum", ())
        schema["type"] = [*types, "null"] if nullable and "null" not in types else types
    if isinstance(properties := declared.get("properties"), dict):
        schema["properties"] = {str(name): _clean(value, depth - 1) for name, value in properties.items()}
        required = declared.get("required_fields") if named else declared.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        schema["required"] = names + [
            n for n, v in properties.items() if isinstance(v, dict) and v.get("required") is True
        ]
    if isinstance(items := declared.get("items"), dict):
        schema["items"] = _clean(items, depth - 1)
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(choices := declared.get(union), list) and choices:
            schema[union] = [_clean(choice, depth - 1) for choice in choices]
    return schema


def _types(declared: object) -> list[str]:
    """JSON-schema types; none where one of them is not known, since then anything might be meant."""
    names = declared if isinstance(declared, list) else [declared]
    types = [_TYPES.get(name.strip().lower()) if isinstance(name, str) else None for name in names]
    return [] if None in types else [name for name in types if name is not None]


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() in ("true", "yes", "required", "是"))


def _is_right_as_text(error: Any) -> bool:
    """Whether a text stands where its own value, read as JSON, would be right: "5" for an integer."""
    value = error.instance
    if error.validator != "type" or not isinstance(value, str):
        return False
    try:
        read = read_json(value.strip().lower() if value.strip().lower() in ("true", "false", "null") else value)
    except JsonRefused:
        return False
    from jsonschema import Draft202012Validator

    return not isinstance(read, str) and bool(Draft202012Validator(error.schema).is_valid(read))


def _in_words(error: Any) -> str:
    value = json.dumps(error.instance, ensure_ascii=False, default=str)
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    expected = error.validator_value
    match error.validator:
        case "type":
            return f"{shown} is not of type {' or '.join(expected) if isinstance(expected, list) else expected}"
        case "enum":
            choices = json.dumps(expected, ensure_ascii=False, default=str)
            return f"{shown} is not one of {choices if len(choices) <= 80 else choices[:77] + '...'}"
        case "required":
            missing = [name for name in expected if name not in error.instance]
            return f"{', '.join(map(str, missing))} is missing in {shown}"
        case _:
            return f"{shown} does not meet {error.validator}={json.dumps(expected, default=str)[:60]}"


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
