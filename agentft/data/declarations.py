"""Declarations of tools, from a column or out of a system text: OpenAI's as they are, others in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from agentft.data.literals import Json, end_of_bracket
from agentft.data.text_calls import literal
from agentft.errors import FormatError

Tools = tuple[dict[str, Json], ...]

_LISTS_TRIED = 5
_TOOLS_BLOCK = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_LIST = re.compile(r"\[\s*\{")
_CLAUSE = re.compile(r".+?(?:[。；;]\s*|\.(?=\s|\Z)\s*|\n\s*|\Z)", re.DOTALL)
_EXAMPLE = re.compile(
    r"<tool_call>\s*[{\[].*?</tool_call>|[^.\n]*\bformat:\s*Thought:\s*Action:?\s*Action Input:[ \t]*\n?", re.DOTALL
)
_CALL_WORDS = re.compile(r"</?tool_call>|</?tools>|\[func\w*\(")
"""Words of a system text about how to write calls: the layout says that itself."""


class Lifted(NamedTuple):
    """A system text without its list of tools."""

    text: str
    tools: Tools
    words_left_out: bool
    """So are its words about how to write a call."""


def read_tools(tools: object) -> Tools:
    """Read a column of declarations: a list, or the text of one.

    Raises:
        FormatError: it is no list of objects with names.
    """
    if isinstance(tools, str):
        tools = literal(tools, "tools_unreadable") if tools.strip() else []
    if not isinstance(tools, (list, type(None))):
        raise FormatError("tools_unreadable", "the tools are no list")
    return tuple(_tool(tool) for tool in tools or [])


def tool_names(tools: Tools) -> frozenset[str]:
    """Return the names of declared tools."""
    return frozenset(tool["function"]["name"] for tool in tools)


def lift_tools(text: str) -> Lifted | None:
    """Take the declarations out of a system text that holds them between `<tools>` marks or as a list; None: it has none."""
    for listed, before, after in _lists_in(text):
        try:
            tools = read_tools(listed)
        except FormatError:
            continue
        if tools:
            clauses = _CLAUSE.findall(before.rstrip())
            if clauses and clauses[-1].endswith((":", "：")):  # "Here are the tools:"
                clauses.pop()
            rest = "".join(clauses) + "\n\n" + after.strip()
            words = _CLAUSE.findall(_EXAMPLE.sub("", rest))
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
        elif (
            isinstance(schema, dict)
            and "properties" not in schema
            and all(isinstance(v, dict) for v in schema.values())
        ):
            # xLAM writes the properties alone
            declared["parameters"] = {"type": "object", "properties": schema} if schema else schema
        read = {"type": "function", "function": declared}
    function = read["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormatError("tools_unreadable", "a tool has no name")
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict) or not isinstance(schema.get("properties") or {}, dict):
        raise FormatError(
            "tools_unreadable", f"parameters of {function['name'][:40]!r} are no JSON schema of an object"
        )
    return read
