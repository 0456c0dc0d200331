"""An MSAgent system text for a layout that has a block of tools of its own: the tools and the words about marks taken out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

from agentft.data.conversation import Conversation
from agentft.data.grammar import MARK, THINK_CLOSE, THINK_OPEN
from agentft.data.offered_tools import OfferedTool, functions_of, read_offered_tools


class SystemReading(StrEnum):
    """What became of an MSAgent system text."""

    none = "none"
    """There is none."""
    no_tools = "no_tools"
    """It offers no tool: kept as it is."""
    tools_native = "tools_native"
    """The tools are in the layout's own block, and what the text said about marks is gone."""
    tools_native_marks_kept = "tools_native_marks_kept"
    """The tools are in the layout's own block; the text mentions marks in words that were not recognised, and keeps them."""
    tools_unreadable = "tools_unreadable"
    """A tool says more than a function declaration holds, or cannot be read: the whole text is kept as it is."""


@dataclass(frozen=True, slots=True)
class NativeSystem:
    """A system text for a native layout."""

    text: str
    """What is left of the text."""
    tools: tuple[str, ...]
    """Function declarations as JSON, one a tool."""
    reading: SystemReading


_JSON = json.JSONEncoder(ensure_ascii=False)
_CLAUSE = re.compile(r".+?(?:[。；;]\s*|\.(?=\s|\Z)\s*|\n\s*|\Z)", re.DOTALL)
_CALL_WORDS = re.compile(r"api_name|json", re.IGNORECASE)


@lru_cache(maxsize=1536)  # more than are on their way through the tokenizer: each is asked for before and after
def read_system(system: str) -> NativeSystem:
    """Take the list of tools and the words about marks out of an MSAgent system text, where both are understood."""
    offered = read_offered_tools(system)
    if not offered:
        return NativeSystem(system, (), SystemReading.no_tools if system.strip() else SystemReading.none)
    pieces: list[str] = []
    functions: list[OfferedTool] = []
    position = 0
    for tool in offered:
        found = functions_of(system, tool)
        if found is None:
            return NativeSystem(system, (), SystemReading.tools_unreadable)
        functions += found[0]
        pieces.append(system[position : tool.place[0]])
        position = found[1]
    pieces.append(system[position:])
    remainder = "\n\n".join(piece.strip() for piece in pieces if piece.strip())
    tools = tuple(dict.fromkeys(_JSON.encode(_declaration(function)) for function in functions))
    text = _without_words_about_marks(remainder)
    if MARK.search(text):
        return NativeSystem(remainder.strip(), tools, SystemReading.tools_native_marks_kept)
    return NativeSystem(text.strip(), tools, SystemReading.tools_native)


def lift_tools(conversation: Conversation) -> Conversation | tuple[str, str]:
    """Return an MSAgent conversation with the list of its system text as `tools`; others as they are.

    Returned is (reason, detail) where the list cannot be read or the text names marks in words that were not recognised:
    a prompt in another layout must not ask for marks that are not trained.
    """
    if conversation.tools or not any(message.source is not None for message in conversation.messages):
        return conversation
    system = read_system(conversation.system)
    if system.reading is SystemReading.tools_unreadable:
        return "tools_not_lifted", "an entry of the tool list cannot be read as a function declaration"
    if system.reading is SystemReading.tools_native_marks_kept:
        return "system_names_marks", "the system text names MSAgent marks in words that are not recognised"
    if system.reading is not SystemReading.tools_native:
        return conversation
    head = (replace(conversation.messages[0], content=system.text),) if system.text else ()
    tools = tuple(json.loads(tool) for tool in system.tools)
    return replace(conversation, messages=(*head, *conversation.messages[1:]), tools=tools)


def _without_words_about_marks(text: str) -> str:
    """Leave out each clause that tells how to write a call between the think marks."""
    clauses = _CLAUSE.findall(text)
    return "".join(c for c in clauses if not (THINK_OPEN in c and THINK_CLOSE in c and _CALL_WORDS.search(c)))


def _declaration(tool: OfferedTool) -> dict[str, Any]:
    """One tool as the function declaration that chat layouts share: a name, a description, a JSON schema."""
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
