"""Read values that arrive as text: strict JSON, or the `repr` of a Python list as ModelScope gives MSAgent-Bench.

Nothing is ever evaluated. A Python literal goes to `ast.literal_eval` only when it is short enough, made of literal
tokens alone (strings, numbers, None, True, False, brackets, commas, colons) and flat enough; the usual list of
`{'from': ..., 'value': ...}` is read by a pattern, about four times as fast.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

from agentft.errors import FormatError

Json = Any
"""A value as `json.loads` returns it."""

MAX_JSON_DEPTH = 200
"""Deeper nesting is refused before parsing: the stock parser raises RecursionError near 1,000 levels."""

MAX_LITERAL_CHARACTERS = 4 * 1024 * 1024
"""Longer Python literals are refused: parsing takes about thirty times their size in memory."""

MAX_LITERAL_DEPTH = 40


class JsonRefused(ValueError):  # noqa: N818
    """The text is no JSON document, nor a Python literal where one may stand, under the limits of this module."""


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
_STRING = r"""(?:'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")"""
_TURN = re.compile(r"\{'from': ('[^'\\\n]*'), 'value': (" + _STRING + r")\}(, |\]\Z)", re.DOTALL)
_UNUSUAL_ESCAPE = re.compile(r"""\\(?![n'"rt])""")
_BRACKET_OR_STRING = re.compile(r"""[(\[{)\]}]|"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'""", re.DOTALL)
_LITERAL_TOKENS = re.compile(
    rf"(?:{_STRING}|[\[\]{{}}(),:\s]|(?:None|True|False)\b|-?\d[\d.]*(?:[eE][+-]?\d+)?(?![\w.]))", re.DOTALL
)


def strip_fence(text: str) -> str:
    """Return `text` without a surrounding Markdown code fence; the fence may be absent or lack its end."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    end = len(text) - 3 if len(text) >= 6 and text.endswith("```") else len(text)
    start = 3
    while start < end and text[start] in " \t":
        start += 1
    if text[start : start + 4].lower() == "json":
        start += 4
    return text[start:end].strip()


def read_json(text: str) -> Json:
    """Parse one JSON document, allowing raw control characters inside strings (genuine references hold them).

    Raises:
        JsonRefused: not JSON, NaN, Infinity or a number beyond it, deeper than `MAX_JSON_DEPTH`, a number too long to
            hold, a key given twice, or half of a surrogate pair (escaped, it is legal JSON and yet no text).
    """
    if json_depth(text) > MAX_JSON_DEPTH:
        raise JsonRefused(f"nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        value = _DECODER.decode(text)
    except JsonRefused:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonRefused(str(error)) from None
    if _SURROGATE_ESCAPE.search(text) and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise JsonRefused("a lone surrogate: cannot be written as UTF-8")
    return value


def json_depth(text: str) -> int:
    """Return how deeply the brackets of a JSON text are nested; 0 where there are too few of them for `MAX_JSON_DEPTH`."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return 0
    deepest = depth = 0
    for token in _STRING_OR_BRACKET.findall(text):
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> Json:
    raise JsonRefused(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonRefused(f"{digits[:40]} is beyond the numbers that can be held")
    return value


def _distinct_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonRefused(f"the key {max(keys, key=keys.count)[:40]!r} is given twice")
    return made


def is_json(text: str) -> bool:
    """Return whether `read_json` reads a text."""
    try:
        read_json(text)
    except JsonRefused:
        return False
    return True


_DECODER = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_distinct_keys
)


def is_encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_literal(text: str) -> Any:
    """Read JSON text, or else the text of a Python literal.

    Raises:
        JsonRefused: neither of both, or over a limit; the message says which.
    """
    turns = _read_turns_repr(text)
    if turns is not None:
        return turns
    try:
        return read_json(text)
    except JsonRefused as error:
        not_json = str(error)
    if len(text) > MAX_LITERAL_CHARACTERS:
        raise JsonRefused(f"no JSON ({not_json}), and {len(text):,} characters are too many for a Python literal")
    _require_literal_tokens(text, not_json)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a `\d` in a string is a SyntaxWarning, not worth a line per record
            parsed = ast.parse(text.strip(), mode="eval")
            _refuse_equal_keys(parsed)
            # As JSON: a tuple is a list, and a number as a key is its digits.
            return json.loads(json.dumps(ast.literal_eval(parsed), allow_nan=False))
    except JsonRefused:
        raise
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise JsonRefused(f"neither JSON ({not_json}) nor a Python literal ({type(error).__name__})") from None


def literal(text: str, reason: str) -> Any:
    """Read JSON text or a Python literal.

    Raises:
        FormatError: it is neither; with that reason.
    """
    try:
        return read_literal(text)
    except JsonRefused as error:
        raise FormatError(reason, str(error)) from None


def _refuse_equal_keys(parsed: ast.Expression) -> None:
    for node in ast.walk(parsed):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if len(set(keys)) < len(keys):
                raise JsonRefused(f"the key {str(max(keys, key=keys.count))[:40]!r} is given twice")


def _require_literal_tokens(text: str, not_json: str) -> None:
    """Refuse names, operators, prefixes and deep nesting before the parser sees them: it can exhaust the C stack."""
    position = depth = 0
    while position < len(text):
        match = _LITERAL_TOKENS.match(text, position)
        if match is None:
            found = text[position : position + 40]
            raise JsonRefused(f"neither JSON ({not_json}) nor a literal: {found!r} at character {position}")
        if (token := match[0]) in "[{(":
            depth += 1
            if depth > MAX_LITERAL_DEPTH:
                raise JsonRefused(f"nested deeper than {MAX_LITERAL_DEPTH} levels")
        elif token in "]})":
            depth -= 1
        position = match.end()


def _read_turns_repr(text: str) -> list[dict[str, str]] | None:
    """Return the list of a text written by `repr`, or None where the text is written in any other way."""
    if not text.startswith("[{'from': "):
        return None
    turns: list[dict[str, str]] = []
    position = 1
    while (match := _TURN.match(text, position)) is not None:
        value = _unescape(match[2][1:-1])
        if value is None:
            return None
        turns.append({"from": match[1][1:-1], "value": value})
        position = match.end()
    return turns if position == len(text) and text.endswith("]") else None


def _unescape(inner: str) -> str | None:
    """Return the characters of a Python string literal, None where it holds an escape that `repr` rarely writes."""
    if "\\" not in inner:
        return inner
    if "\0" in inner:
        return None
    text = inner.replace("\\\\", "\0")  # a pair stands for one backslash; set aside, it cannot start another escape
    if _UNUSUAL_ESCAPE.search(text):
        return None
    text = text.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"').replace("\\t", "\t").replace("\\r", "\r")
    return text.replace("\0", "\\")


def end_of_bracket(text: str, start: int) -> int | None:
    """Return the position behind the bracket that closes the one at `start`, strings passed over; None: it is not closed."""
    depth, at = 0, start
    while (found := _BRACKET_OR_STRING.search(text, at)) is not None:
        at = found.end()
        token = found[0]
        if len(token) == 1 and token in "([{":
            depth += 1
        elif len(token) == 1 and token in ")]}":
            depth -= 1
            if depth == 0:
                return at
    return None


def kind_of(value: Json) -> str:
    """Return what a value is, for a message about it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
