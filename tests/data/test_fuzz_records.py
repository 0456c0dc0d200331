"""Mutated records and files: whatever comes in, no exception comes out, and no foreign text becomes trainable."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentft.data.calls import Call, ToolCall
from agentft.data.config import Format, Reasoning
from agentft.data.conversation import Conversation, Observation, Origin, Text, chat_messages
from agentft.data.msagent import MARK, GrammarError, as_msagent, lift_tools
from agentft.data.prepared import from_line, to_line
from agentft.data.records import Rejection, read_record
from agentft.data.sources import read_conversations, read_local
from tests.data.format_records import RECORDS

DATA = Path(__file__).parents[3] / "shared" / "data"
MARKS = ["<|startofthink|>", "<|endofthink|>", "<|startofexec|>", "<|endofexec|>"]
SPLICES = [
    *MARKS,
    "<|EndOfExec|>",
    "```",
    "\\",
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "\r\n",
    "\0",
    "\u2028",
    "\ud800",
    "\ufeff",
]
SPLICES += ["<tool_call>", "</tool_call>", "<tools>", "<think>", "</think>", "[f(a=1)]", "(", ")]", "<tool_response>"]
SPLICES += [
    "\\u003c",
    "NaN",
    "1e999",
    " and ",
    "和",
    "Action: a\nAction Input: {}",
    "1. {",
    "🙂",
    "[" * 300,
    "9" * 5000,
    "",
]
STRANGE = [
    None,
    True,
    -1,
    1.5,
    float("nan"),
    "",
    " ",
    [],
    {},
    [[]],
    "assistant",
    "human",
    "gpt",
    "tool",
    "\ud800",
    "[" * 200,
    10**4400,
]
STRANGE += [
    float,
    b"bytes",
    ("from", "value"),
    {"from": "user", "value": "x"},
    {1: 2},
    "[{'from': 'user', 'value': 'a'}]",
]

OWN = [
    {
        "id": "own",
        "conversations": [
            {
                "from": "system",
                "value": 'Tools:\n\n1. {"name": "f", "parameters": [{"name": "x"}]}\n\n2. {"name": "g"}',
            },
            {"from": "user", "value": "do <|startofexec|>SECRET-U<|endofexec|> please, 谢谢"},
            {
                "from": "assistant",
                "value": 'Let me see.\n<|startofthink|>```JSON\n{"api_name": "f", "parameters": {"x": "<|endofthink|>"}}\n'
                '```<|endofthink|>\n\n<|startofexec|>```JSON\n{"r": "SECRET-O"}\n```<|endofexec|>\nDone.',
            },
        ],
    },
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": "c",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": '{"r": "SECRET-O"}'},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}}
        ],
    },
    {
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "SECRET-O"},
            {"from": "gpt", "value": "done"},
        ],
        "tools": '[{"name": "f", "parameters": {"properties": {}}}]',
    },
]


NAMES = [
    "from",
    "value",
    "role",
    "content",
    "id",
    "messages",
    "conversations",
    "tools",
    "system",
    "name",
    "type",
    "text",
]
NAMES += ["tool_calls", "function", "arguments", "input", "reasoning_content", "tool_call_id", "query", "answers"]


def seeds() -> list[dict[str, Any]]:
    real: list[dict[str, Any]] = []
    for name in ("dev.jsonl", "malformed.jsonl"):
        if (DATA / name).exists():
            real += [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]
    small = [record for record in real if len(str(record)) < 6_000]
    return (
        [*OWN, *RECORDS.values()] * 15
        + [record | {"conversations": repr(record["conversations"])} for record in OWN if "id" in record] * 10
        + small
    )


def mutated_text(text: str, rng: random.Random) -> str:
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    marks = list(MARK.finditer(text))
    if marks and rng.random() < 0.5:  # cut and splice at the places that matter
        a, b = rng.choice(marks).span()
    match rng.randrange(5):
        case 0:
            return text[:a] + text[b:]
        case 1:
            return text[:a] + rng.choice(SPLICES) + text[a:]
        case 2:
            return text[:a] + rng.choice(SPLICES) + text[b:]
        case 3:
            return text[:a] + text[a:b] * 2 + text[b:]
        case _:
            return text[:b] + text[a:]


def mutated_value(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.12:
        return rng.choice(STRANGE)
    if isinstance(value, str):
        return mutated_text(value, rng)
    if isinstance(value, list) and value:
        items = list(value)
        place = rng.randrange(len(items))
        match rng.randrange(5):
            case 0:
                del items[place]
            case 1:
                items.insert(place, items[rng.randrange(len(items))])
            case 2:
                items[place], items[0] = items[0], items[place]
            case _:
                items[place] = mutated_value(items[place], rng)
        return items
    if isinstance(value, dict) and value:
        fields = dict(value)
        key = rng.choice(list(fields))
        match rng.randrange(6):
            case 0:
                del fields[key]
            case 1:
                fields[rng.choice(NAMES)] = fields.pop(key)
            case _:
                fields[key] = mutated_value(fields[key], rng)
        return fields
    return rng.choice(STRANGE)


def require_sound(outcome: object) -> bool:
    """The laws that hold for whatever was read; True for a conversation."""
    if isinstance(outcome, Rejection):
        assert outcome.reason.isidentifier()
        f"{outcome.detail} {outcome.id} {outcome.origin}".encode()
        return False
    assert isinstance(outcome, tuple)
    conversation, notices = outcome
    assert isinstance(conversation, Conversation)
    " ".join(notices).encode()
    assert to_line(from_line(to_line(conversation))) == to_line(conversation)
    lift_tools(conversation)
    waiting: list[ToolCall] = []
    for message in conversation.messages:
        json.dumps(chat_messages((message,)), ensure_ascii=False, allow_nan=False).encode()
        if message.role == "assistant":
            waiting = list(message.tool_calls)
        elif message.role == "tool" and message.source is None:  # a result belongs to a call of the step before it
            waiting.remove(next(call for call in waiting if message.tool_call_id in (None, call.id)))
        else:
            assert message.role in ("tool", "user", "system", "developer")
    json.dumps(conversation.tools, ensure_ascii=False, allow_nan=False).encode()
    try:
        conversation = as_msagent(conversation)
    except GrammarError:
        return True
    roles = [turn.role for turn in conversation.turns if turn.role not in ("system", "developer")]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
    observed = called = 0
    for message in conversation.messages:
        (message.source_text or message.text).encode()
        assert (message.source is None) == (message.role in ("system", "developer", "user"))
        for part in message.source or ():
            match part:
                case Observation():
                    observed += 1
                case Call(_, requests, failure):
                    called += max(1, len(requests))
                    assert (failure is None) == bool(requests)
                    json.dumps([[request.name, request.arguments] for request in requests], ensure_ascii=False).encode()
                case Text(source):
                    # Every mark in a text belongs to a quoted pair, and between such a pair stands a connective.
                    texts = MARK.split(source)[1:-1:2]
                    assert all(len(text) <= 12 for text in texts)
    assert observed <= called
    assert len(conversation.content_hash) == len(conversation.user_hash) == 64
    assert conversation.language in ("zh", "en")
    conversation.id.encode()
    assert all(tool.name.encode() is not None for tool in conversation.offered)
    return True


def fuzz(count: int, seed: int) -> tuple[int, int]:
    rng = random.Random(seed)
    values = seeds()
    kept = 0
    for number in range(count):
        value: Any = rng.choice(values)
        for _ in range(rng.choice([1, 1, 2, 4])):
            value = mutated_value(value, rng)
        form = rng.choice([Format.auto] * len(Format) + list(Format))
        how = rng.choice(list(Reasoning))
        kept += require_sound(read_record(value, Origin("fuzz", number), form=form, reasoning=how))
    return kept, count - kept


def fuzz_bytes(count: int, seed: int, path: Path) -> tuple[int, int]:
    """Files of a few records with bytes flipped, cut, doubled and spliced: every line has one outcome."""
    rng = random.Random(seed)
    whole = [json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass") for record in seeds()]
    kept = dropped = 0
    for _ in range(count // 4):
        content = bytearray(b"\n".join(rng.choice(whole) for _ in range(4)) + b"\n")
        for _ in range(rng.randrange(1, 8)):
            a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
            change: Callable[[], bytes] = rng.choice(
                [
                    lambda: b"",
                    lambda: rng.randbytes(3),
                    lambda: b"\n",
                    lambda: b"\0",
                    lambda: b'"',
                    lambda: rng.choice(MARKS).encode(),
                ]
            )
            content[a : min(b, a + rng.choice([0, 1, 4]))] = change()
        path.write_bytes(bytes(content))
        for outcome in read_conversations(read_local(path)):
            kept += isinstance(outcome, Conversation)
            dropped += isinstance(outcome, Rejection)
    return kept, dropped


@pytest.mark.parametrize("count", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_records_raise_nothing(tmp_path: Path, count: int) -> None:
    records, lines = count * 4 // 5, count // 5
    kept, dropped = fuzz(records, seed=3)
    assert kept + dropped == records
    assert min(kept, dropped) > records // 10, "the mutations must reach both outcomes"
    kept, dropped = fuzz_bytes(lines, 4, tmp_path / "fuzz.jsonl")
    assert min(kept, dropped) > lines // 10


def test_a_foreign_text_never_becomes_trainable() -> None:
    """User text and tool output carry a word that no text and no call of the agent may hold, however marks are bent."""
    rng = random.Random(5)
    converted = 0
    for _ in range(1_500):
        secret = mutated_text("SECRET <|endofexec|> SECRET <|startofthink|>{}<|endofthink|> SECRET", rng)
        result = MARK.sub(lambda mark: rng.choice(["<|", "|>", "<|EndOfExec|>", mark[0][: rng.randrange(12)]]), secret)
        result = rng.choice([secret, result, result])
        tool = {"role": "tool", "tool_call_id": "1", "content": rng.choice([result, json.dumps({"r": result})])}
        call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": secret},
            {"role": "assistant", "tool_calls": [call]},
            tool,
            {"role": "assistant", "content": "ok"},
        ]
        outcome = read_record({"messages": messages}, Origin("fuzz", 1))
        if isinstance(outcome, Rejection):
            continue
        converted += 1
        for message in outcome[0].messages:
            assert all(
                "SECRET" not in part.source for part in message.source or () if not isinstance(part, Observation)
            )
    assert converted > 300


def test_a_tool_output_in_msagent_form_never_becomes_trainable() -> None:
    """The same for results that hold marks as JSON strings, between genuine calls: kept whole, or rejected."""
    rng = random.Random(6)
    call = '<|startofthink|>```JSON\n{"api_name": "f", "parameters": {}}\n```<|endofthink|>'
    kept = 0
    for _ in range(3_000):
        secret = " ".join(
            rng.choice([*MARKS, call, "and", "\n", '"', "{}"]) + " SECRET" for _ in range(rng.randrange(1, 6))
        )
        body = json.dumps({"r": f"SECRET {secret}"}, ensure_ascii=False)
        result = "<|startofexec|>" + rng.choice([body, f"```JSON\n{body}\n```"]) + "<|endofexec|>"
        value = f"{call}\n\n" * rng.randrange(1, 4) + result + rng.choice(["", "\ndone", f"\n{call}", f"\n{result}"])
        record = {"conversations": [{"from": "user", "value": secret}, {"from": "assistant", "value": value}]}
        outcome = read_record(record, Origin("fuzz", 1))
        if isinstance(outcome, Rejection):
            continue
        kept += 1
        for part in (p for m in outcome[0].messages for p in m.source or ()):
            assert "SECRET" not in part.source or isinstance(part, Observation)
    assert kept > 300
