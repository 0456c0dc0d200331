"""Cut conversations into steps, each a context and a reference, and score what a model says at one.

A step is one assistant segment between tool results. Its reference decides its kind: an *action step* holds at least
one call, an *answer step* none. Scores are counts that add up to every metric, so that conversations can be resampled
and runs compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import takewhile, zip_longest
from typing import Any

from agentft.data.calls import Call, CallFailure, Said, ToolCall, parameter_types
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import any_of
from agentft.data.conversation import Conversation, Message
from agentft.data.msagent import GrammarError, as_msagent, read_system
from agentft.data.render import MsagentTemplate
from agentft.data.response import said_text, thought_template
from agentft.data.response_choice import choose_response
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, Ids
from agentft.evaluation.matching import (
    CallPair,
    LegacyStep,
    align_calls,
    detect_language,
    legacy_step,
    rouge_l,
    strictly_equal,
)
from agentft.evaluation.parse import (
    END_OF_SEQUENCE_TEXTS,
    USER_TAGS,
    msagent_text,
    parse_reply,
    repair_call_body,
    with_msagent_calls,
    without_end,
)

_PROMPT_END = 32
"""Tokens of the prompt that are looked at for a thought that it opens."""


@dataclass(frozen=True)
class ReplyReader:
    """Reads what a model says in the layout of a chat template."""

    layout: ChatLayout

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion; letters that spell a control token are told from the token."""
        return said_text(ids, self.layout.template.tokenizer, self._control)

    def prompt_end(self, ids: Sequence[int]) -> str:
        """Return the text of the last tokens of a prompt."""
        text: str = self.layout.template.tokenizer.decode(ids[-_PROMPT_END:], skip_special_tokens=False)
        return text

    def read(self, text: str, prompt: str, types: Mapping[Any, tuple[str, ...]], *, calls: bool) -> Said:
        """Take a completion apart. Where the layout cannot be read, one that should call (`calls`) is a failed call."""
        traits = self.layout.traits
        ends = tuple(dict.fromkeys((*traits.stops, *traits.call_stops, *END_OF_SEQUENCE_TEXTS)))
        kept = without_end(text, ends)
        # Another turn is not what this one says.
        control = self.layout.template.control_tokens
        tags = any_of(tag for tag in USER_TAGS if tag.startswith(control))
        if (other := re.search(f"(?:{any_of(ends)})\\s*(?={any_of(control)})|{tags}", kept)) is not None:
            kept = kept[: other.start()]
        response = choose_response(self.layout)
        if response is not None:
            said = response.read(kept, prompt, types)
            return said if traits.reasoning else replace(said, thought=None)
        return Said(
            (Call(kept, (), CallFailure("not_read", "no response template reads this layout")),) if calls else (kept,)
        )

    @cached_property
    def _control(self) -> dict[int, str]:
        tokens = self.layout.template.control_tokens
        return dict(zip(self.layout.template.tokenizer.convert_tokens_to_ids(list(tokens)), tokens, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a held-out conversation. Its context is everything before it: complete reference history."""

    conversation: Conversation
    index: int
    """0, 1, ... among the steps that are asked for."""
    at: int
    """Position of its message in the conversation."""
    input_ids: Ids
    """The whole conversation, shape [T], shared by its steps."""
    start: int
    """Length of the context: `input_ids[:start]` is the prompt."""
    stop: int
    """Position after the reference's stop token."""
    reference: str
    """In MSAgent form, whatever the layout: scores are comparable across layouts."""
    reader: ReplyReader | None = None
    """Of the layout of a chat template."""

    @property
    def message(self) -> Message:
        """The reference as a message."""
        return self.conversation.messages[self.at]

    @property
    def user(self) -> str:
        """The user's message that this step answers."""
        return next(m.text for m in reversed(self.conversation.messages[: self.at]) if m.role == "user")

    @property
    def observations(self) -> list[str]:
        """Return what tools returned just before this step."""
        results = list(takewhile(lambda m: m.role == "tool", reversed(self.conversation.messages[: self.at])))
        return [each.source_text.strip() or each.text for each in reversed(results)]

    @property
    def offered(self) -> list[tuple[str, list[str] | None]]:
        """Return each offered tool with the sorted names of its parameters, None where they are not known."""
        tools = self.conversation.offered
        return [(t.name, None if t.parameter_names is None else sorted(t.parameter_names)) for t in tools]

    @property
    def context_hash(self) -> str:
        """Digest of the ids of the prompt."""
        return hashlib.sha256(self.input_ids[: self.start].tobytes()).hexdigest()[:16]

    @property
    def key(self) -> tuple[str, int, str]:
        """Name the step: its conversation, its number and its context."""
        return self.conversation.id, self.index, self.context_hash

    def record(self, prediction: str, seen_tools: frozenset[str] | None = None) -> StepRecord:
        """Join the step with a completion, in MSAgent form; `seen_tools` are the tools that training called."""
        conversation = self.conversation
        called = conversation.called_tools
        replies: dict[str, Any] = {}
        reference = self.reference
        if self.reader is not None:
            expected = _said(self.message)
            prompt = self.reader.prompt_end(self.input_ids[: self.start].tolist())
            said = self.reader.read(prediction, prompt, self._types, calls=bool(self.message.tool_calls))
            prediction, reference = msagent_text(said), reference or msagent_text(expected)
            replies = {"prediction_reply": with_msagent_calls(said), "reference_reply": with_msagent_calls(expected)}
        elif any(message.reasoning_content for message in conversation.messages):
            said, expected = thought_template().read(prediction), _said(self.message)
            prediction = "".join(piece for piece in said.pieces if isinstance(piece, str)).strip()
            for name, text, read in (("prediction", prediction, said), ("reference", reference, expected)):
                reply = parse_reply(text)
                replies[f"{name}_reply"] = replace(reply, reasoning=read.reasoning, thought=read.thought)
        return StepRecord(
            conversation_id=conversation.id,
            piece_of=conversation.piece_of,
            step=self.index,
            reference=reference,
            prediction=prediction,
            offered=by_name(self.offered) or None,
            language=conversation.language,
            rounds=conversation.rounds,
            seen_tool=called <= seen_tools if seen_tools is not None and called else None,
            **replies,
        )

    @property
    def _types(self) -> dict[Any, tuple[str, ...]]:
        conversation = self.conversation
        tools = conversation.tools or read_system(conversation.system).tools
        return parameter_types(tools, conversation.tool_calls)


def conversation_steps(conversation: Conversation, example: Example, template: Layout) -> list[Step]:
    """Return the steps of one conversation in order; `example` is its tokenised form."""
    reader = None if isinstance(template, MsagentTemplate) else ReplyReader(template)
    # A chat template also says what MSAgent text cannot.
    with suppress(GrammarError) if reader is not None else nullcontext():
        conversation = as_msagent(conversation)
    messages = enumerate(conversation.with_context_only(example.context_rounds))
    asked = [at for at, (message, context_only) in messages if message.role == "assistant" and not context_only]
    return [
        Step(
            conversation, index, at, example.input_ids, start, stop,
            conversation.messages[at].source_text.strip(), reader,
        )
        for index, (at, (start, stop)) in enumerate(zip(asked, example.steps(), strict=True))
    ]  # fmt: skip


def all_steps(conversations: Iterable[Conversation], examples: Sequence[Example], template: Layout) -> list[Step]:
    """Return the steps of many conversations, in order."""
    by_id = {example.id: example for example in examples}
    return [step for c in conversations if c.id in by_id for step in conversation_steps(c, by_id[c.id], template)]


def _said(message: Message) -> Said:
    """Return a message as if it had been read."""
    attempts = [Call("", (call,), None) for call in message.tool_calls]
    pieces: tuple[str | Call, ...] = (*[message.text] * bool(message.text.strip()), *attempts)
    reasoning = (message.reasoning_content or "").strip()
    return Said(pieces, reasoning, True if reasoning else None)


MALFORMED = "<malformed>"
"""Stands in the confusion list for a call without a readable name."""


Offered = dict[str, tuple[str, ...] | None]
"""Tool that a conversation offers -> names of its parameters; None: they are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step to be scored."""

    conversation_id: str
    piece_of: str | None = None
    """Id of the whole, where this conversation is one of the pieces of a longer one; intervals take the pieces together."""
    step: int
    """0, 1, ... through the whole conversation."""
    reference: str
    """Raw assistant text of the data."""
    prediction: str
    """Raw text of the model."""
    offered: Offered | None = None
    """Tools the conversation offers; None: not known, and the step stays out of the two `hallucinated_*` rates."""
    language: str | None = None
    """None: told from the script of the conversation's references, see `detect_language`."""
    rounds: int | None = None
    """User turns of the conversation."""
    seen_tool: bool | None = None
    """Whether the tool this step calls was called in training."""
    after_call: bool | None = None
    """Whether an answer step sums up a tool result; None: whether the previous step's reference calls."""
    reference_reply: Said | None = None
    """The reference as it was read in another layout than MSAgent's; None: the text is read."""
    prediction_reply: Said | None = None
    """The same of the prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """Counts of one step. Unless said otherwise a field is 0 or empty where it does not apply."""

    conversation_id: str
    piece_of: str | None = None
    """Id of the whole, where this conversation is one of the pieces of a longer one."""
    step: int
    reference_hash: str
    """First 16 hex digits of the SHA-256 of the raw reference: two runs are of the same evaluation if these agree."""
    reference_failure: str | None = None
    """Why the reference cannot be read; such a step is quarantined and all counts but `legacy` are 0."""
    is_action: bool = False
    predicts_call: bool = False
    """The prediction attempts a call, well formed or not."""
    reference_calls: int = 0
    attempts: int = 0
    """Calls the prediction attempts: well-formed ones (an array counts each of its calls) and malformed spans."""
    wellformed: int = 0
    name_correct: int = 0
    exact: int = 0
    lenient: int = 0
    argument_f1: float = 0.0
    """Sum of the paper's F1 over reference calls."""
    full_matches: int = 0
    reference_arguments: int = 0
    predicted_arguments: int = 0
    """Arguments of all well-formed predicted calls, spurious and wrong ones too."""
    url_references: int = 0
    """Name-correct calls whose reference gives a url."""
    url_matches: int = 0
    offered_attempts: int = 0
    """`attempts` where the offered tools are known."""
    hallucinated_tools: int = 0
    schema_arguments: int = 0
    """Arguments of predicted calls to tools whose schema is known."""
    hallucinated_arguments: int = 0
    repaired_calls: int = 0
    """Calls won back by `repair_call_body`; the four `_repaired` counts include them."""
    name_correct_repaired: int = 0
    exact_repaired: int = 0
    argument_f1_repaired: float = 0.0
    attempts_repaired: int = 0
    thoughts: int = 0
    """1 where the reference or the prediction thinks before it speaks."""
    wellformed_thoughts: int = 0
    """1 where the prediction does, and opens and closes its thoughts as the chat template asks."""
    rouge_l: float | None = None
    """F1 of an answer step; None on action steps and where the reference has no token."""
    after_call: bool | None = None
    """Answer steps only; None: not known."""
    language: str = "en"
    rounds: int | None = None
    seen_tool: bool | None = None
    confusions: tuple[tuple[str | None, str | None], ...] = ()
    """(reference tool, predicted tool) of calls without a partner of equal name; None: no call on that side."""
    errors: tuple[str, ...] = ()
    """Kinds of error, each once: missed_call, spurious_call, missing_call, extra_call, wrong_tool, malformed,
    missing_argument, extra_argument, wrong_value, hallucinated_tool, hallucinated_argument."""
    legacy: LegacyStep = field(default_factory=LegacyStep)

    @property
    def is_exact(self) -> bool:
        """Return whether every reference call is met exactly and nothing else is called."""
        return self.exact == self.reference_calls == self.attempts

    @property
    def is_exact_repaired(self) -> bool:
        """The same after repair."""
        return self.exact_repaired == self.reference_calls == self.attempts_repaired

    @property
    def key(self) -> tuple[str, int]:
        """Return conversation and step."""
        return self.conversation_id, self.step

    @property
    def whole_id(self) -> str:
        """The conversation that was recorded as one: what is drawn, and counted, as one."""
        return self.conversation_id if self.piece_of is None else self.piece_of

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` restores the score."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepScore:
        """Restore a score written by `to_json`; unknown fields raise TypeError."""
        fields = {name: each for name, each in value.items() if name != "rouge_l_jieba"}  # of earlier versions
        legacy = dict(fields["legacy"])
        fields["legacy"] = LegacyStep(**legacy | {name: tuple(legacy[name]) for name in ("actions", "inputs")})
        fields["confusions"] = tuple((reference, predicted) for reference, predicted in fields["confusions"])
        fields["errors"] = tuple(fields["errors"])
        return cls(**fields)


def score_step(record: StepRecord) -> StepScore:
    """Score one step of `complete_records`. Never raises on what reference or prediction contain."""
    reference = record.reference_reply or parse_reply(record.reference)
    prediction = record.prediction_reply or parse_reply(record.prediction)
    failure = next(iter(reference.failures), None)
    common: dict[str, Any] = {
        "conversation_id": record.conversation_id,
        "piece_of": record.piece_of,
        "step": record.step,
        "reference_hash": hashlib.sha256(record.reference.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "language": record.language or detect_language(record.reference),
        "rounds": record.rounds,
        "seen_tool": record.seen_tool,
        "legacy": legacy_step(record.reference, record.prediction),
    }
    if failure is not None:
        return StepScore(**common, reference_failure=f"{failure.reason}: {failure.detail}")
    counts = _call_counts(record, reference, prediction)
    if not reference.attempts:
        after_call = False if record.after_call is None and record.step == 0 else record.after_call
        counts |= {"rouge_l": rouge_l(reference.text, prediction.text), "after_call": after_call}
    return StepScore(**common, **counts)


def complete_records(records: Iterable[StepRecord]) -> list[StepRecord]:
    """Fill in what only the whole conversation tells; values that are given stay.

    `after_call` of an answer step is whether the reference of the step before it calls; `offered` is the union over the
    conversation; `language` is told from all its references together.
    """
    records = list(records)
    conversations: dict[str, dict[int, StepRecord]] = defaultdict(dict)
    for record in records:
        conversations[record.conversation_id][record.step] = record
    completed = {name: _complete_conversation(steps) for name, steps in conversations.items()}
    return [completed[record.conversation_id][record.step] for record in records]


def _complete_conversation(steps: dict[int, StepRecord]) -> dict[int, StepRecord]:
    replies = {number: record.reference_reply or parse_reply(record.reference) for number, record in steps.items()}
    # Before the first step, nothing called.
    calls = {-1: False} | {number: bool(reply.attempts) for number, reply in replies.items()}
    known = [record.offered for record in steps.values() if record.offered is not None]
    union = by_name(tool for offered in known for tool in offered.items())
    language = detect_language("".join(record.reference for _, record in sorted(steps.items())))
    completed = {}
    for number, record in steps.items():
        own: Offered = {name: names for name, names in (record.offered or {}).items() if names is not None}
        completed[number] = replace(
            record,
            offered=union | own if known else None,
            language=record.language or language,
            after_call=calls.get(number - 1) if record.after_call is None else record.after_call,
        )
    return completed


def by_name(tools: Iterable[tuple[str, Sequence[str] | None]]) -> Offered:
    """Return tools by name; one that is declared several times has the parameters of all declarations that give them."""
    found: Offered = {}
    for name, parameters in tools:
        earlier = found.setdefault(name, None)
        if parameters is not None:
            found[name] = tuple(dict.fromkeys((*(earlier or ()), *parameters)))
    return found


def read_offered_tool(value: Any) -> tuple[str, tuple[str, ...] | None] | None:
    """Read a tool name, or an object with `name` and `parameters`, as `Offered` has them; None if it is neither.

    `parameters` may be MSAgent-Bench's list of `{"name": ...}`, a JSON schema with `properties`, or a mapping from
    parameter name to anything. OpenAI's wrapper `function` is looked into.
    """
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return value["name"], _parameter_names(value.get("parameters"))


def _parameter_names(parameters: Any) -> tuple[str, ...] | None:
    if isinstance(parameters, list):
        names = [item.get("name") if isinstance(item, dict) else item for item in parameters]
        return tuple(name for name in names if isinstance(name, str))
    if isinstance(parameters, dict):
        if isinstance(parameters.get("properties"), dict):
            return tuple(parameters["properties"])
        return () if isinstance(parameters.get("type"), str) else tuple(parameters)
    return None


def _call_counts(record: StepRecord, reference: Said, prediction: Said) -> dict[str, Any]:
    expected, predicted = reference.calls, prediction.calls
    pairs = align_calls(expected, predicted)
    attempts = len(predicted) + len(prediction.failures)
    urls = [
        (expected[pair.reference].extras["url"], predicted[pair.prediction].extras)
        for pair in pairs
        if "url" in expected[pair.reference].extras
    ]
    schemas = record.offered or {}
    allowed = schemas.keys() | {call.name for call in expected}
    keys = [
        (key, schema) for call in predicted if (schema := schemas.get(call.name)) is not None for key in call.arguments
    ]
    is_known = record.offered is not None
    counts = {
        "is_action": bool(reference.attempts),
        "predicts_call": bool(prediction.attempts),
        "reference_calls": len(expected),
        "attempts": attempts,
        "wellformed": len(predicted),
        **_pair_counts(pairs),
        "lenient": sum(pair.lenient for pair in pairs),
        "full_matches": sum(pair.full_matches for pair in pairs),
        "reference_arguments": sum(len(call.arguments) for call in expected),
        "predicted_arguments": sum(len(call.arguments) for call in predicted),
        "url_references": len(urls),
        "url_matches": sum("url" in given and strictly_equal(url, given["url"]) for url, given in urls),
        "offered_attempts": attempts if is_known else 0,
        "hallucinated_tools": sum(call.name not in allowed for call in predicted) if is_known else 0,
        "schema_arguments": len(keys),
        "hallucinated_arguments": sum(key not in schema for key, schema in keys),
        "thoughts": int(bool(reference.reasoning) or prediction.thought is not None),
        "wellformed_thoughts": int(prediction.thought is True),
        "confusions": _confusions(expected, predicted, pairs, len(prediction.failures)),
        **_repaired_counts(expected, prediction, pairs),
    }
    return counts | {"errors": _errors(reference, prediction, pairs, counts)}


def _pair_counts(pairs: Sequence[CallPair], suffix: str = "") -> dict[str, float]:
    return {
        f"name_correct{suffix}": len(pairs),
        f"exact{suffix}": sum(pair.exact for pair in pairs),
        f"argument_f1{suffix}": float(sum((pair.argument_f1 for pair in pairs), Fraction(0))),
    }


def _repaired_counts(expected: Sequence[ToolCall], prediction: Said, pairs: Sequence[CallPair]) -> dict[str, float]:
    calls: list[ToolCall] = []
    won_back, lost = 0, 0
    for attempt in prediction.attempts:
        mended = repair_call_body(attempt.source) if attempt.failure else attempt.requests
        calls += mended or ()
        won_back += len(mended or ()) if attempt.failure else 0
        lost += mended is None
    if won_back:
        pairs = align_calls(expected, calls)
    return {"repaired_calls": won_back, **_pair_counts(pairs, "_repaired"), "attempts_repaired": len(calls) + lost}


def _confusions(
    expected: Sequence[ToolCall], predicted: Sequence[ToolCall], pairs: Sequence[CallPair], malformed: int
) -> tuple[tuple[str | None, str | None], ...]:
    """Lay the calls that found no partner side by side, in order; what is left over stands beside None."""
    met, used = {pair.reference for pair in pairs}, {pair.prediction for pair in pairs}
    left = [call.name for i, call in enumerate(expected) if i not in met]
    right = [call.name for j, call in enumerate(predicted) if j not in used] + [MALFORMED] * malformed
    return tuple(zip_longest(left, right))


def _errors(reference: Said, prediction: Said, pairs: Sequence[CallPair], counts: Mapping[str, Any]) -> tuple[str, ...]:
    calls = [(reference.calls[pair.reference], prediction.calls[pair.prediction]) for pair in pairs]
    keys = [(wanted.arguments.keys(), given.arguments.keys()) for wanted, given in calls]
    confusions = counts["confusions"]
    present = {
        "missed_call": reference.attempts and not prediction.attempts,
        "spurious_call": prediction.attempts and not reference.attempts,
        "missing_call": prediction.attempts and any(right is None for _, right in confusions),
        "extra_call": reference.attempts and any(left is None for left, _ in confusions),
        "wrong_tool": any(None not in (left, right) and right != MALFORMED for left, right in confusions),
        "malformed": bool(prediction.failures),
        "missing_argument": any(wanted - given for wanted, given in keys),
        "extra_argument": any(given - wanted for wanted, given in keys),
        "wrong_value": any(pair.half_matches for pair in pairs),
        "hallucinated_tool": counts["hallucinated_tools"],
        "hallucinated_argument": counts["hallucinated_arguments"],
    }
    return tuple(kind for kind, applies in present.items() if applies)
