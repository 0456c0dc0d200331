"""Text made to be slow or deep costs no more than its length. A quadratic reader would sit over these for minutes."""

from __future__ import annotations

import json

import pytest

from agentft.data.conversation import Conversation, Origin
from agentft.data.msagent import read_system
from agentft.data.records import Rejection, read_record
from agentft.data.response import our_templates
from agentft.data.sources import parse_json_value
from agentft.data.tools import read_offered_tools
from agentft.errors import FormatError

CALL = '<|startofthink|>{"api_name": "f", "parameters": {}}<|endofthink|>'


def read(assistant: str, system: str = "s") -> Conversation | str:
    turns = [("system", system), ("user", "u"), ("assistant", assistant)]
    record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    outcome = read_record(record, Origin("hostile", 1))
    return outcome.reason if isinstance(outcome, Rejection) else outcome[0]


def test_a_key_that_comes_again_after_a_hundred_thousand_others_is_found():
    pairs = ",".join(f'"k{number}":0' for number in range(100_000))
    with pytest.raises(FormatError, match="'k99999' twice"):
        parse_json_value("{" + pairs + ',"k99999":1}')


def test_a_call_body_of_quotes_and_backslashes_is_read_once():
    assert read("<|startofthink|>" + '"\\' * 500_000 + "<|endofthink|>" * 3) == "think_closed_twice"


def test_many_calls_results_and_look_alikes_are_read_in_one_pass():
    conversation = read(CALL * 5_000 + "<|startofexec|>{x<|endofexec|>" * 5_000)
    assert isinstance(conversation, Conversation)
    assert len(conversation.tool_calls) == 5_000
    assert isinstance(read("< | " * 200_000), Conversation)


@pytest.mark.parametrize("depth", [250, 900, 5_000])
def test_a_tool_entry_nested_too_deep_costs_the_entry_only(depth: int):
    """Later rooms parse and write it again, deeper in the stack."""
    nested = "[" * depth + "]" * depth
    system = f'1. {{"name": "deep", "parameters": [{{"name": "x", "default": {nested}}}]}}\n2. {{"name": "g"}}'
    deep, other = read_offered_tools(system)
    assert (deep.name, deep.parameters, other.name, other.problem) == ("deep", None, "g", None)
    assert deep.problem is not None
    assert read_system(system).problem == (
        "tools_not_lifted",
        "an entry of the tool list cannot be read as a function declaration",
    )
    conversation = read(CALL.replace('"f"', '"deep"'), system)
    assert isinstance(conversation, Conversation)


def test_a_tool_list_as_deep_as_a_record_may_be_is_read():
    nested = json.loads("[" * 150 + "]" * 150)
    entry = {"name": "f", "parameters": [{"name": "x", "default": nested}]}
    (tool,) = read_offered_tools(f"1. {json.dumps(entry)}")
    assert tool.problem is None


@pytest.mark.parametrize(
    "mark", ["<tool_call>", "<tool_call>{</tool_call>", "<think>", '{"name": ', "<|tool_call>call:f{"]
)
def test_an_answer_of_marks_alone_is_read(mark: str):
    for template in our_templates():
        said = template.read(mark * 20_000)
        assert not said.calls
