"""A modest repair of calls that are nearly JSON. Serves only the `*_repaired` metrics; no headline value sees it.

Mended: trailing commas, Python dicts (single quotes, True, False, None), full-width or curly quotes and full-width
punctuation, missing closing quotes and brackets at the end, raw text around the object. Whatever else is wrong stays
wrong.
"""

from __future__ import annotations

import re

from agentft.data.calls import CallFailure, ToolCall, read_call_body, strip_fence

_CLOSING_QUOTES = {'"': '"', "'": "'", "“": "”“", "＂": "＂", "‘": "’‘", "＇": "＇"}
_PUNCTUATION = {"：": ":", "，": ",", "｛": "{", "｝": "}", "［": "[", "］": "]", "【": "[", "】": "]"}
_CLOSER = {"{": "}", "[": "]"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORD = re.compile(r"[A-Za-z_]+")


def repair_call_body(body: str) -> tuple[ToolCall, ...] | None:
    """Read the text between the think marks after mending it; None if it still is no call. Never raises."""
    text = strip_fence(body)
    start = min((found for found in (text.find(mark) for mark in "{[｛［") if found >= 0), default=None)
    if start is None:
        return None
    for candidate in (text, _mend(text[start:])):
        requests = read_call_body(candidate)
        if not isinstance(requests, CallFailure):
            return requests
    return None


def _mend(text: str) -> str:
    """Rewrite `text`, which begins with a bracket, as the JSON it was most likely meant to be."""
    written: list[str] = []
    open_brackets: list[str] = []
    position = 0
    while position < len(text):
        character = _PUNCTUATION.get(text[position], text[position])
        if character in _CLOSING_QUOTES:
            string, position = _read_string(text, position)
            written.append(string)
            continue
        word = _WORD.match(text, position)
        if word:
            written.append(_PYTHON_WORDS.get(word[0], word[0]))
            position = word.end()
            continue
        if character in _CLOSER:
            open_brackets.append(character)
        elif character in "}]":
            if not open_brackets or _CLOSER[open_brackets.pop()] != character:
                return text
            _drop_trailing_comma(written)
        written.append(character)
        position += 1
        if not open_brackets:
            break  # the object is complete; what follows is no part of the call
    _drop_trailing_comma(written)
    return "".join(written) + "".join(_CLOSER[bracket] for bracket in reversed(open_brackets))


def _read_string(text: str, start: int) -> tuple[str, int]:
    """Return the string that opens at `start` as JSON, and the position after it; an open end is closed."""
    closing = _CLOSING_QUOTES[text[start]]
    content: list[str] = []
    position = start + 1
    while position < len(text) and text[position] not in closing:
        if text[position] == "\\" and position + 1 < len(text):
            escaped = text[position + 1]
            content.append(escaped if escaped in "'“”‘’" else "\\" + escaped)
            position += 2
            continue
        content.append('\\"' if text[position] == '"' else text[position])
        position += 1
    return '"' + "".join(content) + '"', position + 1


def _drop_trailing_comma(written: list[str]) -> None:
    while written and not written[-1].strip():
        written.pop()
    if written and written[-1] == ",":
        written.pop()
