"""List what an audit can find wrong with a dataset, and collect findings with examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from agentft.data.conversation import Origin

_MAX_TOPICS = 10_000
"""Distinct topics counted for one code: bounds memory where every record has a tool name of its own."""


class Level(StrEnum):
    """How serious a kind of finding is."""

    broken = "broken"
    """An invariant of agentft does not hold: training on this data would be wrong. The audit fails."""
    warning = "warning"
    """A flaw of the data; the audit fails where `audit.fail_on` names it."""
    note = "note"
    """Worth knowing."""


CODES: dict[str, tuple[Level, str]] = {
    "label_in_context": (Level.broken, "a label lies on text that is not the agent's own"),
    "label_missing": (Level.broken, "words of the agent have no label"),
    "no_label": (Level.broken, "a conversation that trains nothing"),
    "user_side_straddles": (Level.broken, "the same user side in training and held-out part"),
    "content_straddles": (Level.broken, "the same conversation in training and held-out part"),
    "empty_part": (Level.broken, "the split leaves a part without conversations"),
    "too_many_set_aside": (Level.broken, "more rows set aside than dataset.max_rejected allows"),
    "label_untraced": (Level.warning, "labels that could not be traced back to the record's own text"),
    "unreadable_call": (Level.warning, "a call whose JSON cannot be read"),
    "unknown_tool": (Level.warning, "a call to a tool that the system text does not offer"),
    "call_without_tool_list": (Level.warning, "a call where the system text offers no tool at all"),
    "missing_parameter": (Level.warning, "a call without a parameter that its tool requires"),
    "undeclared_parameter": (Level.warning, "a call with a parameter that its tool does not declare"),
    "argument_breaks_schema": (Level.warning, "an argument that its declared type, range or choice does not allow"),
    "argument_as_text": (Level.note, "an argument of the declared type, but written as text"),
    "flawed_tool_entry": (Level.warning, "an entry of the tool list that is not in order"),
    "exec_without_call": (Level.warning, "a tool result that no call asked for; set aside"),
    "empty_summary": (Level.warning, "a turn that ends with a tool result: nothing is said to the user"),
    "ends_with_call": (Level.note, "a turn that ends with a call: it teaches calling, not summing up"),
    "untrained_step": (
        Level.note,
        "a step that its source does not want trained: shown as context, not asked in evaluation",
    ),
    "duplicate": (Level.warning, "the same id and content once more; set aside"),
    "duplicate_id": (Level.warning, "the same id with other content; renamed"),
    "duplicate_content": (Level.warning, "the same content under another id"),
    "duplicate_user_side": (Level.note, "the same user side with other answers or tools"),
    "near_duplicate_across_split": (Level.warning, "a held-out user turn that nearly equals one of training"),
    "too_long": (Level.warning, "longer than dataset.max_length"),
}
"""Code -> level and meaning, in the order of a report."""


@dataclass(frozen=True, slots=True)
class Example:
    """One place where something was found."""

    origin: Origin
    id: str | None
    detail: str


@dataclass(slots=True)
class Finding:
    """All places of one code: counted, and the first few kept."""

    code: str
    count: int = 0
    conversations: int = 0
    topics: Counter[str] = field(default_factory=Counter)
    """What it was about, a tool or a reason, each with its count."""
    examples: list[Example] = field(default_factory=list)
    """At most one a conversation."""
    last: Origin | None = None

    @property
    def level(self) -> Level:
        return CODES[self.code][0]

    @property
    def meaning(self) -> str:
        return CODES[self.code][1]


class Findings:
    """Collects findings; memory is bounded by the number of codes, not of findings."""

    def __init__(self, examples: int) -> None:
        self._kept = examples
        self._by_code: dict[str, Finding] = {}

    def add(self, code: str, origin: Origin, name: str | None, detail: str, *, topic: str = "") -> bool:
        """Count one finding in conversation `name`; true where it became one of the examples."""
        if code not in CODES:
            raise KeyError(code)
        finding = self._by_code.setdefault(code, Finding(code))
        finding.count += 1
        if topic and (topic in finding.topics or len(finding.topics) < _MAX_TOPICS):
            finding.topics[topic] += 1
        if finding.last == origin:
            return False
        finding.last = origin
        finding.conversations += 1
        if len(finding.examples) >= self._kept:
            return False
        finding.examples.append(Example(origin, name, detail))
        return True

    def __getitem__(self, code: str) -> Finding:
        """The finding of a code, empty where there is none."""
        return self._by_code.get(code) or Finding(code)

    def all(self) -> list[Finding]:
        """Return what was found, in the order of `CODES`."""
        return [self._by_code[code] for code in CODES if code in self._by_code]

    def failing(self, fail_on: list[str]) -> list[Finding]:
        """Return what makes the audit fail: broken invariants, and the codes that the user chose."""
        return [finding for finding in self.all() if finding.level is Level.broken or finding.code in fail_on]
