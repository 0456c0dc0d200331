"""Lists and objects that arrive as text: JSON, or the `repr` of a Python list as ModelScope gives MSAgent-Bench.

Nothing is ever evaluated. A Python literal goes to `ast.literal_eval` only when it is short enough, made of literal
tokens alone (strings, numbers, None, True, False, brackets, commas, colons) and flat enough; the usual list of
`{'from': ..., 'value': ...}` is read by a pattern, about twice as fast.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from agentft.data.grammar import JsonRefused, read_json

MAX_LITERAL_CHARACTERS = 4 * 1024 * 1024
"""Longer Python literals are refused: parsing takes about thirty times their size in memory."""

MAX_LITERAL_DEPTH = 40

_STRING = r"""(?:'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")"""
_TURN = re.compile(r"\{'from': ('[^'\\\n]*'), 'value': (" + _STRING + r")\}(, |\]\Z)", re.DOTALL)
_UNUSUAL_ESCAPE = re.compile(r"""\\(?![n'"rt])""")
_LITERAL_TOKENS = re.compile(
    rf"(?:{_STRING}|[\[\]{{}}(),:\s]|(?:None|True|False)\b|-?\d[\d.]*(?:[eE][+-]?\d+)?(?![\w.]))", re.DOTALL
)


class LiteralError(ValueError):
    """The text is neither JSON nor a plain Python literal under the limits of this module."""


def read_literal(text: str) -> Any:
    """Read JSON text, or else the text of a Python literal.

    Raises:
        LiteralError: neither of both, or over a limit; the message says which.
    """
    turns = _read_turns_repr(text)
    if turns is not None:
        return turns
    try:
        return read_json(text)
    except JsonRefused as error:
        not_json = str(error)
    if len(text) > MAX_LITERAL_CHARACTERS:
        raise LiteralError(f"no JSON ({not_json}), and {len(text):,} characters are too many for a Python literal")
    _require_literal_tokens(text, not_json)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a `\d` in a string is a SyntaxWarning, not worth a line per record
            parsed = ast.parse(text.strip(), mode="eval")
            _refuse_equal_keys(parsed)
            # As JSON: a tuple is a list, and a number as a key is its digits.
            return json.loads(json.dumps(ast.literal_eval(parsed), allow_nan=False))
    except LiteralError:
        raise
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise LiteralError(f"neither JSON ({not_json}) nor a Python literal ({type(error).__name__})") from None


def _refuse_equal_keys(parsed: ast.Expression) -> None:
    for node in ast.walk(parsed):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if len(set(keys)) < len(keys):
                raise LiteralError(f"the key {str(max(keys, key=keys.count))[:40]!r} is given twice")


def _require_literal_tokens(text: str, not_json: str) -> None:
    """Refuse names, operators, prefixes and deep nesting before the parser sees them: it can exhaust the C stack."""
    position = depth = 0
    while position < len(text):
        match = _LITERAL_TOKENS.match(text, position)
        if match is None:
            found = text[position : position + 40]
            raise LiteralError(f"neither JSON ({not_json}) nor a literal: {found!r} at character {position}")
        if (token := match[0]) in "[{(":
            depth += 1
            if depth > MAX_LITERAL_DEPTH:
                raise LiteralError(f"nested deeper than {MAX_LITERAL_DEPTH} levels")
        elif token in "]})":
            depth -= 1
        position = match.end()


def _read_turns_repr(text: str) -> list[dict[str, str]] | None:
    """The list of a text written by `repr`, or None where the text is written in any other way."""
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
    """The characters of a Python string literal, None where it holds an escape that `repr` rarely writes."""
    if "\\" not in inner:
        return inner
    if "\0" in inner:
        return None
    text = inner.replace("\\\\", "\0")  # a pair stands for one backslash; set aside, it cannot start another escape
    if _UNUSUAL_ESCAPE.search(text):
        return None
    text = text.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"').replace("\\t", "\t").replace("\\r", "\r")
    return text.replace("\0", "\\")
