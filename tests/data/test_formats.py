"""Records of other layouts come through without loss, or are refused: never as something else."""

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentft.audits.checks import trace_labels
from agentft.data.calls import ToolCall
from agentft.data.config import Format, Reasoning
from agentft.data.conversation import EXEC_CLOSE, EXEC_OPEN, THINK_CLOSE, THINK_OPEN, Conversation, Message, Origin
from agentft.data.msagent import GrammarError, as_msagent
from agentft.data.prepared import from_line, to_line
from agentft.data.records import Rejection, read_record
from agentft.data.render import Segment, SpanKind
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder, TokenText
from agentft.data.truncation import make_examples
from tests.data.format_records import (
    ANSWER,
    ARGUMENTS,
    NAMED,
    QUESTION,
    RECORDS,
    RESULT,
    SYSTEM,
    THOUGHT,
    outcomes_of_fields,
    outcomes_of_unknown_fields,
)
from tests.data.format_records import TOOL as WEATHER

ORIGIN = Origin("forms.jsonl", 1)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "day": {"type": "object", "required": ["x"]},
            },
            "required": ["city"],
        },
    },
}


def read(record: object, form: Format = Format.auto) -> Conversation:
    outcome = read_record(record, ORIGIN, form=form)
    assert not isinstance(outcome, Rejection), outcome
    return outcome[0]


def reason_of(record: object, form: Format = Format.auto) -> str:
    outcome = read_record(record, ORIGIN, form=form)
    assert isinstance(outcome, Rejection)
    return outcome.reason


def tool_call(call_id: str, arguments: object, name: str = "weather") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(*messages: dict, **fields: object) -> dict:
    return {"id": "o", "messages": list(messages), **fields}


def said(conversation: Conversation) -> list[tuple[str, object]]:
    """What agent and tools say: texts, calls and results."""
    found: list[tuple[str, object]] = []
    for message in conversation.messages:
        if message.role == "tool":
            found.append(("result", message.text))
        elif message.role == "assistant":
            found += [("text", message.text)] if message.text else []
            found += [("call", (call.name, call.arguments)) for call in message.tool_calls]
    return found


def codes(record: object, form: Format = Format.auto) -> set[str]:
    """The codes of what was noted, but for what every record of this file lacks."""
    outcome = read_record(record, ORIGIN, form=form)
    assert not isinstance(outcome, Rejection), outcome
    return set(outcome[1]) - {"id_missing", "missing_system", "unknown_tool"}


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_says_the_same_conversation(name: str) -> None:
    """Question, call, result and answer; declarations verbatim where they are OpenAI's, in that shape where they are not."""
    conversation = read(RECORDS[name], NAMED.get(name, Format.auto))
    answered = [("result", RESULT), ("text", ANSWER)] if name != "xlam" else []
    assert said(conversation) == [("call", ("weather", ARGUMENTS)), *answered]
    assert [message.text for message in conversation.messages if message.role == "user"] == [QUESTION]
    thoughts = [message.reasoning_content for message in conversation.messages if message.reasoning_content]
    assert thoughts == [THOUGHT] * (name in ("openai", "openai, functions", "toucan", "anthropic"))
    system = {"toolace": "composing functions", "toolbench": "AutoGPT", "hermes": "Be brief."}.get(name, SYSTEM)
    if name != "xlam":
        assert system in conversation.system
    marks = ("<tool_call>", "<tools>", "[func", "Action Input", '"weather"')
    assert not any(mark in conversation.system for mark in marks) or name == "msagent"
    if name == "react":
        assert conversation.tools == ()
    else:
        (tool,) = conversation.offered
        assert (tool.name, tool.parameter_names) == ("weather", {"city"})
    if name in ("openai", "sharegpt, user and tool", "hermes", "toucan", "ms-swift"):
        assert conversation.tools == (WEATHER,)


@pytest.mark.parametrize("name", RECORDS)
def test_nothing_that_a_record_holds_is_lost_without_its_name(name: str) -> None:
    """Each value is altered alone, and an unknown field is put into each object: the conversation changes, or it is said."""
    form = NAMED.get(name, Format.auto)
    lost = [path for path, found in outcomes_of_fields(RECORDS[name], form).items() if found == "lost"]
    assert lost == []
    lost = [path for path, found in outcomes_of_unknown_fields(RECORDS[name], form).items() if found == "lost"]
    assert lost == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai", {"reasoning_from:reasoning_content"}),
        ("openai, functions", {"reasoning_from:think"}),
        ("llama-factory", set()),
        ("hermes", {"column_not_used:category", "tools_lifted", "words_about_calls_left_out"}),
        ("xlam", {"id_number"}),
        ("toolace", {"tools_lifted", "words_about_calls_left_out"}),
        ("toolbench", {"tools_lifted", "words_about_calls_left_out"}),
        ("anthropic", {"field_not_carried:cache_control", "field_not_carried:signature", "reasoning_from:think"}),
        (
            "toucan",
            {
                "column_not_used:uuid",
                "column_not_used:subset_name",
                "column_not_used:target_tools",
                "tools_from_column:available_tools",
                "reasoning_from:reasoning_content",
            },
        ),
    ],
)
def test_what_a_record_holds_beside_is_named(name: str, expected: set[str]) -> None:
    assert codes(RECORDS[name]) == expected


USER = {"role": "user", "content": "Weather in Rome and Oslo?"}
PARALLEL = {
    "role": "assistant",
    "content": "Two calls.",
    "tool_calls": [tool_call("1", '{"city": "Rome"}'), tool_call("2", '{"city": "Oslo"}')],
}


def test_parallel_openai_calls_become_calls_followed_by_their_results_in_the_order_of_the_calls() -> None:
    conversation = read(
        openai(
            {"role": "system", "content": "Be brief."},
            USER,
            PARALLEL,
            {"role": "tool", "tool_call_id": "2", "content": "rain"},
            {"role": "tool", "tool_call_id": "1", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "Clear in Rome, rain in Oslo."},
            tools=[TOOL],
        )
    )
    assert said(conversation)[3:] == [
        ("result", "rain"),
        ("result", '{"sky": "clear"}'),
        ("text", said(conversation)[-1][1]),
    ]
    conversation = as_msagent(conversation)
    assert said(conversation) == [
        ("text", "Two calls."),
        ("call", ("weather", {"city": "Rome"})),
        ("call", ("weather", {"city": "Oslo"})),
        ("result", '{"sky": "clear"}'),
        ("result", "rain"),
        ("text", "Clear in Rome, rain in Oslo."),
    ]
    assert conversation.system.startswith("Be brief.\n\n")
    (tool,) = conversation.offered
    assert (tool.name, tool.problem) == ("weather", None)
    assert tool.parameters is not None
    assert tool.parameters[0] == {"name": "city", "description": "where", "required": True, "type": "string"}
    assert tool.parameters[1] == {
        "name": "day",
        "description": "",
        "required": False,
        "type": "object",
        "required_fields": ["x"],
    }


def test_the_older_function_call_and_split_call_messages_are_openai_too() -> None:
    older = openai(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"role": "function", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    )
    split = openai(
        USER,
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"role": "tool_response", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    )
    expected = [("call", ("weather", {"city": "Rome"})), ("result", "sun"), ("text", "Sun.")]
    assert said(read(older)) == said(read(split)) == expected
    assert said(read({"conversations": older["messages"]})) == expected
    assert said(read(openai() | {"messages": json.dumps(older["messages"])})) == expected


REACT = (
    "Thought: I should look it up.\nAction: weather\nAction Input: {'city': 'Rome'}\nObservation: clear\n and warm\n"
    "Thought: I know.\nFinal Answer: Clear."
)


def test_react_text_is_converted_only_when_asked_for() -> None:
    record = {"conversations": [{"from": "user", "value": "Weather?"}, {"from": "assistant", "value": REACT}]}
    assert reason_of(record) == "form_react"
    assert said(read(record, form=Format.react)) == [
        ("text", "I should look it up."),
        ("call", ("weather", {"city": "Rome"})),
        ("result", "clear\n and warm"),
        ("text", "I know.\nClear."),
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Action: a\nObservation: b", "react_order"),
        ("Action: a", "react_order"),
        ("Observation: b", "react_order"),
        ("Action: a\nAction Input: {}\nObservation: b\nFinal Answer: c\nAction: a\nAction Input: {}", "react_order"),
        ("Action: a\nAction Input: rm -rf", "arguments_not_json"),
        ("Action: a\nAction Input: [1]", "arguments_not_an_object"),
        ("Action:\nAction Input: {}", "call_without_name"),
    ],
)
def test_react_text_out_of_order_is_refused(value: str, reason: str) -> None:
    record = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": value}]}
    assert reason_of(record, form=Format.react) == reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (openai(USER, PARALLEL, {"role": "tool", "tool_call_id": "9", "content": "x"}), "observation_without_call"),
        (openai(USER, PARALLEL, {"role": "tool", "tool_call_id": "2", "content": "x"}), "result_missing"),
        (openai(USER, {"role": "tool", "content": "x"}), "observation_without_call"),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", "{broken")]}), "arguments_not_json"),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", "[]")]}), "arguments_not_an_object"),
        (
            openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", {"x": float("nan")})]}),
            "arguments_not_json",
        ),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", {}, name="")]}), "call_without_name"),
        (openai(USER, {"role": "assistant", "tool_calls": ["x"]}), "call_not_an_object"),
        (openai(USER, {"role": "assistant", "content": None}), "empty_assistant"),
        (
            openai(USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}),
            "two_assistant_turns",
        ),
        (openai(USER, USER, {"role": "assistant", "content": "a"}), "two_user_turns"),
        (
            openai({"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}),
            "value_not_text",
        ),
        (openai(USER, {"role": "bot", "content": "a"}), "unknown_role"),
        (openai(USER, {"role": "assistant", "content": "a"}, tools="{"), "tools_unreadable"),
        (openai(USER, {"role": "assistant", "content": "a"}, tools=[{"function": {"name": 1}}]), "tools_unreadable"),
        (
            openai(USER, {"role": "assistant", "content": "a"}, tools=[{"name": "f", "input_schema": 1}]),
            "tools_unreadable",
        ),
        (openai(), "messages_not_a_list"),
        ({"messages": [None]}, "turn_not_an_object"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}, "unknown_role"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
            "call_not_json",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
            "observation_without_call",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ends_with_user"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_a_reason(record: dict, reason: str) -> None:
    assert reason_of(record) == reason


marks = st.sampled_from([THINK_OPEN, THINK_CLOSE, EXEC_OPEN, EXEC_CLOSE])
pieces = (
    marks
    | st.sampled_from(["\n", '"', "\\", "{", "}", "```", "and", "Action: a\nAction Input: {}", "1. {", "谢", " "])
    | st.text(max_size=5)
)
soup = st.lists(pieces, max_size=8).map("".join)
calls = st.lists(
    st.tuples(st.text(min_size=1, max_size=5), st.dictionaries(st.text(max_size=4), soup, max_size=3)), max_size=3
)


@given(user=soup, texts=st.tuples(soup, soup), calls=calls, results=st.lists(soup, max_size=3), system=soup)
@settings(max_examples=300, deadline=None)
def test_a_converted_record_says_exactly_what_it_said_before(
    user: str, texts: tuple[str, str], calls: list, results: list[str], system: str
) -> None:
    results = results[: len(calls)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    messages.append(
        {
            "role": "assistant",
            "content": texts[0],
            "tool_calls": [tool_call(str(n), json.dumps(a), f) for n, (f, a) in enumerate(calls)],
        }
    )
    messages += [{"role": "tool", "tool_call_id": str(n), "content": result} for n, result in enumerate(results)]
    if results:
        messages.append({"role": "assistant", "content": texts[1]})
    outcome = read_record({"messages": messages}, ORIGIN)
    if isinstance(outcome, Rejection):
        return
    conversation = outcome[0]
    expected = [("text", texts[0])] * bool(texts[0]) + [("call", call) for call in calls]
    expected += [("result", result) for result in results] + [("text", texts[1])] * bool(results and texts[1])
    assert said(conversation) == expected
    assert next(m.content for m in conversation.messages if m.role == "user") == user
    try:
        written = as_msagent(conversation)
    except GrammarError:
        return
    read_again = read({"conversations": [{"from": turn.role, "value": turn.text} for turn in written.turns]})
    words = [(kind, text.strip() if isinstance(text, str) else text) for kind, text in expected if kind != "result"]
    assert [each for each in said(read_again) if each[0] != "result"] == [each for each in words if each[1]]


THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def thoughts_of(segments: Iterable[Segment]) -> list[tuple[bool, str]]:
    return [(s.trained, s.text) for s in segments if s.kind is SpanKind.reasoning and s.text.strip()]


@pytest.mark.parametrize("how", Reasoning)
@pytest.mark.parametrize("layout", ["msagent", "thinking.jinja"])
def test_reasoning_is_trained_or_left_out_or_shown(how: Reasoning, layout: str, byte_tokenizer, tmp_path) -> None:
    outcome = read_record(RECORDS["openai"], ORIGIN, reasoning=how)
    assert not isinstance(outcome, Rejection)
    conversation, notices = outcome
    assert from_line(to_line(conversation)) == conversation
    (tmp_path / "thinking.jinja").write_text(THINKING)
    template = choose_template(layout.replace("thinking", str(tmp_path / "thinking")), byte_tokenizer)
    encoder = SegmentEncoder(byte_tokenizer)
    (made,) = make_examples([conversation], template, encoder)
    assert made.problem is None
    thoughts = [thought for piece in made.pieces for thought in thoughts_of(piece.segments) if THOUGHT in thought[1]]
    counted = [code for code in notices if code in ("reasoning_dropped", "reasoning_not_trained")]
    assert counted == {"keep": [], "drop": ["reasoning_dropped"], "context": ["reasoning_not_trained"]}[how]
    assert [trained for trained, _ in thoughts] == {"keep": [True], "drop": [], "context": [False]}[how]
    labelled = "".join(byte_tokenizer.decode(p.example.labels[p.example.labels >= 0]) for p in made.pieces)
    assert (THOUGHT in labelled) == (how is Reasoning.keep)
    assert ANSWER in labelled
    if layout == "msagent":
        (piece,) = made.pieces
        text = TokenText(byte_tokenizer)
        ids, labels = piece.example.input_ids, piece.example.labels
        assert trace_labels(conversation, ids, labels, text, stop_token=template.stop_token, verbatim=True) is None


def answer(text: str, *, tools: object = (WEATHER,), **fields: object) -> dict:
    return openai(USER, {"role": "assistant", "content": text, **fields}, tools=list(tools))


ROME, OSLO = ("call", ("weather", {"city": "Rome"})), ("call", ("weather", {"city": "Oslo"}))
JSON_CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<tool_call>\n{JSON_CALL}\n</tool_call>", [ROME]),
        (
            f"I look.\n<tool_call>{JSON_CALL}</tool_call>\n<tool_call>{JSON_CALL}</tool_call>",
            [("text", "I look."), ROME, ROME],
        ),
        ("<tool_call>{'name': 'weather', 'parameters': {'city': 'Rome'}}</tool_call>", [ROME]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call> {"}}</tool_call>',
            [("call", ("weather", {"city": "</tool_call> {"}))],
        ),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', [ROME]),
        (f"[{JSON_CALL}]", [ROME]),
        ('{"name": "wind", "parameters": {"city": "Rome"}}', None),
        ("[weather(city='Rome'), weather(city='Oslo')]", [ROME, OSLO]),
        ("[Tide Table(at='x', now=true)]", [("call", ("Tide Table", {"at": "x", "now": True}))]),
        ("[see (1)]", None),
        ("[weather(city=__import__('os'))]", None),
        ("[note (x=y)]", None),
        ("The mark <tool_call> begins a call, [TOOL_CALLS] another, <|python_tag|> too.", None),
        ("<|startofthink|> and <|endofexec|> are marks.", None),
        ("</s> <|im_end|> are letters here.", None),
    ],
)
def test_calls_that_stand_in_text_are_calls_and_all_else_is_text(text: str, expected: list | None) -> None:
    assert said(read(answer(text))) == (expected or [("text", text)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"<tool_call>{JSON_CALL}", "call_never_closed"),
        ("<tool_call>{broken}</tool_call>", "call_not_json"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e400}}</tool_call>', "call_not_json"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1, "x": 2}}</tool_call>', "call_not_json"),
        ('<tool_call>{"name": "f", "kwargs": {"x": 1}}</tool_call>', "arguments_unclear"),
        ('<tool_call>{"name": "f", "arguments": {}, "parameters": {"x": 1}}</tool_call>', "arguments_unclear"),
        ("<tool_call>\n<function=f>\n<parameter=x>1</function></tool_call>", "call_not_json"),
        ("<tool_call>f\n<arg_key>x</arg_key></tool_call>", "call_not_json"),
        ('[TOOL_CALLS][{"name": "f"}, {"nme": "g"}]', "call_without_name"),
        ("<|tool_call_start|>[f(a=1), g(b=), h(c=2)]<|tool_call_end|>", "call_not_json"),
        ("<|channel|>commentary to=functions.f <|message|>{x<|call|>", "call_not_json"),
        ('<|python_tag|>f.call(query="x")', "calls_in_text"),
        ("<｜tool▁calls▁begin｜>", "calls_in_text"),
        (f"{THINK_OPEN}```JSON\n{{}}\n```{THINK_CLOSE}", "marks_in_text"),
        ("Thought: so\nAction: f\nAction Input: {}", "form_react"),
        ("<think>for ever", "thought_never_closed"),
    ],
)
def test_calls_that_cannot_be_read_are_refused_by_name(text: str, reason: str) -> None:
    assert reason_of(answer(text)) == reason


IN_MARKS = {
    "function_xml": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    "function_xml, bare": "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
    "glm4": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
    "mistral": f"[TOOL_CALLS][{JSON_CALL}]",
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}',
    "llama3": f"<|python_tag|>{JSON_CALL}",
    "pythonic": "<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|>",
    "deepseek3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek3_1": '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>',
    "harmony": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
    "gemma4": '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>',
    "invoke_xml": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>',
    "listed": f"<TOOLCALL>[{JSON_CALL}]</TOOLCALL>",
    "listed, open": f"<|tool_call|>[{JSON_CALL}]",
}
"""One call in the marks of each family."""


@pytest.mark.parametrize("name", IN_MARKS)
def test_a_call_in_the_marks_of_any_family_is_read(name: str) -> None:
    """Also where the record would be MSAgent's but for its calls; the marks alone, in a sentence, are letters."""
    assert said(read(answer(IN_MARKS[name]))) == [ROME]
    turns = [("user", QUESTION), ("assistant", f"I look.\n{IN_MARKS[name]}"), ("user", "thanks"), ("assistant", "!")]
    record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    assert said(read(record)) == [("text", "I look."), ROME, ("text", "!")]
    assert reason_of(record, Format.msagent) == "form_sharegpt"
    marks = IN_MARKS[name].split("weather")[0].replace(JSON_CALL[:10], "").strip("[{ \n")
    mention = answer(f"It writes {marks} first.")
    if "▁begin｜>" in marks or "_begin|>" in marks:  # nobody writes these in a sentence
        assert reason_of(mention) == "calls_in_text"
    else:
        assert said(read(mention)) == [("text", f"It writes {marks} first.")]


def test_thoughts_and_answers_in_channels_are_read_too() -> None:
    before = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    for text, words in ((before + IN_MARKS["harmony"], None), (before + "<|channel|>final<|message|>Clear.", "Clear.")):
        step = read(answer(text)).messages[-1]
        assert (step.reasoning_content, step.content) == ("I look.", words)


def test_a_call_in_other_marks_beside_those_of_msagent_is_refused() -> None:
    call = '<|startofthink|>{"api_name": "weather", "parameters": {}}<|endofthink|>'
    turns = [("user", "q"), ("assistant", f"{IN_MARKS['listed']}\n{call}")]
    assert reason_of({"conversations": [{"from": role, "value": value} for role, value in turns]}) == "calls_in_text"


def test_values_without_quotes_have_the_types_of_the_record_and_ids_are_kept() -> None:
    text = "<function=weather>\n<parameter=city>\n75001\n</parameter>\n</function>"
    assert said(read(answer(text))) == [("call", ("weather", {"city": "75001"}))]
    assert said(read(answer(text, tools=()))) == [("call", ("weather", {"city": 75001}))]
    (call,) = read(answer('[TOOL_CALLS][{"name": "weather", "arguments": {}, "id": "abc"}]')).tool_calls
    assert call.id == "abc"
    record = answer('<tool_call>{"name": "f", "arguments": {}, "url": "u"}</tool_call>')
    assert "field_not_carried:url" in codes(record)
    assert read(record).messages[-1] == Message("assistant", tool_calls=(ToolCall("f", {}),))


def test_a_call_in_text_beside_calls_as_a_field_is_refused() -> None:
    assert (
        reason_of(answer(f"<tool_call>{JSON_CALL}</tool_call>", tool_calls=[tool_call("1", "{}")])) == "calls_in_text"
    )
    assert reason_of(answer("", tool_calls=[tool_call("1", "{}")], function_call={"name": "f"})) == "call_not_an_object"


@pytest.mark.parametrize(
    ("message", "thought", "text"),
    [
        ({"content": "<think>\nhm\n</think>\n\na"}, "hm", "a"),
        ({"content": "hm\n</think>\n\na"}, "hm", "a"),
        ({"content": "a", "thinking": "hm"}, "hm", "a"),
        ({"content": "a", "reasoning": "hm", "reasoning_content": "hm"}, "hm", "a"),
        ({"content": "<think>hm</think>a", "reasoning": "hm"}, "hm", "a"),
        ({"content": "<think></think>a"}, None, "a"),
        ({"content": "The marks <think> and </think> are letters."}, None, None),
        ({"content": "The mark </think> is letters."}, None, None),
    ],
)
def test_reasoning_is_one_field(message: dict, thought: str | None, text: str | None) -> None:
    (step,) = (m for m in read(openai(USER, {"role": "assistant", **message})).messages if m.role == "assistant")
    assert (step.reasoning_content, step.content) == (thought, text or message["content"])


def test_two_reasonings_that_differ_are_refused_and_what_is_no_text_is_named() -> None:
    assert reason_of(answer("<think>one</think>a", reasoning="other")) == "two_reasonings"
    assert "field_not_carried:reasoning" in codes(answer("a", reasoning={"summary": "hm"}))


@pytest.mark.parametrize(
    ("ids", "results", "expected"),
    [
        (("1", "2"), [{"tool_call_id": "2", "content": "O"}, {"tool_call_id": "1", "content": "R"}], ["2", "1"]),
        ((1, 2), [{"tool_call_id": 2.0, "content": "O"}, {"tool_call_id": 1, "content": "R"}], ["2", "1"]),
        ((None, None), [{"content": "R"}, {"content": "O"}], [None, None]),
        ((None, None), [{"name": "other", "content": "R"}], "observation_without_call"),
        (("1", "2"), [{"tool_call_id": "3", "content": "R"}], "observation_without_call"),
        (("1", "1"), [], "call_id_twice"),
    ],
)
def test_results_follow_ids_and_names(ids: tuple, results: list[dict], expected: object) -> None:
    calls = [tool_call(call_id, "{}") for call_id in ids]
    tools = [{"role": "tool", **result} for result in results]
    record = openai(USER, {"role": "assistant", "tool_calls": calls}, *tools, tools=[WEATHER])
    if isinstance(expected, str):
        assert reason_of(record) == expected
    else:
        assert [message.tool_call_id for message in read(record).messages if message.role == "tool"] == expected


def test_one_list_of_results_with_names_is_a_result_of_each_call() -> None:
    results = [{"name": "weather", "results": {"sky": "clear"}}, {"name": "weather", "results": {"sky": "grey"}}]
    turns = [
        ("user", "q"),
        ("assistant", "[weather(city='Rome'), weather(city='Oslo')]"),
        ("tool", json.dumps(results)),
    ]
    record = {"system": "s", "conversations": [{"from": role, "value": value} for role, value in turns]}
    assert said(read(record))[2:] == [("result", json.dumps(result)) for result in results]


def test_system_messages_in_the_middle_and_names_are_carried() -> None:
    record = openai(
        {"role": "user", "content": "q", "name": "ann"},
        {"role": "assistant", "content": "a"},
        {"role": "system", "content": "Now be brief."},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    )
    conversation = read(record)
    assert [(m.role, m.text, m.name) for m in conversation.messages][:3] == [
        ("user", "q", "ann"),
        ("assistant", "a", None),
        ("system", "Now be brief.", None),
    ]
    with pytest.raises(GrammarError, match="system_in_middle"):
        as_msagent(conversation)


@pytest.mark.parametrize("separator", ["\n", "\n\n", ""])
def test_tools_in_a_block_are_lifted_one_by_one(separator: str) -> None:
    other = {"type": "function", "function": {"name": "wind", "parameters": {"type": "object", "properties": {}}}}
    block = separator.join(json.dumps(tool, indent=1 if separator else None) for tool in (WEATHER, other))
    system = {
        "role": "system",
        "content": f"Be kind.\n\n# Tools\n\nYou are given:\n<tools>\n{block}\n</tools>\n\nGo on.",
    }
    conversation = read(openai(system, USER, {"role": "assistant", "content": "a"}))
    assert conversation.tools == (WEATHER, other)
    assert conversation.system == "Be kind.\n\n# Tools\n\nGo on."
    differs = openai(system, USER, {"role": "assistant", "content": "a"}, tools=[WEATHER])
    assert "<tools>" in read(differs).system
    assert "tools_in_system_too" in codes(differs)


@pytest.mark.parametrize("layout", ["msagent", "chatml"])
def test_every_format_is_trained_in_every_layout(layout: str, byte_tokenizer) -> None:
    """The same labels where the same is said: answers, calls and stops, whatever the format was."""
    template, encoder = choose_template(layout, byte_tokenizer), SegmentEncoder(byte_tokenizer)
    for name, record in RECORDS.items():
        outcome = read_record(record, ORIGIN, form=NAMED.get(name, Format.auto), reasoning=Reasoning.drop)
        assert not isinstance(outcome, Rejection), outcome
        (made,) = make_examples([outcome[0]], template, encoder)
        assert made.problem is None, (name, made.problem)
        (piece,) = made.pieces
        labels = byte_tokenizer.decode(piece.example.labels[piece.example.labels >= 0])
        expected = (
            'weather", "parameters": {"city": "Rome"}' if layout == "msagent" else '"arguments": {"city": "Rome"}'
        )
        assert expected in labels, name
        assert (ANSWER in labels) == (name != "xlam")
        assert QUESTION not in labels
        assert RESULT not in labels
