"""A turn that its source does not want trained: shown as context everywhere, a label nowhere, asked in no exam, and counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agentft.audits.checks import trace_labels
from agentft.data.config import Format, LocalConfig, Reasoning, TooLong
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepare import prepare_data
from agentft.data.prepared import from_line, to_line
from agentft.data.records import Rejection, read_record
from agentft.data.sources import PreparationStats, RawRow, read_conversations
from agentft.data.template_choice import choose_template
from agentft.data.tokens import IGNORE_INDEX, TokenText
from agentft.data.truncation import TruncationKind, Truncator, make_examples
from agentft.evaluation.steps import all_steps
from tests.examples import tokenize

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"q": "first guess"}'}}
AGAIN = {"id": "2", "type": "function", "function": {"name": "look", "arguments": '{"q": "second guess"}'}}


def openai(*, first: dict | None = None, second: dict | None = None, last: dict | None = None) -> dict:
    """Two calls and an answer, then a second round; fields are put onto the assistant's messages."""
    return {
        "id": "o",
        "messages": [
            {"role": "user", "content": "Look it up."},
            {"role": "assistant", "content": "Let me guess.", "tool_calls": [CALL], **(first or {})},
            {"role": "tool", "tool_call_id": "1", "content": "no such thing"},
            {"role": "assistant", "content": "Then so.", "tool_calls": [AGAIN], **(second or {})},
            {"role": "tool", "tool_call_id": "2", "content": "found"},
            {"role": "assistant", "content": "It was found."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome.", **(last or {})},
        ],
    }


def read(record: object, form: Format = Format.auto) -> tuple[Conversation, list[str]]:
    outcome = read_record(record, Origin("x", 1), form=form)
    assert not isinstance(outcome, Rejection), outcome
    return outcome


def codes(notices: list[str]) -> list[str]:
    return [code for code in notices if code not in ("missing_system", "id_missing")]


def steps_trained(conversation: Conversation) -> list[bool]:
    return [message.trained for message in conversation.messages if message.role == "assistant"]


@pytest.fixture(params=["msagent", "chatml"])
def layout(request, byte_tokenizer):
    return choose_template(request.param, byte_tokenizer)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss_scale": 0}, {"train": False}])
def test_an_openai_message_that_is_not_to_be_trained_is_a_step_without_labels(flag, template, encoder, byte_tokenizer):
    plain, marked = read(openai())[0], read(openai(first=flag))
    assert codes(marked[1]) == ["step_not_trained"]
    before, after = tokenize([plain, marked[0]], template, encoder)
    assert np.array_equal(before.input_ids, after.input_ids), "the same text is shown"
    assert after.steps() == before.steps()[1:], "and one step less is trained, its stop included"
    first = slice(*before.steps()[0])
    assert "first guess" in byte_tokenizer.decode(before.input_ids[first])
    assert set(after.labels[first]) == {IGNORE_INDEX}
    assert not after.loss_weights[first].any()


@pytest.mark.parametrize(
    "flag", [{"weight": 1}, {"loss": True}, {"train": True}, {"weight": None}, {"loss_scale": 1.0}]
)
def test_a_message_that_is_to_be_trained_is_as_one_that_says_nothing(flag):
    assert read(openai(first=flag))[0] == read(openai())[0]
    assert codes(read(openai(first=flag))[1]) == []


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": "0"}, {"loss": "no"}, {"train": 2}, {"mask": True}])
def test_what_is_not_understood_is_trained_and_noted(flag):
    conversation, notices = read(openai(first=flag))
    assert conversation == read(openai())[0]
    assert codes(notices) == [f"field_not_carried:{next(iter(flag))}"]


def test_a_user_cannot_ask_to_be_trained():
    record = openai()
    for value, expected in ((0, []), (1, ["field_not_carried:weight"])):
        record["messages"][0] = {"role": "user", "content": "Look it up.", "weight": value}
        assert codes(read(record)[1]) == expected
        assert read(record)[0] == read(openai())[0]


def test_sharegpt_msagent_and_react_turns_say_it_too():
    mine = {"from": "assistant", "value": "a"}
    user = {"from": "user", "value": "q"}
    for flag, untrained in (({"train": False}, (0,)), ({"train": True}, ())):
        conversation, notices = read({"conversations": [user, mine | flag, user, mine]})
        assert [turn.untrained for turn in conversation.turns] == [(), untrained, (), ()]
        assert codes(notices) == ["step_not_trained"] * len(untrained)
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}', "weight": 0}
    turns = [
        {"from": "human", "value": "q"},
        call,
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    assert steps_trained(read({"conversations": turns})[0])[0] is False
    react = "Thought: hm\nAction: look\nAction Input: {}\nObservation: r\nFinal Answer: a"
    turns = [user, {"from": "assistant", "value": react, "loss": False}]
    assert steps_trained(read({"conversations": turns}, Format.react)[0]) == [False, False]
    turns = [{"from": "human", "value": "q", "score": 3}, {"from": "gpt", "value": "a"}]
    assert codes(read({"conversations": turns})[1]) == ["field_not_carried:score"]


def test_turns_of_one_step_that_disagree_are_not_trained():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": True}]
    turns.append({"from": "function_call", "value": '{"name": "look", "arguments": {}}', "train": False})
    assert steps_trained(read({"conversations": turns})[0])[0] is False


def test_such_a_step_is_history_in_the_exam(layout, encoder):
    (made,) = make_examples([read(openai(second={"weight": 0}))[0]], layout, encoder)
    conversation, example = made.conversation, made.pieces[0].example
    steps = all_steps([conversation], [example], layout)
    assert [step.index for step in steps] == [0, 1, 2]
    assert "first guess" in steps[0].reference
    assert [step.reference for step in steps[1:]] == ["It was found.", "You are welcome."]
    assert [step.message.content for step in steps] == ["Let me guess.", "It was found.", "You are welcome."]


def test_the_mask_audit_follows_it(template, encoder, byte_tokenizer):
    conversation = read(openai(second={"weight": 0}))[0]
    (example,) = tokenize([conversation], template, encoder)
    (as_if_trained,) = tokenize([read(openai())[0]], template, encoder)
    text = TokenText(byte_tokenizer)
    for labels, problem in ((example.labels, None), (as_if_trained.labels, "label_in_context")):
        found = trace_labels(
            conversation, example.input_ids, labels, text, stop_token=template.stop_token, verbatim=True
        )
        assert (found and found.code) == problem


def test_it_is_stored_and_part_of_what_the_content_is(layout):
    plain, marked = read(openai())[0], read(openai(first={"weight": 0}))[0]
    assert from_line(to_line(marked)) == marked
    assert plain.content_hash != marked.content_hash
    assert plain.user_hash == marked.user_hash
    rows = [RawRow(Origin("x", n), openai(**fields)) for n, fields in enumerate(({}, {"first": {"weight": 0}}, {}), 1)]
    found = list(read_conversations(rows))
    assert [getattr(each, "reason", each.id) for each in found] == ["o", "o#2", "duplicate"]


@pytest.mark.parametrize("how", [TooLong.fit, TooLong.split])
def test_fitting_keeps_it(how, layout, encoder):
    record = openai(second={"weight": 0})
    filler = [{"role": "user", "content": "More? " + "w" * 300}, {"role": "assistant", "content": "More."}]
    record["messages"] += filler * 4
    conversation = read(record)[0]
    (made,) = make_examples([conversation], layout, encoder)
    example = made.pieces[0].example
    (fitted,) = Truncator(layout, encoder, len(example) - 200).fit([(conversation, how)])
    assert fitted.outcome is (TruncationKind.spread if how is TooLong.split else TruncationKind.rounds_left_out)
    trained = [step.reference for p in fitted.pieces for step in all_steps([p.conversation], [p.example], layout)]
    assert not any("second guess" in words for words in trained)
    whole = [step.reference for step in all_steps([conversation], [example], layout)]
    assert trained == (whole if how is TooLong.split else whole[-len(trained) :])


def test_a_conversation_of_which_nothing_is_to_be_trained_is_set_aside(tmp_path, template, encoder):
    path = tmp_path / "data.jsonl"
    rows = [{"id": f"{n}", "messages": [{"role": "user", "content": f"q {n}"}]} for n in range(40)]
    for n, row in enumerate(rows):
        row["messages"].append({"role": "assistant", "content": f"a {n}", "weight": int(n % 4 != 0)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LocalConfig(name="local", path=str(path), test_ratio=0.3, max_rejected=0.5, cache=False)
    stats = prepare_data(config, template, encoder).stats
    assert stats.reasons() == {"no_label": 10}
    assert "is to be trained" in stats.rejections[0].detail
    assert stats.notices["step_not_trained"] == 10


def test_a_held_out_prompt_ends_before_the_thought_of_its_step(tmp_path, template, encoder, byte_tokenizer):
    """Though the thought is shown where it is not trained."""
    path = tmp_path / "data.jsonl"
    said = {"role": "assistant", "content": "An answer.", "reasoning_content": "A thought."}
    rows = [{"id": f"{n}", "messages": [{"role": "user", "content": f"q {n}"}, said]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LocalConfig(name="local", path=str(path), test_ratio=0.3, cache=False, reasoning=Reasoning.context)
    data = prepare_data(config, template, encoder)
    steps = all_steps(data.heldout, data.heldout_examples, template)
    assert steps
    for step in steps:
        assert "thought" not in byte_tokenizer.decode(step.input_ids[: step.start])
        assert byte_tokenizer.decode(step.input_ids[step.start : step.stop]).count("A thought.") == 1
    for example in data.train:
        assert "A thought." in byte_tokenizer.decode(example.input_ids)
        assert byte_tokenizer.decode(example.input_ids[example.labels != IGNORE_INDEX]) == "An answer.<|im_end|>"


def test_a_record_cannot_have_the_id_of_a_part_of_another(tmp_path, template, encoder):
    """The parts of `x` and a record that calls itself a part of `x` are told apart."""
    long = [{"from": role, "value": f"{role} {n} " + "w" * 80} for n in range(9) for role in ("user", "assistant")]
    short = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    ids = ("x", "x/part-1", "x/1", "x/part-", "x/part-1b")
    rows = [RawRow(Origin("x", n), {"id": name, "conversations": short if n else long}) for n, name in enumerate(ids)]
    report = PreparationStats()
    conversations = [each for each in read_conversations(rows, stats=report) if isinstance(each, Conversation)]
    assert report.notices["id_of_a_part"] == 1
    assert [c.id for c in conversations] == ["x", conversations[1].id, "x/1", "x/part-", "x/part-1b"]
    assert conversations[1].id.startswith("content-")
    fitted = list(Truncator(template, encoder, 800).fit([(each, TooLong.split) for each in conversations]))
    names = [piece.example.id for each in fitted for piece in each.pieces]
    assert {"x/part-1", "x/part-2"} < set(names)
    assert len(set(names)) == len(names)
