"""Our layouts against the chat templates that the models' makers published.

TRL's wheel holds copies of them, byte for byte, and compares them with the hubs every week. `make install` brings it; without it these tests are
skipped. Nothing of TRL is imported: only the files are read.
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from agentft.data.conversation import Conversation, Origin
from agentft.data.records import read_record
from agentft.data.template_choice import choose_template, detect_family
from agentft.data.tokens import SegmentEncoder, tokenize
from agentft.model.random_weights import byte_tokenizer

CHATML_TOKENS = ("<tool_call>", "</tool_call>")
RESPONSE_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")

DECLARATION = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Tides",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"description": "Where", "type": "string"}},
            "required": ["harbour"],
        },
    },
}
SYSTEM = (
    'Be short.\n\n1. {"name": "tide", "description": "Tides", "parameters": '
    '[{"name": "harbour", "description": "Where", "required": true, "type": "string"}]}'
)
RESULT = {"high": "14:20"}


def published(name: str) -> str:
    found = importlib.util.find_spec("trl")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the published templates are read out of TRL's wheel: pip install --no-deps trl")
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def model(name: str):
    """A byte-level tokenizer with the added tokens of a family and its published template."""
    tokenizer = byte_tokenizer()
    if name.startswith("llama"):
        tokenizer.add_special_tokens({"additional_special_tokens": list(LLAMA_TOKENS), "bos_token": LLAMA_TOKENS[0]})
    else:
        tokenizer.add_tokens(list(CHATML_TOKENS if name == "qwen2_5" else CHATML_TOKENS + RESPONSE_TOKENS))
    tokenizer.chat_template = published(name)
    return tokenizer


def call(harbour: str) -> str:
    body = json.dumps({"api_name": "tide", "parameters": {"harbour": harbour}})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


def tool_call(harbour: str) -> dict:
    return {"type": "function", "function": {"name": "tide", "arguments": {"harbour": harbour}}}


def talk(*turns: tuple[str, str]) -> Conversation:
    record = {"id": "c", "conversations": [{"from": role, "value": value} for role, value in turns]}
    outcome = read_record(record, Origin("test", 1))
    assert isinstance(outcome, tuple), outcome
    return outcome[0]


EXECUTED = f"\n\n<|startofexec|>```JSON\n{json.dumps(RESULT)}\n```<|endofexec|>\n"
CALLING = talk(
    ("system", SYSTEM), ("user", "Tide in Husum?"), ("assistant", f"{call('Husum')}{EXECUTED}At 14:20."), ("user", "Thanks"),
    ("assistant", "Welcome."),
)  # fmt: skip


def messages(result: object) -> list[dict]:
    return [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Tide in Husum?"},
        {"role": "assistant", "content": "", "tool_calls": [tool_call("Husum")]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "At 14:20."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ]


def rendered(tokenizer, conversation: Conversation) -> tuple[str, list[str]]:
    """The text of a conversation, and the prompt of each of its steps."""
    template = choose_template("native", tokenizer)
    (example,) = tokenize([conversation], template, SegmentEncoder(tokenizer))
    text = "".join(segment.text for segment in template.render(conversation))
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == text
    prompts = [tokenizer.decode(example.input_ids[:start], skip_special_tokens=False) for start, _ in example.steps()]
    return text, prompts


PLAIN = [
    [("system", "Be kind."), ("user", "Hello 123,\n\n you?"), ("assistant", "Fine. 45% sure\n- yes")],
    [("user", "早上好"), ("assistant", "你好！"), ("user", "2 + 2?"), ("assistant", "It is 4.")],
]


@pytest.mark.parametrize("turns", PLAIN, ids=["system", "no_system"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3"])
def test_talk_without_tools_is_the_published_text(name: str, turns):
    tokenizer = model(name)
    said = [{"role": role, "content": content} for role, content in turns]
    text, prompts = rendered(tokenizer, talk(*turns))
    assert text == tokenizer.apply_chat_template(said, tokenize=False)
    assert prompts[-1] == tokenizer.apply_chat_template(said[:-1], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_calls_and_results_are_the_published_text_at_every_step(name: str):
    tokenizer = model(name)
    said = messages(json.dumps(RESULT))
    text, prompts = rendered(tokenizer, CALLING)
    options = {"tools": [DECLARATION], "tokenize": False}
    assert text == tokenizer.apply_chat_template(said, **options)
    expected = [tokenizer.apply_chat_template(said[:n], add_generation_prompt=True, **options) for n in (2, 4, 6)]
    assert prompts == expected


def test_parallel_calls_after_a_text_are_qwens():
    tokenizer = model("qwen2_5")
    answer = f"I look.\n{call('Husum')}{call('Kiel')}{EXECUTED * 2}So."
    two = talk(("system", SYSTEM), ("user", "Husum and Kiel?"), ("assistant", answer))
    said = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Husum and Kiel?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [tool_call("Husum"), tool_call("Kiel")]},
        *[{"role": "tool", "content": json.dumps(RESULT)}] * 2,
        {"role": "assistant", "content": "So."},
    ]
    assert rendered(tokenizer, two)[0] == tokenizer.apply_chat_template(said, tools=[DECLARATION], tokenize=False)


def test_every_prompt_of_qwen3_is_the_published_one_but_for_the_empty_thoughts_of_earlier_steps():
    tokenizer = model("qwen3")
    assert detect_family(tokenizer) == "qwen3"
    said = messages(json.dumps(RESULT))
    _, prompts = rendered(tokenizer, CALLING)
    options = {"tools": [DECLARATION], "tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    thought = "<think>\n\n</think>\n\n"
    for prompt, length in zip(prompts, (2, 4, 6), strict=True):
        expected = tokenizer.apply_chat_template(said[:length], **options)
        assert prompt.replace(thought, "") + thought == expected.replace(thought, "") + thought
        assert prompt.endswith(thought)
        assert expected.endswith(thought)
    assert prompts[0] == tokenizer.apply_chat_template(said[:2], **options)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llamas_text_is_the_published_one_but_for_its_lines_about_dates_and_environment(name: str):
    tokenizer = model(name)
    options = {"tools": [DECLARATION], "tools_in_user_message": False, "tokenize": False, "date_string": "1 Jan"}
    theirs = tokenizer.apply_chat_template(messages(RESULT), **options)
    lines = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 1 Jan\n\n"
    assert theirs.count(lines) == 1
    assert rendered(tokenizer, CALLING)[0] == theirs.replace(lines, "")
