"""Builds turns in MSAgent form out of texts, calls and results that come from another layout.

What goes in comes out: each assistant value is parsed again and compared with its pieces, so a text can never turn into
a call or a tool's output. Where it would, the record is refused.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from agentft.data.grammar import (
    EXEC_CLOSE,
    EXEC_OPEN,
    MARK,
    THINK_CLOSE,
    THINK_OPEN,
    GrammarError,
    JsonRefused,
    Part,
    Text,
    parse_assistant,
    read_json,
)
from agentft.data.untrained import MarkedTurn, steps_with

TOOLS_INTRODUCTION = (
    "These tools can be called. To call one, write JSON with the fields api_name and parameters between "
    f"{THINK_OPEN} and {THINK_CLOSE}; answer from its result, or answer directly where no tool is needed:"
)
"""Stands before the numbered tool list of a converted record, whose own form has no words for it."""


class FormError(ValueError):
    """A record that cannot be converted; `reason` is a stable snake_case code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class TurnBuilder:
    """Collects turns; texts, calls and observations between two user turns become one assistant value."""

    def __init__(self) -> None:
        self.turns: list[dict[str, str]] = []
        self.trained = True
        """Whether what is said and called from now on is to be trained."""
        self._pieces: list[tuple[Literal["text", "call", "observation"], str]] = []
        self._untrained: set[int] = set()

    def system(self, text: str, tools: list[dict[str, Any]]) -> None:
        """The leading system turn, with the tool list behind its text; none where both are empty."""
        blocks = [text] if text else []
        if tools:
            blocks.append(TOOLS_INTRODUCTION)
            blocks += [f"{n}. {json.dumps(tool, ensure_ascii=False)}" for n, tool in enumerate(tools, 1)]
        if blocks:
            self.turns.append({"from": "system", "value": "\n\n".join(blocks)})

    def user(self, text: str) -> None:
        """A user turn, which ends the assistant's."""
        self.end_assistant()
        self.turns.append({"from": "user", "value": text})

    def say(self, text: str) -> None:
        """A text of the assistant, kept letter by letter."""
        if (found := MARK.search(text)) is not None:
            raise FormError(
                "marks_in_text",
                f"a text of the assistant holds the mark {found[0]}: in MSAgent form it would be structure. A record "
                "written in marks needs the MSAgent names: conversations, from, value, user, assistant",
            )
        if self._pieces and self._pieces[-1][0] == "text":
            raise FormError("two_assistant_turns", "two texts of the assistant in a row")
        self._add("text", text)

    def call(self, name: object, arguments: object) -> None:
        """`arguments` is an object, or its JSON text, which is kept letter by letter."""
        if not isinstance(name, str) or not name.strip():
            raise FormError("call_without_name", "a tool call has no name")
        body = f'{{"api_name": {json.dumps(name, ensure_ascii=False)}, "parameters": {_arguments_text(arguments)}}}'
        if MARK.search(body):
            body = body.replace("<|", "\\u003c|")  # the same JSON; a bracket can stand in its strings only
        self._add("call", f"{THINK_OPEN}```JSON\n{body}\n```{THINK_CLOSE}")

    def observe(self, text: str) -> None:
        """The result of the first call that has none yet; fenced where it is JSON."""
        if (found := MARK.search(text)) is not None:
            raise FormError("marks_in_text", f"the result of a tool holds the mark {found[0]}")
        fenced = f"```JSON\n{text}\n```" if _is_json(text) else text
        self._add("observation", f"{EXEC_OPEN}{fenced}{EXEC_CLOSE}")

    def end_assistant(self) -> None:
        """Close the assistant turn that is being collected, if any."""
        if not self._pieces:
            return
        value = ""
        before = None
        for kind, source in self._pieces:
            if before is not None:
                value += "\n\n" if before == "call" else "\n"
            value += source
            before = kind
        parts = self._require_same(value)
        turn = MarkedTurn({"from": "assistant", "value": value})
        places = [at for at, part in enumerate(parts) if not isinstance(part, Text) or part.source.strip()]
        turn.untrained = steps_with((places[piece] for piece in self._untrained), parts)
        self.turns.append(turn)
        self._pieces, self._untrained = [], set()

    def _add(self, kind: Literal["text", "call", "observation"], source: str) -> None:
        if not self.trained and kind != "observation":
            self._untrained.add(len(self._pieces))
        self._pieces.append((kind, source))

    def _require_same(self, value: str) -> tuple[Part, ...]:
        """The parts of an assistant value, which are its pieces."""
        try:
            parts = parse_assistant(value)
        except GrammarError as error:
            raise FormError(error.reason, error.detail) from None
        found = [part.source.strip() for part in parts if not isinstance(part, Text) or part.source.strip()]
        if found != [source.strip() for _, source in self._pieces]:
            raise FormError("not_representable", "texts, calls and results of the turn would read as another turn")
        return parts


def _arguments_text(arguments: object) -> str:
    if isinstance(arguments, str):
        text = arguments.strip() or "{}"
        try:
            value = read_json(text)
        except JsonRefused as error:
            raise FormError("arguments_not_json", str(error)) from None
    else:
        value = {} if arguments is None else arguments
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise FormError("arguments_not_json", str(error)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormError("arguments_not_an_object", "the arguments of a call are no object with names")
    return text


def _is_json(text: str) -> bool:
    try:
        read_json(text)
    except JsonRefused:
        return False
    return True
