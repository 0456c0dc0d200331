"""Chat templates write what training showed, byte for byte."""

from __future__ import annotations

import json

import jinja2
import pytest

from agentft.data.chat_templates import chat_template
from agentft.data.conversation import Conversation, Origin
from agentft.data.native import HERMES_MARKS, ChatmlTemplate, Llama3Template, Qwen3Template
from agentft.data.records import read_record
from agentft.data.render import MsagentTemplate
from tests.data.chat_messages import before_steps, msagent_messages, native_messages, prompts

MSAGENT = MsagentTemplate("<|endoftext|>")
NATIVE = {
    "chatml": ChatmlTemplate("<|im_end|>", frozenset(HERMES_MARKS)),
    "qwen2.5": ChatmlTemplate("<|im_end|>", frozenset(HERMES_MARKS), "You are Qwen, created by Alibaba Cloud."),
    "qwen3": Qwen3Template("<|im_end|>", frozenset(HERMES_MARKS)),
    "llama3": Llama3Template("<|eot_id|>", frozenset({"<|python_tag|>"})),
}


def written(tokenizer, template, messages, tools=None) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=chat_template(template), tokenize=False, add_generation_prompt=True
    )


def test_msagent_prompts_are_those_of_training_byte_for_byte(golden_conversations, byte_tokenizer):
    steps = 0
    for conversation in golden_conversations.values():
        wanted = prompts(MSAGENT.render(conversation))
        histories = before_steps(msagent_messages(conversation))
        assert [written(byte_tokenizer, MSAGENT, history) for history in histories] == wanted, conversation.id
        steps += len(wanted)
    assert steps > 15


def test_msagent_writes_calls_and_results_of_plain_messages_as_the_data_does(byte_tokenizer):
    call = {"function": {"name": "tide", "arguments": {"harbour": "胡苏姆"}}}
    messages = [
        {"role": "user", "content": "Tide?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call, {"function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "content": '{"high": "14:20"}'},
        {"role": "tool", "content": '{"time": "12:00"}'},
    ]
    assert written(byte_tokenizer, MSAGENT, messages) == (
        "<|user|>:Tide?\n\n<|assistant|>:I look.\n"
        '<|startofthink|>```JSON\n{"api_name": "tide", "parameters": {"harbour": "胡苏姆"}}\n```<|endofthink|>\n'
        '<|startofthink|>```JSON\n{"api_name": "now", "parameters": {}}\n```<|endofthink|><|endoftext|>\n\n'
        '<|startofexec|>```JSON\n{"high": "14:20"}\n```<|endofexec|>\n'
        '<|startofexec|>```JSON\n{"time": "12:00"}\n```<|endofexec|>\n'
    )


def test_msagent_refuses_tools_that_it_would_not_write(byte_tokenizer):
    tool = {"type": "function", "function": {"name": "tide", "description": "", "parameters": {"type": "object"}}}
    with pytest.raises(jinja2.TemplateError, match="reads its tools in the system text"):
        written(byte_tokenizer, MSAGENT, [{"role": "user", "content": "?"}], [tool])


@pytest.mark.parametrize("name", NATIVE)
def test_native_prompts_are_those_of_training_byte_for_byte(name, golden_conversations, byte_tokenizer):
    template, compared = NATIVE[name], 0
    for conversation in golden_conversations.values():
        if template.problem(conversation):
            continue
        messages, tools = native_messages(conversation)
        wanted = prompts(template.render(conversation))
        found = [written(byte_tokenizer, template, history, tools) for history in before_steps(messages)]
        assert found == wanted, conversation.id
        compared += len(wanted)
    assert compared > 12


def test_a_stop_token_with_quotes_and_braces_is_written_as_it_is(byte_tokenizer):
    odd = MsagentTemplate("<|a'b\"{{c}}|>")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert written(byte_tokenizer, odd, messages).endswith("<|assistant|>:!<|a'b\"{{c}}|>")


def test_real_conversations_differ_in_white_space_alone(shared_data, byte_tokenizer):
    equal = total = 0
    for number, line in enumerate((shared_data / "train.jsonl").open(encoding="utf-8")):
        if number == 400:
            break
        for conversation in read_record(json.loads(line), Origin("train.jsonl", number)):
            if not isinstance(conversation, Conversation):
                continue
            wanted = prompts(MSAGENT.render(conversation))
            histories = before_steps(msagent_messages(conversation))
            for history, text in zip(histories, wanted, strict=True):
                found = written(byte_tokenizer, MSAGENT, history)
                assert "".join(found.split()) == "".join(text.split())
                equal += found == text
                total += 1
    assert total > 500
    assert equal / total > 0.9, f"{equal} of {total}"
