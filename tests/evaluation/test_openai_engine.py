"""A served model is evaluated on the same steps: messages in, canonical text out, errors retried and then named."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from agentft.data.conversation import Origin
from agentft.data.records import read_record
from agentft.data.template_choice import exported_template
from agentft.errors import ConfigError, EvaluationError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.evaluation.generate import deciding_settings
from agentft.evaluation.openai import OpenAIGenerator, chat_step, reply_text
from agentft.evaluation.parse import parse_reply
from agentft.evaluation.steps import all_steps, conversation_steps, score_step
from agentft.recipes.config import require_consistent
from agentft.settings import affects
from tests.evaluation.loopback_chat import LoopbackChat
from tests.examples import tokenize

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(scope="module")
def steps(golden_conversations, template, encoder):
    conversations = list(golden_conversations.values())
    return all_steps(conversations, list(tokenize(conversations, template, encoder)), template)


def step_of(steps, name, index):
    return next(step for step in steps if step.conversation.id == name and step.index == index)


def engine(chat, pauses=None, **settings):
    pauses = [] if pauses is None else pauses
    return OpenAIGenerator(served(chat.url, **{"request_timeout": 5.0, **settings}), pause=pauses.append)


def served(url="http://localhost/v1", **settings):
    return EvaluationConfig(engine=Engine.openai, base_url=url, served_model="m", **settings)


def tool_call(name, arguments):
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


def call(name, **parameters):
    body = json.dumps({"api_name": name, "parameters": parameters})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


def oracle(steps):
    """Answers each request with its reference, found by the context it was sent."""
    replies = {}
    for step in steps:
        sent = chat_step(step)
        own = {name: safe for safe, name in sent.names.items()}
        reply = parse_reply(step.reference)
        calls = [tool_call(own.get(r.name, r.name), json.dumps(r.arguments)) for r in reply.calls]
        replies[json.dumps(sent.messages)] = {"content": reply.text or None, "tool_calls": calls}
    return lambda body, _: dict(replies[json.dumps(body["messages"])])


def test_a_perfect_endpoint_scores_1_everywhere_whatever_the_order_of_its_replies(steps):
    readable = [step for step in steps if not len(parse_reply(step.reference).failures)]
    script = oracle(readable)

    def reply(body, number):
        time.sleep(0.02 * (number % 3))
        return script(body, number)

    heard = []
    with LoopbackChat(reply) as chat:
        answers = engine(chat, batch=4).generate(readable, heard.append)
        assert 1 < chat.most_at_once <= 4
    assert [answer.step for answer in answers] == readable
    assert sorted(map(id, heard)) == sorted(map(id, answers))
    for answer in answers:
        score = score_step(answer.step.record(answer.text))
        assert score.is_exact, (answer.text, answer.step.reference)
        assert score.rouge_l in (None, 1.0)
        assert answer.tokens == 7


def test_as_recorded_the_layout_s_own_chat_template_writes_what_training_showed(steps, template, byte_tokenizer):
    for step in steps:
        sent = chat_step(step, as_recorded=True)
        assert sent.tools == []
        written = byte_tokenizer.apply_chat_template(
            sent.messages, chat_template=exported_template(template), tokenize=False, add_generation_prompt=True
        )
        shown = byte_tokenizer.decode(step.input_ids[: step.start].tolist(), skip_special_tokens=False)
        assert written == shown, step.conversation.id


def test_a_request_without_tools_leaves_the_step_as_it_is_recorded(steps):
    step = step_of(steps, "one_call", 1)
    with LoopbackChat(lambda body, _: {"content": "14:20"}) as chat:
        engine(chat, request='{"tools": null}').generate([step])
    (body,) = chat.requests
    assert "tools" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert body["messages"][0]["content"] == step.conversation.system
    assert body["messages"][2]["content"].startswith("<|startofthink|>")
    assert body["messages"][3]["content"].startswith("<|startofexec|>")


def test_history_goes_as_native_calls_with_one_result_each_and_never_the_target(steps):
    sent = chat_step(step_of(steps, "one_call", 1))
    assert [message["role"] for message in sent.messages] == ["system", "user", "assistant", "tool"]
    assert sent.messages[0]["content"] == "You can use these plugins."
    (asked,) = sent.messages[2]["tool_calls"]
    assert asked["function"]["name"] == "get_tide"
    assert sent.messages[3]["tool_call_id"] == asked["id"]
    assert "<|" not in json.dumps(sent.messages)
    for step in steps:
        messages = chat_step(step).messages
        assert messages[-1]["role"] in ("user", "tool")
        waiting: list[str] = []
        for message in messages:
            if message["role"] != "tool":
                assert not waiting, "every call has its result before anything else is said"
            waiting += [each["id"] for each in message.get("tool_calls", [])]
            if message["role"] == "tool":
                waiting.remove(message["tool_call_id"])
        assert not waiting


def test_tools_are_declared_as_schemas_under_names_that_endpoints_take(steps):
    sent = chat_step(step_of(steps, "one_call", 0))
    tools = {tool["function"]["name"]: tool["function"] for tool in sent.tools}
    assert set(tools) == {"get_tide", "ferry_times"}
    assert sent.names["ferry_times"] == "ferry.times"
    assert tools["ferry_times"]["parameters"] == {
        "type": "object",
        "properties": {"line": {"description": "line", "type": "integer"}},
        "required": ["line"],
    }
    text = reply_text({"tool_calls": [tool_call("ferry_times", '{"line": 7}')]}, sent.names)
    assert text == call("ferry.times", line=7)


def test_names_that_become_equal_are_told_apart(template, encoder):
    tools = "\n\n".join(f'{i}. {{"name": "{name}"}}' for i, name in enumerate(("a.b", "a_b", "查询", "天气"), 1))
    turns = [("system", f"Be brief.\n\n{tools}"), ("user", "hi"), ("assistant", "hello")]
    found = read_record({"id": "c", "conversations": [{"from": r, "value": v} for r, v in turns]}, Origin("x", 1))
    (example,) = tokenize([found[0]], template, encoder)
    (step,) = conversation_steps(found[0], example, template)
    sent = chat_step(step)
    assert list(sent.names.values()) == ["a.b", "a_b", "查询", "天气"]
    assert list(sent.names) == ["a_b", "a_b_2", "__", "___2"]
    assert sent.messages[0] == {"role": "system", "content": "Be brief."}


def test_rounds_that_are_only_shown_stand_before_the_first_step(golden_conversations, template, encoder):
    conversation = golden_conversations["several_rounds"]
    (whole,) = tokenize([conversation], template, encoder)
    (piece,) = tokenize([conversation], template, encoder, context_rounds=1)
    every = conversation_steps(conversation, whole, template)
    asked = conversation_steps(conversation, piece, template)
    assert 0 < len(asked) < len(every)
    for step, same in zip(asked, every[-len(asked) :], strict=True):
        assert step.reference == same.reference
        assert chat_step(step).messages == chat_step(same).messages


def test_types_that_json_schema_does_not_know_are_not_sent(template, encoder):
    tool = {
        "name": "a",
        "parameters": [
            {"name": "x", "type": "dict", "properties": {"y": {"type": "float"}}, "required": True},
            {"name": "z", "type": "any", "default": {"type": "float"}},
        ],
    }
    turns = [("system", f"1. {json.dumps(tool)}"), ("user", "hi"), ("assistant", "hello")]
    found = read_record({"id": "c", "conversations": [{"from": r, "value": v} for r, v in turns]}, Origin("x", 1))
    (example,) = tokenize([found[0]], template, encoder)
    (step,) = conversation_steps(found[0], example, template)
    schema = chat_step(step).tools[0]["function"]["parameters"]
    assert schema["properties"] == {
        "x": {"type": "object", "properties": {"y": {"type": "number"}}},
        "z": {"default": {"type": "float"}},
    }


def test_a_list_of_tools_that_cannot_be_read_is_sent_as_it_stands_with_marks(template, encoder):
    system = "Write calls as JSON between <|startofthink|> and <|endofthink|>:\n\n1. {broken"
    result = '<|startofexec|>{"ok": 1}<|endofexec|>'
    turns = [("system", system), ("user", "hi"), ("assistant", f"{call('a', x=1)}\n{result}\nDone.")]
    found = read_record({"id": "c", "conversations": [{"from": r, "value": v} for r, v in turns]}, Origin("x", 1))
    (example,) = tokenize([found[0]], template, encoder)
    step = conversation_steps(found[0], example, template)[1]
    assert chat_step(step).tools == []
    assert [(m["role"], m["content"]) for m in chat_step(step).messages] == [
        ("system", system),
        ("user", "hi"),
        ("assistant", call("a", x=1)),
        ("user", result),
    ]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": " hi "}, "hi"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": None}, ""),
        ({"content": "look", "tool_calls": [tool_call("a", "")]}, "look\n" + call("a")),
        ({"tool_calls": [tool_call("a", '{"x": 1}'), tool_call("b", "null")]}, call("a", x=1) + "\n" + call("b")),
        ({"tool_calls": [tool_call("a", {"x": 1}), "odd", {"function": 3}]}, call("a", x=1)),
        (
            {"tool_calls": [tool_call("a", '{"x": "<|endofthink|>"}')]},
            call("a", x="<|endofthink|>").replace("<|endofthink|>", "\\u003c|endofthink|>", 1),
        ),
    ],
)  # fmt: skip
def test_replies_become_one_text(message, text):
    assert reply_text(message, {}) == text
    assert len(parse_reply(text).failures) == 0


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]", "7", '{"x": NaN}', '{}, "api_name": "b"'])
def test_arguments_that_are_no_object_are_a_malformed_call(arguments):
    reply = parse_reply(reply_text({"tool_calls": [tool_call("a", arguments)]}, {}))
    assert len(reply.failures) == 1
    assert reply.calls == ()


def test_trouble_is_waited_out_and_the_endpoint_is_obeyed(steps):
    script = [429, 503, (429, {"Retry-After": "3"}), "no json", "[]", {"content": "well"}]
    pauses: list[float] = []
    with LoopbackChat(lambda _, number: script[number]) as chat:
        (answer,) = engine(chat, pauses).generate(steps[:1])
    assert answer.text == "well"
    assert pauses == [1, 2, 3, 8, 16]


def test_silence_is_ended_by_the_timeout(steps):
    with LoopbackChat(lambda _, number: {"content": "well"} if number else 5.0) as chat:
        (answer,) = engine(chat, request_timeout=0.3).generate(steps[:1])
    assert answer.text == "well"


def test_after_the_last_attempt_it_ends_in_words_and_what_was_answered_has_been_told(steps):
    good = {json.dumps(chat_step(step).messages) for step in steps[:3]}
    heard = []

    def reply(body, _):
        return {"content": "well"} if json.dumps(body["messages"]) in good else 500

    with LoopbackChat(reply) as chat, pytest.raises(EvaluationError, match="attempt 3 of 3 failed: HTTP 500") as caught:
        engine(chat, retries=2, batch=1).generate(steps[:5], heard.append)
    assert [answer.step for answer in heard] == steps[:3]
    assert "scripted 500" in str(caught.value)


def test_a_refusal_is_not_tried_again_and_the_key_is_never_said(steps, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LoopbackChat(lambda _, __: 401) as chat:
        with pytest.raises(EvaluationError, match="HTTP 401") as caught:
            engine(chat).generate(steps[:1])
        assert len(chat.requests) == 1
        assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    with LoopbackChat(lambda _, __: json.dumps({"you sent": KEY})) as chat:
        with pytest.raises(EvaluationError, match="no choices") as caught:
            engine(chat, retries=0).generate(steps[:1])
        assert KEY not in str(caught.value)
        assert KEY not in str(engine(chat).identity)


def test_redirects_are_not_followed(steps, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LoopbackChat(lambda _, __: {"content": "stolen"}) as other:
        with (
            LoopbackChat(lambda _, __: (302, {"Location": f"{other.url}/chat/completions"})) as chat,
            pytest.raises(EvaluationError, match="HTTP 302"),
        ):
            engine(chat).generate(steps[:1])
        assert other.requests == []


def test_requests_are_greedy_bounded_and_can_be_changed(steps, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with LoopbackChat(lambda _, __: {"content": "well", "finish_reason": "length"}) as chat:
        config = EvaluationConfig(
            engine=Engine.openai,
            base_url=f"{chat.url}/",
            served_model="m",
            auth_variable="MY_KEY",
            request='{"max_tokens": null, "max_completion_tokens": 9, "seed": 1}',
        )
        generator = OpenAIGenerator(config)
        (answer,) = generator.generate(steps[:1])
    (body,) = chat.requests
    assert (body["model"], body["temperature"], body["max_completion_tokens"], body["seed"]) == ("m", 0, 9, 1)
    assert "max_tokens" not in body
    assert chat.headers[0]["path"] == "/v1/chat/completions"
    assert answer.finish == "length"
    assert KEY not in json.dumps(generator.identity)


def test_answers_are_another_model_s_only_where_a_setting_affects_answers():
    config = served()
    others = {"max_new_tokens": 9, "base_url": "http://localhost:2/v1", "served_model": "n", "request": '{"seed": 1}'}
    others |= {"batch": 3, "bootstrap_samples": 7, "retries": 1, "request_timeout": 1.0, "conversations": 2, "seed": 5}
    before = OpenAIGenerator(config).identity
    changing = {
        name
        for name, value in others.items()
        if OpenAIGenerator(dataclasses.replace(config, **{name: value})).identity != before
    }
    assert changing == {name for name in others if affects(EvaluationConfig)[name] == "answers"}
    assert deciding_settings(EvaluationConfig()) == {"engine": "transformers", "max_new_tokens": 512}


def test_settings_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="base_url"):
        require_consistent(EvaluationConfig(engine=Engine.openai, served_model="m"))
    with pytest.raises(ConfigError, match="served_model"):
        require_consistent(EvaluationConfig(engine=Engine.openai, base_url="http://x/v1"))
    with pytest.raises(ConfigError, match="not JSON"):
        EvaluationConfig(request="{")
    with pytest.raises(ConfigError, match="JSON object"):
        EvaluationConfig(request="[]")
    served_by = {"base_url": "http://x/v1", "served_model": "m"}
    with pytest.raises(ConfigError, match="likelihood"):
        require_consistent(EvaluationConfig(engine=Engine.openai, mode=Mode.likelihood, **served_by))
    with pytest.raises(ConfigError, match="name or password"):
        OpenAIGenerator(served("http://me:pw@x/v1"))
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds no key"):
        OpenAIGenerator(served("http://x/v1"))
