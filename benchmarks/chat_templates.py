"""What holds of published chat templates as layouts: a table family x (prompts equal, steps read back, reasoning kept).

    python -m benchmarks.chat_templates [NAME ...]
    python -m benchmarks.chat_templates --data FILE [--count 48] [NAME ...]

The templates are those of TRL's wheel that can say a conversation with tools. The first form lays out the conversations of
`tests/data/chat_families.py`, with blanks at ends, control tokens, JSON, nested arguments, parallel calls, reasoning and
more. Counted are steps: those that the layout trains; of these, prompts whose ids are those of `apply_chat_template`, and
answers that are read back as the message; and of the steps that think, those whose reasoning is read back.

The second form counts records of a file, of any format that agentft reads: `--count` of those that declare tools and call
some, taken evenly over the file. Each is written as an OpenAI record (arguments as JSON text, call ids, `tools`; the list of
an MSAgent system text lifted), read again, and compared with `apply_chat_template` of that record's own `messages`. A record
counts where all its steps are trained, all their prompts equal, all read back; what a template cannot say or keep is
named with the number of records. For the last column every step gets a thought in front.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatMessage, handed_over, server_messages
from agentft.data.conversation import Conversation, Origin, chat_messages
from agentft.data.msagent import lift_tools
from agentft.data.records import Rejection, read_record
from agentft.data.render import LaidOut
from agentft.data.response_choice import choose_response, differs
from tests.data.chat_families import NO_TOOLS, VALUES, conversation, template_names
from tests.data.test_chat_template_layout import layout_of
from tests.evaluation.test_read_back import made_steps, read


class Checked(NamedTuple):
    """How the steps of a conversation came out."""

    trained: int
    equal: int
    back: int
    kept: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="templates; all by default")
    parser.add_argument("--data", type=Path, help="a JSONL file of records with tools")
    parser.add_argument("--count", type=int, default=48, help="records of it")
    arguments = parser.parse_args()
    names = arguments.names or [name for name in template_names() if name not in NO_TOOLS]
    if arguments.data is None:
        print("| template | read by | steps trained | prompts equal | steps read back | reasoning kept |")
        print("|---|---|---|---|---|---|")
        for name in names:
            print(f"| {' | '.join((f'`{name}`', *row(name)))} |", flush=True)
        return
    talks = list(openai_records(arguments.data, arguments.count))
    print(
        "| template | records that it can say | prompts equal | steps read back | reasoning kept | what it cannot say |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        print(f"| {' | '.join((f'`{name}`', *row_of_records(name, talks)))} |", flush=True)


def row(name: str) -> tuple[str, ...]:
    layout = layout_of(name, "merging")
    response = choose_response(layout)
    talks = [conversation(kind, declared=layout.traits.declarations) for kind in VALUES]
    steps = sum(len(talk.steps) for talk in talks)
    thinking = sum(bool(talk.messages[at].reasoning_content) for talk in talks for at in talk.steps)
    trained, equal, back, kept = map(sum, zip(*(check(layout, name, talk) for talk in talks), strict=True))
    return (
        response.name if response is not None else "none",
        f"{trained} of {steps}",
        f"{equal} of {trained}",
        f"{back} of {trained}",
        f"{kept} of {thinking}" if layout.traits.reasoning else "none written",
    )


def row_of_records(name: str, talks: Sequence[Conversation]) -> tuple[str, ...]:
    layout = layout_of(name, "merging")
    said = equal = back = kept = 0
    reasons: Counter[str] = Counter()
    for talk in talks:
        if unsaid := _unsaid(layout, talk):
            reasons.update(unsaid)
            continue
        checked = check(layout, name, talk)
        said += 1
        equal += checked.equal == len(talk.steps)
        back += checked.back == len(talk.steps)
        if checked.back < len(talk.steps):
            reasons["not_read_back"] += 1
        if layout.traits.reasoning:
            kept += check(layout, name, _thinking(talk)).kept == len(talk.steps)
    return (
        f"{said} of {len(talks)}",
        f"{equal} of {said}",
        f"{back} of {said}",
        f"{kept} of {said}" if layout.traits.reasoning else "none written",
        ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "nothing",
    )


def check(layout: ChatLayout, name: str, talk: Conversation) -> Checked:
    """Count the trained steps of a conversation, and those whose prompt, answer and reasoning are as they should be."""
    messages = server_messages(talk, layout.traits)
    args = layout.args(reasoning=any(message.reasoning_content for message in talk.messages))
    args.pop("strftime_now", None)
    trained = equal = back = kept = 0
    for step, message in made_steps(layout, name, talk):
        served = layout.template.tokenizer.apply_chat_template(
            handed_over(messages[: talk.steps[step.index]], layout.traits),
            tools=list(talk.tools) or None,
            chat_template=layout.template.source,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=any(t in str(messages) for t in layout.template.control_tokens),
            **args,
        )
        said = read(step)
        trained += 1
        equal += list(served) == step.input_ids[: step.start].tolist()
        back += not differs(said, message)
        kept += bool(message.reasoning_content) and said.reasoning == message.reasoning_content.strip()
    return Checked(trained, equal, back, kept)


def openai_records(path: Path, count: int) -> Iterator[Conversation]:
    """Read records that call tools, each by way of an OpenAI record, whose messages have to arrive unchanged."""
    talks = []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        first = read_record(json.loads(line), Origin(path.name, number))
        talk = None if isinstance(first, Rejection) else lift_tools(first[0])
        if isinstance(talk, Conversation) and talk.tools and talk.tool_calls:
            talks.append(talk)
    if len(talks) < count:
        raise SystemExit(
            f"{path}: {len(talks)} records declare tools and call some, --count={count}; give a larger file"
        )
    for at in range(count):
        talk = talks[at * len(talks) // count]
        record = {"id": talk.id, "messages": _written(chat_messages(talk.messages)), "tools": list(talk.tools)}
        again = read_record(json.loads(json.dumps(record)), talk.origin)
        if isinstance(again, Rejection):
            raise SystemExit(f"{talk.origin}: as an OpenAI record refused: {again.detail}")
        served = [_served(message) for message in record["messages"]]
        if chat_messages(again[0].messages) != served or list(again[0].tools) != record["tools"]:
            raise SystemExit(f"{talk.origin}: its messages or tools do not arrive as they are written")
        yield again[0]


def _written(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as people store them: arguments as JSON text, ids of calls that their results name."""
    written = []
    waiting: list[str] = []
    for at, message in enumerate(messages):
        made = dict(message)
        if calls := made.pop("tool_calls", None):
            waiting = [f"call_{at}_{number}" for number in range(len(calls))]
            made["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for name, call in zip(waiting, calls, strict=True)
            ]
        if made["role"] == "tool" and waiting:
            made["tool_call_id"] = waiting.pop(0)
        written.append(made)
    return written


def _served(message: dict[str, Any]) -> ChatMessage:
    """Return a message as a server hands it over, which parses arguments."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _thinking(talk: Conversation) -> Conversation:
    thought = "The user wants this; here is what I do next."
    messages = (replace(m, reasoning_content=thought) if m.role == "assistant" else m for m in talk.messages)
    return replace(talk, messages=tuple(messages))


def _unsaid(layout: ChatLayout, talk: Conversation) -> set[str]:
    laid_out = layout.lay_out(talk)
    return {each.reason for each in laid_out.left_out} if isinstance(laid_out, LaidOut) else {laid_out[0]}


if __name__ == "__main__":
    main()
