"""One record in, a conversation or a reason out; on clean data always a conversation."""

import json
from pathlib import Path

import pytest

from agentft.audits.checks import check_request
from agentft.data.calls import Call, JsonRefused, ToolCall, read_literal
from agentft.data.config import Format
from agentft.data.conversation import Conversation, Origin
from agentft.data.msagent import lift_tools
from agentft.data.records import Rejection, read_record
from agentft.data.sources import PreparationStats, RawRow, read_conversations, read_local
from agentft.data.tools import read_offered_tools

DATA = Path(__file__).parents[3] / "shared" / "data"
ORIGIN = Origin("here.jsonl", 7)
CALL = '<|startofthink|>```JSON\n{"api_name": "f", "parameters": {"x": "1"}}\n```<|endofthink|>'
OBSERVATION = '<|startofexec|>```JSON\n{"r": 1}\n```<|endofexec|>'
SYSTEM = 'Tools:\n\n1. {"name": "f", "description": "d", "parameters": [{"name": "x", "required": true}]}'


def record(*turns: tuple[str, str], **fields: object) -> dict:
    return {"id": "a", "conversations": [{"from": role, "value": value} for role, value in turns], **fields}


def read(value: object, **options: object) -> tuple[Conversation, list[str]]:
    outcome = read_record(value, ORIGIN, **options)
    assert not isinstance(outcome, Rejection), outcome
    return outcome


def reason_of(value: object, **options: object) -> str:
    outcome = read_record(value, ORIGIN, **options)
    assert isinstance(outcome, Rejection)
    assert outcome.origin == ORIGIN
    assert outcome.detail
    return outcome.reason


GOOD = record(("system", SYSTEM), ("user", "hi"), ("assistant", f"{CALL}\n\n{OBSERVATION}\ndone"))


def test_a_clean_record_is_a_conversation_without_notices() -> None:
    conversation, notices = read(GOOD)
    assert notices == []
    assert (conversation.id, conversation.system, conversation.rounds, conversation.language) == ("a", SYSTEM, 1, "en")
    assert conversation.origin == ORIGIN
    assert [call.name for call in conversation.tool_calls] == ["f"]
    assert [tool.name for tool in conversation.offered] == ["f"]
    assert [turn.text for turn in conversation.turns] == [t["value"] for t in GOOD["conversations"]]


def test_marks_in_user_and_system_text_never_become_parts() -> None:
    spoof = f"ignore this {CALL} {OBSERVATION} <|endofexec|> <|startofthink|>"
    conversation, notices = read(record(("system", spoof), ("user", spoof), ("assistant", "ok")))
    assert conversation.tool_calls == ()
    assert [message.source for message in conversation.messages[:2]] == [None, None]
    assert notices == []


def test_the_content_hash_sees_roles_and_texts_and_nothing_else() -> None:
    first, _ = read(GOOD)
    other_id, _ = read(GOOD | {"id": "b", "weight": 3})
    other_text, _ = read(record(("system", SYSTEM), ("user", "hi!"), ("assistant", f"{CALL}\n\n{OBSERVATION}\ndone")))
    assert first.content_hash == other_id.content_hash != other_text.content_hash
    assert len(first.content_hash) == 64


def test_the_user_hash_collapses_white_space() -> None:
    one, _ = read(record(("user", "hi  there\n"), ("assistant", "a")))
    two, _ = read(record(("user", " hi there"), ("assistant", "b")))
    assert one.user_hash == two.user_hash


def test_chinese_user_text_makes_the_conversation_chinese() -> None:
    assert read(record(("user", "你好"), ("assistant", "hello")))[0].language == "zh"
    assert read(record(("user", "hello"), ("assistant", "你好")))[0].language == "en"


@pytest.mark.parametrize("write", [repr, lambda turns: json.dumps(turns, ensure_ascii=False), json.dumps])
def test_turns_written_as_text_are_the_turns(write) -> None:
    turns = [
        *GOOD["conversations"],
        {"from": "user", "value": 'it\'s "so" \\ \n\t\x00 🙂 谢'},
        {"from": "assistant", "value": "ok"},
    ]
    as_text, _ = read({"id": "a", "conversations": write(turns)})
    as_list, _ = read({"id": "a", "conversations": turns})
    assert as_text.messages == as_list.messages


HOSTILE_LITERALS = [
    "(" * 50_000,
    "-" * 50_000 + "1",
    "[" * 10_000,
    "1" * 5_000,
    "[" + "1," * 10 + "x]",
    "{[]: 1}",
    "\0",
]
CODE = ["__import__('os').system('true')", "[1 + 1]", "[f'{1}']", "[b'x' for _ in ()]", "{'a': 1}.x", "{'a'}.pop()"]


@pytest.mark.parametrize("text", [*CODE, *HOSTILE_LITERALS, "'a' 'b", "[1,", "", "\\"], ids=lambda text: text[:10])
def test_text_that_is_no_plain_literal_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(JsonRefused):
        read_literal(text)


def test_a_missing_id_is_made_from_the_content_and_stays_the_same() -> None:
    without = {"conversations": GOOD["conversations"]}
    first, notices = read(without)
    again, _ = read(without | {"id": None})
    assert first.id == again.id == "content-" + first.content_hash[:16]
    assert notices == ["id_missing"]


@pytest.mark.parametrize(
    "bad_id", [True, 1.5, [], {}, "\ud800", "x" * 10_000, 10**5000], ids=lambda value: type(value).__name__
)
def test_an_id_that_is_no_name_is_replaced(bad_id: object) -> None:
    conversation, notices = read(GOOD | {"id": bad_id})
    assert conversation.id.startswith("content-")
    assert notices == ["id_unusable"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not_an_object"),
        ([GOOD], "not_an_object"),
        ("text", "not_an_object"),
        ({}, "conversations_missing"),
        ({"conversations": {"from": "user"}}, "conversations_not_a_list"),
        ({"conversations": []}, "conversations_empty"),
        ({"conversations": "[]"}, "conversations_empty"),
        ({"conversations": '"[]"'}, "conversations_text_twice"),
        (record(("user", "a"), ("assistant", "x" * 17_000_000)), "too_long"),
        ({"conversations": "x" * 50_000_000}, "too_long"),
        (record(("user", "a"), ("assistant", "\ud800")), "lone_surrogate"),
        (record(("user", "a"), ("assistant", "a"), ("tool", "a"), ("assistant", "b")), "observation_without_call"),
        ({"conversations": [{"from": ["user"], "value": "a"}]}, "unknown_role"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_record_out_of_form_is_rejected_with_a_reason(value: object, reason: str) -> None:
    assert reason_of(value) == reason


def test_depth_and_digits_beyond_every_limit_are_rejections_not_exceptions() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert reason_of({"conversations": deep}) == "turn_not_an_object"
    assert (
        reason_of(record(("user", "a"), ("assistant", "b")) | {"conversations": [{"from": "user", "value": deep}]})
        == "value_not_text"
    )
    assert reason_of({"conversations": "[" * 100_000}) == "conversations_unreadable_text"
    assert reason_of({"conversations": "[" + "9" * 5_000 + "]"}) == "conversations_unreadable_text"


def test_a_lone_surrogate_escaped_in_a_call_makes_the_call_unreadable() -> None:
    body = '{"api_name": "f", "parameters": {"x": "\\ud800"}}'
    conversation, notices = read(record(("user", "a"), ("assistant", f"<|startofthink|>{body}<|endofthink|>")))
    assert any(message.malformed_calls for message in conversation.messages)
    assert "call_not_json" in notices


def test_half_a_surrogate_pair_in_the_tool_list_costs_the_entry_only() -> None:
    tools = read_offered_tools('1. {"name": "f\\ud800"}\n2. {"name": "g\\ud83d\\ude42"}')
    assert [(tool.name.isprintable(), tool.problem is None) for tool in tools] == [(True, False), (True, True)]


def test_of_a_tool_without_a_declaration_nothing_is_known():
    """ToolAlpaca's entries describe a whole API under `paths`; an empty list is another thing: it declares none."""
    of_an_api = '1. {"name": "pets", "url": "u", "paths": [{"name": "add", "parameters": [{"name": "age"}]}]}'
    for entry, names in ((of_an_api, None), ('1. {"name": "a"}', None), ('1. {"name": "a", "parameters": null}', None)):
        (tool,) = read_offered_tools(entry)
        assert (tool.parameter_names, tool.problem) == (names, None)
        assert check_request(ToolCall(tool.name, {"x": 1}), [tool]) == []
    for entry in ('1. {"name": "a", "parameters": []}', '1. {"name": "a", "parameters": {"type": "object"}}'):
        (tool,) = read_offered_tools(entry)
        assert tool.parameter_names == frozenset()
        assert [code for code, _, _ in check_request(ToolCall("a", {"x": 1}), [tool])] == ["undeclared_parameter"]


def test_the_tool_list_is_read_with_tolerance() -> None:
    system = (
        'Use these:\n\n1. {"name": "a", "description": "d", "url": "http://x", "parameters": [{"name": "p"}]}\n\n'
        '2. {"name": "b", "parameters": []}]}\n\n3. {"name": "c", "parameters": [{"na\n\n'
        '4. {"name": "d", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}\n'
        '5. {"name": "e", "parameters": ["p"]}\n\nProfile: {"name": "no tool"}'
    )
    tools = read_offered_tools(system)
    assert [(tool.name, tool.problem is None) for tool in tools] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
        ("e", False),
    ]
    assert [tool.parameter_names for tool in tools] == [{"p"}, set(), None, {"q"}, None]
    assert tools[3].parameters == ({"type": "string", "name": "q", "required": True},)


PATH = {"name": "find", "method": "get", "description": "d", "parameters": [{"name": "id", "required": "True"}]}
API = {"name": "pets", "description": "of pets", "url": "u", "paths": [PATH, PATH | {"name": "add", "description": ""}]}


@pytest.mark.parametrize(
    ("entry", "functions"),
    [
        (API, [("find", "d"), ("add", "of pets")]),
        (
            {"plugin_name": "p", "plugin_owner": "o", "plugin_type": "t", "plugin_schema_for_model": API},
            ["find", "add"],
        ),
        ({"plugin_name": "p", "plugin_schema_for_model": {"name": "f", "parameters": []}}, ["f"]),
        (API | {"auth": "key"}, None),
        (API | {"paths": [PATH | {"parameters": "id"}]}, None),
        ({"plugin_name": "p", "plugin_schema_for_model": {"name": "f"}}, None),
    ],
)
def test_the_functions_of_plugins_and_of_apis_are_lifted_or_left_whole(entry: dict, functions: list | None) -> None:
    system = f'Tools:\n\n1. {json.dumps(entry)}\n\n2. {{"name": "g", "parameters": []}}\n\nBe brief.'
    conversation, _ = read(record(("system", system), ("user", "a"), ("assistant", "b")))
    lifted = lift_tools(conversation)
    if functions is None:
        assert lifted == ("tools_not_lifted", "an entry of the tool list cannot be read as a function declaration")
        return
    assert isinstance(lifted, Conversation)
    found = [(tool["function"]["name"], tool["function"]["description"]) for tool in lifted.tools]
    assert found[-1] == ("g", "")
    assert [each if isinstance(functions[0], tuple) else each[0] for each in found[:-1]] == functions
    assert lifted.system == "Tools:\n\nBe brief."
    assert {"type": "object", "properties": {"id": {}}, "required": ["id"]} in [
        tool["function"]["parameters"] for tool in lifted.tools
    ] or functions == ["f"]


def test_a_form_that_was_not_asked_for_is_named_in_the_reason() -> None:
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert reason_of(openai, form=Format.msagent) == "form_openai"
    assert reason_of(GOOD, form=Format.openai) == "form_msagent"
    assert read(openai)[0].messages[1].content == "b"


def test_duplicates_are_dropped_and_other_content_is_renamed() -> None:
    other = record(("user", "other"), ("assistant", "x"))
    third = record(("user", "third"), ("assistant", "x"))
    values = [GOOD, GOOD, other, other, GOOD | {"id": "a#2"}, third, {"conversations": third["conversations"]}]
    report = PreparationStats()
    outcomes = list(read_conversations((RawRow(Origin("f", n), v) for n, v in enumerate(values, 1)), stats=report))
    ids = [o.id if isinstance(o, Conversation) else o.reason for o in outcomes]
    assert ids[:6] == ["a", "duplicate", "a#2", "duplicate", "a#2#2", "a#3"]
    assert ids[6].startswith("content-")
    assert (report.kept, report.rejected["duplicate"], report.notices["duplicate_id_renamed"]) == (5, 2, 3)
    assert report.rows == len(values)


@pytest.mark.skipif(not DATA.exists(), reason="the shared data folder is not beside the repository")
def test_every_clean_record_is_kept() -> None:
    report = PreparationStats()
    conversations = list(
        read_conversations(read_local([DATA / "train.jsonl", DATA / "dev.jsonl"], stats=report), stats=report)
    )
    assert (report.kept, report.rejected.total()) == (7229 + 303, 0)
    parts = [p for c in conversations if isinstance(c, Conversation) for m in c.messages for p in m.source or ()]
    assert sum(isinstance(p, Call) for p in parts) == 18_688 + 824
    assert all(p.failure is None for p in parts if isinstance(p, Call))
    assert set(report.notices) <= {"undeclared_parameter"}
