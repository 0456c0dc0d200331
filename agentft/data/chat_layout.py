"""The layout of a model's own chat template: conversation -> renderings, cut into segments.

Two laws hold for every step that a rendering trains. The text before it is the prompt that `apply_chat_template` writes for
the messages before it; and the step holds the whole message and ends with a token at which generation stops. What a
template cannot say by these laws is returned with its reason, a conversation or a single step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from agentft.data.chat_template import (
    ESCAPED_MARK,
    MARK,
    ChatMessage,
    ChatTemplate,
    MarkedText,
    StepValues,
    Traits,
    Value,
    answer_to,
    any_of,
    handed_over,
    map_strings,
    mark,
    marked_message,
    server_messages,
)
from agentft.data.conversation import Conversation
from agentft.data.msagent import lift_tools
from agentft.data.render import CALL_KINDS, LaidOut, LeftOut, Rendering, Segment, SpanKind
from agentft.errors import FormatError

_SPOKEN = frozenset({SpanKind.reasoning, SpanKind.text, SpanKind.call})


@dataclass(frozen=True, slots=True)
class ChatLayout:
    """Lays conversations out by a chat template."""

    template: ChatTemplate
    traits: Traits
    rewritten: Literal["exact", "stable"] = "exact"
    """Where the template rewrites history: several renderings, each as served, or one, whose prompts may differ."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what is rendered."""
        manners = [dict(manner.args) for manner in self.traits.manners]
        template = self.template
        return {"source": template.source, "args": template.args, "manners": manners, "rewritten": self.rewritten}

    def args(self, *, reasoning: bool) -> dict[str, Any]:
        """Return the template arguments for conversations with or without reasoning, as they are recorded."""
        return {**self.template.args, **self.traits.manners[reasoning].args}

    def lay_out(self, conversation: Conversation, context_rounds: int = 0) -> LaidOut | tuple[str, str]:
        """Render a conversation whose first `context_rounds` rounds are shown only; else say why not: (reason, detail)."""
        lifted = lift_tools(conversation)
        if isinstance(lifted, tuple):
            return lifted
        try:
            return _Work(self, lifted, context_rounds).done()
        except FormatError as problem:
            return problem.reason, problem.detail


class Region(NamedTuple):
    """Where a step stands in a rendered text."""

    step: int
    """Its number among the steps of the conversation."""
    begin: int
    """The end of its prompt."""
    stop: int
    """The beginning of its stop token."""
    end: int


_Cut = tuple[int, SpanKind]
"""Where a piece of one kind ends; it begins where the one before it does."""


class _Work:
    """One conversation on its way to its renderings."""

    def __init__(self, layout: ChatLayout, conversation: Conversation, context_rounds: int) -> None:
        self.layout, self.template, self.traits = layout, layout.template, layout.traits
        self.conversation = conversation
        self.steps = conversation.steps
        self.messages = server_messages(conversation, self.traits)
        self.reasoning = any(message.get("reasoning_content", "").strip() for message in self.messages)
        self.manner = self.traits.manners[self.reasoning]
        self.left_out: list[LeftOut] = []
        self.differ = 0
        self._check_traits()
        self.trained = self._trained(context_rounds)
        self.spelt, self.tested = self._check_values()
        self.marked = [marked_message(message) for message in self.messages]
        self.tools: Sequence[Mapping[str, Any]] = conversation.tools
        if self.spelt:
            self.tools = map_strings(list(conversation.tools), self._guarded)
        self.values = [StepValues.of(self.messages[at]) for at in self.steps]
        self.no_thought = _no_thought(*self.traits.thought)

    def _guarded(self, text: str) -> str:
        return mark(text, SpanKind.header) if self.template.control.search(text) else text

    def done(self) -> LaidOut:
        """Return the renderings; raise FormatError where no step can be trained."""
        last = self.steps[self.trained[-1]]
        told = self.manner.whole and not self.tested
        stable = self.layout.rewritten == "stable" and self.manner.shared_header and not told
        renderings = self._stable(last) if stable else self._exact(last)
        if not renderings:
            first = self.left_out[0]
            raise FormatError(first.reason, f"step {first.step + 1}: {first.detail}")
        return LaidOut(self.conversation, renderings, tuple(sorted(self.left_out)), self.differ)

    def _trained(self, context_rounds: int) -> list[int]:
        trained = []
        messages = self.conversation.with_context_only(context_rounds)
        agent = [(message, context_only) for message, context_only in messages if message.role == "assistant"]
        for step, (message, context_only) in enumerate(agent):
            if not context_only and (message.text.strip() or message.tool_calls):
                trained.append(step)
            elif not context_only:
                self.left_out.append(LeftOut(step, "empty_step", "the agent says nothing here"))
        if not trained:
            raise FormatError("no_label", "nothing that the agent says here is to be trained")
        return trained

    def _check_traits(self) -> None:
        traits, messages = self.traits, self.conversation.messages
        for failure in (call.failure for message in messages for call in message.malformed_calls if call.failure):
            raise FormatError("call_without_native_form", f"{failure.reason}: {failure.detail}")
        calls = [message for message in messages if message.tool_calls]
        if not traits.tools and calls:
            raise FormatError("template_has_no_tools", traits.problem)
        if not traits.declarations and self.conversation.tools:
            raise FormatError("template_has_no_tools", "it leaves the declarations of tools out")
        if not traits.system and self.conversation.system.strip():
            raise FormatError("template_has_no_system", "it leaves a system text out")
        if not traits.reasoning and self.reasoning:
            raise FormatError("template_has_no_reasoning", "it leaves reasoning out; set dataset.reasoning=drop")
        if not traits.parallel_calls and any(len(message.tool_calls) > 1 for message in calls):
            raise FormatError(
                "template_takes_one_call_a_step", f"a step has {max(len(m.tool_calls) for m in calls)} calls"
            )
        if not traits.text_beside_call and any(message.text.strip() for message in calls):
            raise FormatError("template_has_no_text_beside_calls", "it leaves the text of a step with calls out")

    def _check_values(self) -> tuple[bool, bool]:
        """Say whether a value spells a control token, and whether one holds what the template looks for."""
        everything = json.dumps([self.messages, self.conversation.tools], ensure_ascii=False)
        marks = MARK if "\\ufd" not in everything else re.compile(f"{MARK.pattern}|{ESCAPED_MARK.pattern}")
        if not (everything.isascii() and marks is MARK) and (found := marks.search(everything)):
            raise FormatError("text_holds_a_noncharacter", f"{found[0]!a}, which no text should hold")
        tested = any(text in everything for text in self.template.tested)
        if not self.template.control_in_json.search(everything):
            return False, tested
        for where, name in _names(self.messages, list(self.conversation.tools)):
            if found := self.template.control.search(name):
                raise FormatError("name_holds_a_control_token", f"{where} {name!r} holds {found.group()}")
        return True, tested

    def _render(self, stop: int, after: Sequence[ChatMessage] = (), *, prompt: bool = False) -> MarkedText:
        """Render the marked messages up to `stop`, and `after` behind them."""
        marked = [*self.marked[:stop], *map(marked_message, after)]
        rendered = self.template.render(
            handed_over(marked, self.traits), self.tools, prompt=prompt, args=self.manner.args
        )
        text = MarkedText.read(rendered)
        if text is None:
            raise FormatError("template_changes_values", "it splits or cuts the text of a message")
        return text

    def _prompt(self, step: int) -> MarkedText:
        text = self._render(self.steps[step], prompt=True)
        if self.tested and not self.spelt:
            before = handed_over(self.messages[: self.steps[step]], self.traits)
            plain = self.template.render(before, self.conversation.tools, prompt=True, args=self.manner.args)
            if plain != text.text:
                raise FormatError(
                    "template_changes_values", "it writes a message otherwise for what its text begins with"
                )
        if not self._holds_context(text, self.steps[step]):
            raise FormatError("template_drops_messages", "a message before this step is not in its prompt")
        return text

    def _next(self, last: int) -> list[ChatMessage]:
        """Return what follows a step in its round: its results, dummies where it has none; else a dummy question."""
        calls = self.messages[last].get("tool_calls", ())
        if not calls:
            return [{"role": "user", "content": "?"}]
        results = []
        for message in self.messages[last + 1 :]:
            if message["role"] != "tool":
                break
            results.append(message)
        return results or [answer_to(call) for call in calls]

    def _prompts_in(self, text: MarkedText, last: int) -> dict[int, MarkedText]:
        """Return the prompts of all steps as they begin one rendering, where the header behind each tells; else none."""
        ends = list(ends_of(self.manner.header, text)) if self.manner.whole and not self.tested else []
        if len(ends) != self.trained[-1] + 1 or not self._holds_context(text, last):
            return {}
        return {step: MarkedText(text.text[:end], tuple(text.within(0, end))) for step, end in enumerate(ends)}

    def _holds_context(self, text: MarkedText, last: int) -> bool:
        """Say whether all that is not the agent's is in the text."""
        wanted = sum(bool(m.get("content", "").strip()) for m in self.messages[:last] if m["role"] != "assistant")
        kinds = [kind for _, _, kind in text.values]
        return sum(map(kinds.count, (SpanKind.system, SpanKind.user, SpanKind.observation))) >= wanted

    def _region(self, text: MarkedText, step: int, begin: int) -> tuple[Region, str | None]:
        """Find the step that begins at a position, and name what it lacks: reasoning, text, call or stop."""
        calls = self.messages[self.steps[step]].get("tool_calls")
        stops = _pattern(self.traits.call_stops if calls else self.traits.stops)
        opened = not self.values[step].reasoning and self._opens_thought(text.text[:begin])
        for start, end in text.gaps(begin):
            if found := stops.search(text.text, start, end):
                values = text.within(begin, found.start())
                missing = self.values[step].missing(text.text, values)
                if any(kind not in _SPOKEN for _, _, kind in values):
                    missing = missing or "stop"
                said = values[0].start if values else found.start()
                if opened and self.traits.thought[1].strip() not in text.text[begin:said]:
                    missing = missing or "end of the thought"
                return Region(step, begin, *found.span()), missing
        missing = self.values[step].missing(text.text, text.within(begin, len(text.text)))
        return Region(step, begin, begin, begin), missing or "stop"

    def _exact(self, last: int) -> tuple[Rendering, ...]:
        """Let the steps that share a history share a rendering, and give every other one its own, as it is served."""
        shared: list[tuple[MarkedText, list[Region]]] = []
        prompts: dict[int, MarkedText] = {}
        with suppress(FormatError):  # Where the dummy is refused, each step is rendered by itself.
            whole = self._render(last + 1, self._next(last))
            shared.append((whole, []))
            prompts = self._prompts_in(whole, last)
        for step in reversed(self.trained):
            try:
                prompt = prompts.get(step) or self._prompt(step)
                region = None
                # What already has a step comes first: the whole may end its steps otherwise than they are said.
                for text, regions in sorted(shared, key=lambda each: not each[1]):
                    if region := self._fitting(text, step, prompt):
                        regions.append(region)
                        break
                if region is None:
                    text, region = self._alone(step, prompt)
                    shared.append((text, [region]))
            except FormatError as problem:
                self.left_out.append(LeftOut(step, problem.reason, problem.detail))
        renderings = [self._rendering(text, regions[::-1]) for text, regions in shared if regions]
        return tuple(sorted(renderings, key=lambda rendering: rendering.steps))

    def _fitting(self, text: MarkedText, step: int, prompt: MarkedText) -> Region | None:
        """Return where a step stands in a text that begins with its prompt and holds it whole."""
        if not text.text.startswith(prompt.text):
            return None
        region, missing = self._region(text, step, len(prompt.text))
        return None if missing else region

    def _alone(self, step: int, prompt: MarkedText) -> tuple[MarkedText, Region]:
        """Render a step behind its own prompt."""
        lacking = None
        for number, text in enumerate(self._continuations(step, prompt)):
            if region := self._fitting(text, step, prompt):
                return text, region
            if number == 0 and text.text.startswith(prompt.text):
                lacking = lacking or self._region(text, step, len(prompt.text))[1]
        if lacking in ("reasoning", "text", "call"):
            raise FormatError(f"template_drops_{lacking}", f"the {lacking} of this step is not written")
        raise FormatError(
            "template_cannot_continue", "what the template writes for this step does not continue its prompt"
        )

    def _continuations(self, step: int, prompt: MarkedText) -> Iterator[MarkedText]:
        """Yield texts that may be the prompt and the step, the likeliest first."""
        at = self.steps[step]
        ending = self._render(at + 1)
        yield ending
        with suppress(FormatError):
            followed = self._render(at + 1, self._next(at))
            yield followed
        called = bool(self.messages[at].get("tool_calls"))
        if self.traits.stop_with_next:
            stop = (self.traits.call_stops if called else self.traits.stops)[0]
            ending = MarkedText(ending.text.rstrip() + self.traits.bare_stop + stop, ending.values)
            yield ending
        # The generation prompt opens a thought that history has not: the step thinks, closes the thought and goes on.
        header, thinking = self.manner.header, prompt
        thought = MarkedText.read(mark(self.values[step].reasoning, SpanKind.reasoning))
        if thought is not None and self._opens_thought(prompt.text):
            thinking = prompt + thought + MarkedText(self.traits.thought[1], ())
            before = prompt.text[: prompt.text.rindex(self.traits.thought[0].strip())]
            if ending.text.startswith(before):
                begin = len(before)
                begin += len(header) if header and ending.text.startswith(header, begin) else 0
                empty = None if self.values[step].reasoning else self.no_thought.match(ending.text, begin)
                yield thinking + ending.since(empty.end() if empty else begin)
        # The template drops past reasoning as soon as this step is there: its own text goes behind the prompt all the same.
        spoken = [value for value in ending.values if value.kind in _SPOKEN]
        own = spoken[-self.values[step].size :]
        if own and header and (begin := ending.text.rfind(header, 0, own[0].start)) >= 0:
            yield prompt + ending.since(begin + len(header))
            if not self.values[step].reasoning:
                yield thinking + ending.since(begin + len(header))

    def _opens_thought(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.traits.thought[0].strip())

    def _stable(self, last: int) -> tuple[Rendering, ...]:
        """Train the steps that the one rendering holds whole, and count those whose prompt is another than served."""
        text = self._render(last + 1, self._next(last) if self.messages[last].get("tool_calls") else ())
        begins = list(ends_of(self.manner.shared_header, text))
        if len(begins) != self.trained[-1] + 1:
            return self._exact(last)
        regions = []
        for step in self.trained:
            try:
                prompt = self._prompt(step).text
                served = text.text.startswith(prompt)
            except FormatError:
                served = False
            region, missing = self._region(text, step, len(prompt) if served else begins[step])
            if missing:
                detail = f"the {missing} of this step is not written once the conversation goes on"
                self.left_out.append(LeftOut(step, f"template_drops_{missing}", detail))
            else:
                regions.append(region)
                self.differ += not served
        return (self._rendering(text, regions),) if regions else ()

    def _rendering(self, text: MarkedText, regions: Sequence[Region]) -> Rendering:
        """Cut a text up to the end of its last trained step; `regions` are the trained ones, in its order."""
        pieces: list[tuple[int, SpanKind, bool]] = []
        at = 0
        for region in regions:
            shown = not self.conversation.messages[self.steps[region.step]].reasoning_trained
            pieces += [(stop, kind, True) for stop, kind in _context(text, at, region.begin)]
            pieces += [(stop, kind, shown and kind is SpanKind.reasoning) for stop, kind in self._cut(text, region)]
            pieces.append((region.end, SpanKind.stop, False))
            at = region.end
        segments = tuple(_join(text, pieces, self.template.control))
        steps = tuple(region.step for region in regions)
        return Rendering(segments, steps, self.template.control if self.spelt else None)

    def _cut(self, text: MarkedText, region: Region) -> Iterator[_Cut]:
        """Cut a step at its values and its calls' names and parameters; what lies between is of the kind of its neighbours."""
        calls = self.messages[self.steps[region.step]].get("tool_calls", ())
        before: SpanKind | None = None
        start = region.begin
        values = text.within(region.begin, region.stop)
        places = _call_places(text, region, values, calls)
        for value in (*values, Value(region.stop, region.stop, SpanKind.call_syntax if calls else SpanKind.text)):
            if value.start > start:
                if before is None and (thought := self.no_thought.match(text.text, start, value.start)):
                    start = thought.end()
                    yield start, SpanKind.reasoning
                elif SpanKind.reasoning in (before, value.kind):
                    start, before = thought_end(text.text, start, value, self.template.control), None
                    yield start, SpanKind.reasoning
                if before is not SpanKind.call and value.kind not in CALL_KINDS:
                    yield value.start, SpanKind.text
                else:
                    for first, last in places:
                        if last > start and first < value.start:
                            yield max(first, start), SpanKind.call_syntax
                            start = min(last, value.start)
                            yield start, SpanKind.call
                    yield value.start, SpanKind.call_syntax
            yield value.stop, value.kind
            start, before = value.stop, value.kind


def ends_of(header: str, text: MarkedText) -> Iterator[int]:
    """Yield where each occurrence of a header in the template's own text ends."""
    for start, stop in text.gaps():
        at = text.text.find(header, start, stop)
        while at >= 0:
            yield at + len(header)
            at = text.text.find(header, at + len(header), stop)


def _join(
    text: MarkedText, pieces: Iterable[tuple[int, SpanKind, bool]], control: re.Pattern[str]
) -> Iterator[Segment]:
    """Yield pieces, each with whether it is shown only, as segments: neighbours of one fate joined, control tokens apart."""
    runs: list[tuple[int, SpanKind, bool]] = []
    end = 0
    for piece in pieces:
        if piece[0] > end:
            end = piece[0]
            if runs and runs[-1][1:] == piece[1:]:
                runs[-1] = piece
            else:
                runs.append(piece)
    words = text.text
    tokens = (found for start, stop in text.gaps(0, end) for found in control.finditer(words, start, stop))
    token = next(tokens, None)
    start = 0
    for stop, kind, context_only in runs:
        while token is not None and token.start() < stop:
            if token.start() > start:
                yield Segment(words[start : token.start()], kind, False, context_only)
            yield Segment(token[0], kind, True, context_only)
            start = token.end()
            token = next(tokens, None)
        if start < stop:
            yield Segment(words[start:stop], kind, False, context_only)
            start = stop


def _context(text: MarkedText, start: int, stop: int) -> Iterator[_Cut]:
    for value in text.within(start, stop):
        yield value.start, SpanKind.header
        yield value.stop, value.kind
    yield stop, SpanKind.header


def thought_end(text: str, start: int, after: Value, control: re.Pattern[str]) -> int:
    """Return where the close of a thought ends: before a text it is all there is, before a call one mark and its blanks."""
    if after.kind not in CALL_KINDS:
        return after.start
    closing = re.compile(rf"\s*(?:{control.pattern}|\S*)\s*").match(text, start, after.start)
    return closing.end() if closing else start


def _call_places(
    text: MarkedText, region: Region, values: Sequence[Value], calls: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Where the parameters of each call stand: as one JSON object, or its keys and values one by one."""
    places: list[tuple[int, int]] = []
    names = iter([value for value in values if value.kind is SpanKind.call])
    for call in calls:
        function = call["function"]
        name = next((v for v in names if text.text[v.start : v.stop] == function["name"].strip()), None)
        if name is None:
            break
        written = json.dumps(function["arguments"], ensure_ascii=False)
        start = text.text.find(written, name.stop, region.stop)
        if start >= 0:
            places.append((start, start + len(written)))
        else:
            places += _words(text, name.stop, region.stop, function["arguments"])
    return sorted(places)


def _words(text: MarkedText, start: int, stop: int, arguments: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Find the keys of some arguments, in any order, and behind each its value where that is not a string."""
    for key, value in arguments.items():
        place = _word(text, key, start, stop)
        if place is None:
            continue
        yield place
        if not isinstance(value, str):
            spelt = json.dumps(value, ensure_ascii=False)
            place = _word(text, spelt, place[1], stop) or _word(text, str(value), place[1], stop)
            if place is not None:
                yield place


def _word(text: MarkedText, word: str, start: int, stop: int) -> tuple[int, int] | None:
    """Find a word in the template's own text."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    for first, last in text.gaps(start, stop):
        if found := pattern.search(text.text, first, last):
            return found.span()
    return None


def _names(messages: Sequence[ChatMessage], tools: Any) -> Iterator[tuple[str, str]]:
    """Yield what stands in no value that could be marked, each with what it is: roles, ids, names and keys."""
    for message in messages:
        yield from ((f"the {key}", message[key]) for key in ("role", "name", "tool_call_id") if key in message)
        for call in message.get("tool_calls", ()):
            yield "the call id", call.get("id", "")
            yield "the call of", call["function"]["name"]
            yield from (("the key", key) for key in _keys(call["function"]["arguments"]))
    yield from (("the key", key) for key in _keys(tools))


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _keys(each)


@cache
def _no_thought(opening: str, close: str) -> re.Pattern[str]:
    """Return a pattern that matches how a template begins a step without a thought, its mark there or in the prompt."""
    return re.compile(rf"\s*(?:{re.escape(opening.strip())}\s*)?{re.escape(close.strip())}\s*")


@cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(any_of(tokens))
