"""Read the text of a model, as a prediction or a reference: calls and answer, or the reason why a call is none.

Mended: trailing commas, Python dicts (single quotes, True, False, None), full-width or curly quotes and full-width
punctuation, missing closing quotes and brackets at the end, raw text around the object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from agentft.data.calls import PYTHON_WORDS, Call, CallFailure, Said, ToolCall, strip_fence
from agentft.data.conversation import EXEC_OPEN, THINK_CLOSE, THINK_OPEN
from agentft.data.msagent import call_text, read_call_body

END_OF_SEQUENCE_TEXTS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""How the end tokens of common models read when they are decoded to text."""

USER_TAGS = ("<|user|>", "<|im_start|>user", "<|start_header_id|>user")
"""A model that goes on after its own turn writes the next question itself; nothing from there on is its answer."""

_ROLE_HEADER = re.compile(
    r"\A\s*(?:<\|assistant\|>[ \t]*[:：]?"
    r"|<\|im_start\|>assistant\b"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>)"
)


def parse_reply(text: str) -> Said:
    """Read one assistant step of MSAgent text: strip the role header, cut what is not the agent's, tell calls from text.

    A text of `END_OF_SEQUENCE_TEXTS` stays, unless it stands at the end or before the header of another turn. Never raises:
    whatever a model writes is data.
    """
    return Said(tuple(_pieces(_ROLE_HEADER.sub("", text, count=1))))


def own_words(text: str) -> str:
    """Return an MSAgent text up to where the model speaks for a tool, the user or the system."""
    kept = without_end(text)
    for span in _structure("<|system|>").finditer(kept):
        if (at := _cut_at(span, "<|system|>")) is not None:
            return kept[:at].strip()
    return kept.strip()


def without_end(text: str, ends: Sequence[str] = END_OF_SEQUENCE_TEXTS) -> str:
    """Return a text without the stops at its very end; one without a stop as it is."""
    kept = text.rstrip()
    while (end := next((end for end in ends if end and kept.endswith(end)), None)) is not None:
        text = kept = kept.removesuffix(end).rstrip()
    return text


def with_msagent_calls(said: Said) -> Said:
    """Return a step in which MSAgent calls within its texts are calls: a model that answers with them called all the same."""
    pieces: list[str | Call] = []
    for piece in said.pieces:
        pieces += parse_reply(piece).pieces if isinstance(piece, str) and THINK_OPEN in piece else (piece,)
    return replace(said, pieces=tuple(pieces))


def msagent_text(said: Said) -> str:
    """Write a step in MSAgent form without its reasoning; a mark that a text spells gets a blank, so it reads as the same."""
    pieces = []
    for piece in said.pieces:
        if isinstance(piece, str):
            pieces.append(piece if THINK_OPEN in piece else _MARKS.sub("< ", piece))
        elif piece.failure is None:
            pieces.append("\n".join(map(call_text, piece.requests)))
        else:
            pieces.append(f"{THINK_OPEN}{_unreadable(piece.source)}{THINK_CLOSE}")
    return "".join(pieces).strip()


def _pieces(text: str) -> Iterator[str | Call]:
    """Yield texts and calls up to where the agent's own words end."""
    text = without_end(text)
    end = 0
    for span in _structure().finditer(text):
        yield text[end : span.start()]
        cut = _cut_at(span)
        if span["body"] is not None:
            body = span["body"] if cut is None else text[span.start("body") : cut]
            yield _read_attempt(body, closed=cut is None and span["closed"] is not None)
        if cut is not None:
            return
        end = span.end()
    yield text[end:]


def _cut_at(span: re.Match[str], *tags: str) -> int | None:
    """Return where a span of a text ends the agent's own words; None where it is a call that ends none."""
    body = span["body"]
    if body is None:
        return span.start()
    cut = _cutting(*tags).search(body)
    # In a call that can be read, such a mark can stand in a string only, where it is letters.
    if cut is None or (span["closed"] is not None and not isinstance(read_call_body(body), CallFailure)):
        return None
    return span.start("body") + cut.start()


_HEADERS = r"<\|(?:im_start|start_header_id|user|assistant|system|observation|turn)\|?>|<｜(?:User|Assistant)｜>"
_MARKS = re.compile(
    "<(?=" + "|".join(re.escape(mark[1:]) for mark in (EXEC_OPEN, THINK_CLOSE, *USER_TAGS, *END_OF_SEQUENCE_TEXTS))
    + r"|\|assistant\|>|\|im_start\|>|\|start_header_id\|>)"
)  # fmt: skip


@cache
def _cutting(*tags: str) -> re.Pattern[str]:
    """Return what finds the end of the agent's own words: a mark of another, of `tags` too, or an end before a turn."""
    marks = "|".join(map(re.escape, (EXEC_OPEN, *USER_TAGS, *tags)))
    ends = "|".join(map(re.escape, END_OF_SEQUENCE_TEXTS))
    return re.compile(rf"{marks}|(?:{ends})\s*(?={_HEADERS})")


@cache
def _structure(*tags: str) -> re.Pattern[str]:
    # Non-greedy: a second, invented call must not swallow a correct first one.
    span = rf"{re.escape(THINK_OPEN)}(?P<body>.*?)(?:(?P<closed>{re.escape(THINK_CLOSE)})|\Z)"
    return re.compile(f"{span}|{_cutting(*tags).pattern}", re.DOTALL)


def _unreadable(body: str) -> str:
    """The body of a malformed call, so that it is no call in MSAgent form either."""
    body = body.replace("<|", "< |")
    return body if isinstance(read_call_body(body), CallFailure) else f"malformed: {body}"


def _read_attempt(body: str, *, closed: bool) -> Call:
    unclosed = CallFailure("unclosed", f"no {THINK_CLOSE} after the call")
    read = read_call_body(body) if closed else unclosed
    return Call(body, (), read) if isinstance(read, CallFailure) else Call(body, read, None)


_CLOSING_QUOTES = {'"': '"', "'": "'", "“": "”“", "＂": "＂", "‘": "’‘", "＇": "＇"}
_PUNCTUATION = {"：": ":", "，": ",", "｛": "{", "｝": "}", "［": "[", "］": "]", "【": "[", "】": "]"}
_CLOSER = {"{": "}", "[": "]"}
_STRINGS = "|".join(rf"{quote}((?:\\.|[^\\{ends}])*)[{ends}]?" for quote, ends in _CLOSING_QUOTES.items())
_TOKEN = re.compile(rf"{_STRINGS}|[A-Za-z_]+|.", re.DOTALL)
_ESCAPE_OR_QUOTE = re.compile(r'\\(.)|"', re.DOTALL)


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
    for found in _TOKEN.finditer(text):
        inside = next((group for group in found.groups() if group is not None), None)
        token = _PUNCTUATION.get(found[0], found[0])
        if inside is not None:
            token = f'"{_ESCAPE_OR_QUOTE.sub(_as_json_escape, inside)}"'
        elif token in _CLOSER:
            open_brackets.append(token)
        elif token in ("}", "]"):
            if not open_brackets or _CLOSER[open_brackets.pop()] != token:
                return text
            _drop_trailing_comma(written)
        written.append(PYTHON_WORDS.get(token, token))
        if not open_brackets:
            break  # the object is complete; what follows is no part of the call
    _drop_trailing_comma(written)
    return "".join(written) + "".join(_CLOSER[bracket] for bracket in reversed(open_brackets))


def _as_json_escape(found: re.Match[str]) -> str:
    escaped: str | None = found[1]
    if escaped is None:
        return '\\"'
    return escaped if escaped in "'“”‘’" else found[0]


def _drop_trailing_comma(written: list[str]) -> None:
    while written and (written[-1] == "," or not written[-1].strip()):
        if written.pop() == ",":
            return
