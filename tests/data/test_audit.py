"""What the audit finds, and that it does not take the word of the code it checks."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest

from agentft.audits.audit import Audit, compare, sketch
from agentft.audits.checks import CODES, Finding, Level, check_request, empty_findings, schema_of, trace_labels
from agentft.data.calls import ToolCall
from agentft.data.config import LocalConfig, TooLong
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepare import look_at_every_conversation
from agentft.data.records import Rejection, read_record
from agentft.data.render import SpanKind
from agentft.data.tokens import IGNORE_INDEX, Example, TokenText
from agentft.data.tools import OfferedTool
from agentft.data.truncation import Truncator
from agentft.recipes.config import AuditOptions
from tests.examples import tokenize

SYSTEM = 'Use these:\n\n1. {"name": "tide", "parameters": [{"name": "harbour", "required": true, "type": "string"}]}'
CALL = '<|startofthink|>```JSON\n{"api_name": "tide", "parameters": {"harbour": "Husum"}}\n```<|endofthink|>'
RESULT = '<|startofexec|>```JSON\n{"high": "14:20"}\n```<|endofexec|>'


def record(name: str, user: str = "When is high tide?", assistant: str = "", system: str = SYSTEM) -> dict:
    answer = assistant or f"{CALL}\n\n{RESULT}\nAt 14:20."
    turns = [("system", system), ("user", user), ("assistant", answer)]
    return {"id": name, "conversations": [{"from": role, "value": value} for role, value in turns]}


def conversation(value: dict, line: int = 1) -> Conversation:
    outcome = read_record(value, Origin("data.jsonl", line))
    assert not isinstance(outcome, Rejection), outcome
    return outcome[0]


@pytest.fixture(scope="session")
def text(byte_tokenizer) -> TokenText:
    return TokenText(byte_tokenizer)


@pytest.fixture
def audited(encoder, template, text, tmp_path, monkeypatch):
    """Audit records, in a file `data.jsonl`, as a training run would prepare them."""
    monkeypatch.chdir(tmp_path)

    def run(records: list[dict], **settings) -> Audit:
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        config = LocalConfig(name="t", path="data.jsonl", **{"test_ratio": 0.5, "max_rejected": 1.0, **settings})
        options = AuditOptions()

        def look(data, encoder) -> Audit:
            return Audit(config, options, data, template, text).look(encoder)

        return look_at_every_conversation(config, template, encoder, look)

    return run


def codes(audit: Audit) -> dict[str, int]:
    """Without what is said of every exam here: a few conversations are one."""
    return {finding.code: finding.count for finding in audit.found if finding.code != "small_exam"}


@pytest.mark.parametrize("held_out", [29, 30])
def test_a_small_exam_is_a_finding(audited, held_out: int):
    audit = audited([record(f"c{n}", user=f"question {n}") for n in range(5 * held_out)], test_ratio=None)
    found = audit.findings["small_exam"]
    assert found.count == (held_out < 30)
    assert not found.count or f"an exam of {held_out} conversations is small" in found.examples[0].detail


# --- Labels ---


def test_steps_that_are_not_to_be_trained_are_counted_and_break_nothing(audited):
    records = [record(f"c{n}", user=f"question {n}") for n in range(4)]
    records[0]["conversations"][2]["weight"] = 0  # two steps, all that there are
    records[1]["conversations"] += [
        {"from": "user", "value": "And?"},
        {"from": "assistant", "value": "No.", "train": False},
    ]
    audit = audited(records, test_ratio=0.3)
    found = audit.findings["untrained_step"]
    assert (found.count, found.conversations) == (3, 2)
    assert not {code for code in codes(audit) if "label" in code}


def example_of(value: Conversation, encoder, template) -> Example:
    (example,) = tokenize([value], template, encoder)
    return example


def problem(value: Conversation, example: Example, labels, text, template, verbatim: bool = True) -> str | None:
    found = trace_labels(value, example.input_ids, labels, text, stop_token=template.stop_token, verbatim=verbatim)
    return None if found is None else found.code


def test_the_labels_of_every_golden_conversation_are_traced_to_the_agent(golden_conversations, encoder, template, text):
    for value in golden_conversations.values():
        example = example_of(value, encoder, template)
        assert problem(value, example, example.labels, text, template) is None, value.id
        assert problem(value, example, example.labels, text, template, verbatim=False) is None, value.id


@pytest.mark.parametrize("kind", [SpanKind.system, SpanKind.user, SpanKind.observation, SpanKind.header])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "one_token"])
def test_a_label_on_foreign_text_is_found_wherever_it_lies(
    kind: SpanKind, whole: bool, golden_conversations, encoder, template, text
):
    seen = 0
    for value in golden_conversations.values():
        segments = template.render(value)
        example = example_of(value, encoder, template)
        kinds = text.kinds(example.input_ids, segments)
        # Blank edges belong to nobody; a label on white space alone is not foreign text.
        visible = np.array([bool(text.text(example.input_ids[i : i + 1]).strip()) for i in range(len(example))])
        places = np.flatnonzero((kinds == kind) & (example.labels == IGNORE_INDEX) & visible)
        if not len(places):
            continue
        seen += 1
        places = places if whole else places[len(places) // 2 : len(places) // 2 + 1]
        labels = example.labels
        labels[places] = example.input_ids[places]
        assert problem(value, example, labels, text, template) == "label_in_context", value.id
    assert seen


def test_a_missing_and_a_shifted_label_are_found(encoder, template, text):
    value = conversation(record("a"))
    example = example_of(value, encoder, template)
    labels = example.labels
    first, last = example.steps()[-1]
    labels[last - 1] = IGNORE_INDEX
    assert problem(value, example, labels, text, template) == "label_missing", "the stop token"
    labels = example.labels
    labels[first : first + 2] = IGNORE_INDEX
    assert problem(value, example, labels, text, template) == "label_missing"
    shifted = np.concatenate([example.labels[1:], [IGNORE_INDEX]]).astype(np.int32)
    assert problem(value, example, shifted, text, template) == "label_in_context"
    nothing = np.full_like(example.input_ids, IGNORE_INDEX)
    assert problem(value, example, nothing, text, template) == "no_label"


def test_a_whole_observation_under_labels_is_found_in_any_template(encoder, template, text):
    value = conversation(record("a"))
    example = example_of(value, encoder, template)
    labels = example.labels
    places = text.kinds(example.input_ids, template.render(value)) == SpanKind.observation
    labels[places] = example.input_ids[places]
    assert problem(value, example, labels, text, template, verbatim=False) == "label_in_context"


def test_tokens_give_their_text_back_to_the_byte(encoder, template, text, golden_conversations):
    for value in golden_conversations.values():
        segments = template.render(value)
        (example,) = tokenize([value], template, encoder)
        whole = "".join(segment.text for segment in segments)
        assert text.text(example.input_ids) == whole
        pieces = list(text.pieces(example.input_ids))
        assert "".join(piece for piece, _ in pieces) == whole
        assert sum(count for _, count in pieces) == len(example)


def test_the_labels_of_pieces_are_traced_and_a_round_that_is_only_shown_has_none(encoder, template, text):
    turns = [{"from": "system", "value": SYSTEM}]
    for n in range(6):
        said = f"{CALL}\n\n{RESULT}\nAt 14:2{n}."
        turns += [{"from": "user", "value": f"question {n}"}, {"from": "assistant", "value": said}]
    value = conversation({"id": "long", "conversations": turns})
    (fitted,) = Truncator(template, encoder, 1000).fit([(value, TooLong.split)])
    assert any(piece.example.context_rounds for piece in fitted.pieces)
    for piece in fitted.pieces:
        example, shown = piece.example, piece.example.context_rounds

        def traced(labels, rounds, piece=piece):
            found = trace_labels(
                *(piece.conversation, piece.example.input_ids, labels, text),
                stop_token=template.stop_token,
                verbatim=True,
                context_rounds=rounds,
            )
            return None if found is None else found.code

        assert traced(example.labels, shown) is None
        if shown:
            assert traced(example.labels, 0) == "label_missing"
            (whole,) = tokenize([piece.conversation], template, encoder)
            assert traced(whole.labels, shown) == "label_in_context"


# --- Calls ---


def tool(*parameters: dict) -> OfferedTool:
    return OfferedTool("t", "", tuple(parameters))


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        ({"type": "string"}, "x", []),
        ({"type": "str"}, 5, ["argument_breaks_schema"]),
        ({"type": "integer"}, "5", ["argument_as_text"]),
        ({"type": "integer"}, "five", ["argument_breaks_schema"]),
        ({"type": "integer"}, 5.0, []),
        ({"type": "boolean"}, "True", ["argument_as_text"]),
        ({"type": "something"}, [1], []),
        ({}, {"any": 1}, []),
        ({"enum": ["a", "b"]}, "c", ["argument_breaks_schema"]),
        ({"enum": []}, "c", []),
        ({"type": "integer", "minimum": 1}, 0, ["argument_breaks_schema"]),
        ({"type": "array", "items": {"type": "integer"}}, [1, "x"], ["argument_breaks_schema"]),
        (
            {"type": "object", "properties": {"a": {"type": "string"}}, "required_fields": ["a"]},
            {},
            ["argument_breaks_schema"],
        ),
        ({"type": "string", "nullable": True}, None, []),
        ({"$ref": "http://127.0.0.1:9/never"}, "fetched", []),
        ({"pattern": "(a+)+$", "type": "string"}, "a" * 60 + "b", []),
        ({"type": "integer", "minimum": "low", "enum": "abc"}, 3, []),
    ],
)
def test_arguments_are_checked_against_their_declaration(declared: dict, value: object, expected: list[str]):
    found = check_request(ToolCall("t", {"p": value}), [tool({"name": "p", **declared})])
    assert [each.code for each in found] == expected


def test_what_is_required_or_unknown_has_codes_of_its_own():
    declared = tool({"name": "a", "required": True}, {"name": "b", "required": "false"})
    assert [each.code for each in check_request(ToolCall("t", {"b": 1, "c": 1}), [declared])] == [
        "missing_parameter",
        "undeclared_parameter",
    ]
    assert [each.code for each in check_request(ToolCall("u", {}), [declared])] == ["unknown_tool"]
    assert [each.code for each in check_request(ToolCall("u", {}), [])] == ["call_without_tool_list"]
    assert check_request(ToolCall("t", {"x": 1}), [OfferedTool("t", "", None)]) == []
    twice = [declared, tool({"name": "x"})]
    assert check_request(ToolCall("t", {"x": 1}), twice) == [], "the declaration that fits counts"


def test_a_parameter_list_is_a_json_schema():
    from jsonschema import Draft202012Validator

    schema = schema_of([{"name": "a", "required": True, "type": "int"}, {"name": "b", "description": "text"}])
    Draft202012Validator.check_schema(schema)
    assert schema == {"type": "object", "properties": {"a": {"type": ["integer"]}, "b": {}}}


def test_every_quality_finding_is_made_where_it_is_and_nowhere_else(audited):
    broken_call = "<|startofthink|>```JSON\n{nonsense\n```<|endofthink|>"
    other_call = CALL.replace("tide", "moon")
    records = [
        record("sound-1", "one question about tides"),
        record("sound-2", "another question about tides"),
        record("unknown", "a", other_call),
        record("unreadable", "b", broken_call),
        record("unsaid", "c", f"{CALL}\n\n{RESULT}"),
        record("undeclared", "d", CALL.replace('"Husum"', '"Husum", "day": 1') + f"\n\n{RESULT}\nSo."),
        record("missing", "e", CALL.replace('"harbour": "Husum"', "") + f"\n\n{RESULT}\nSo."),
        record("wrong", "f", CALL.replace('"Husum"', "7") + f"\n\n{RESULT}\nSo."),
        record("unoffered", "g", system="You help."),
        record("uncalled", "h", f"{RESULT}\nSo."),
        record("flawed", "i", system=SYSTEM.replace("}]}", "}]}]")),
        record("sound-1", "one question about tides"),
        record("sound-1", "the same id again"),
        record("copy", "one question about tides"),
        record("asks-again", "one question about tides", "No tool is needed."),
    ]
    audit = audited(records)
    assert codes(audit) == {
        "unknown_tool": 1,
        "unreadable_call": 1,
        "empty_summary": 1,
        "ends_with_call": 2,
        "undeclared_parameter": 1,
        "missing_parameter": 1,
        "argument_breaks_schema": 1,
        "call_without_tool_list": 1,
        "flawed_tool_entry": 1,
        "duplicate_content": 1,
        "duplicate_user_side": 1,
    }
    by_code = {finding.code: finding.examples[0] for finding in audit.found}
    assert (by_code["unknown_tool"].id, str(by_code["unknown_tool"].origin)) == ("unknown", "data.jsonl:3")
    assert by_code["unreadable_call"].detail.startswith("not_json: ")
    assert audit.findings["unreadable_call"].topics == {"not_json": 1}
    read = audit.data.stats
    assert read.rejected == {"observation_without_call": 1, "duplicate": 1}
    assert read.notices["duplicate_id_renamed"] == 1
    assert by_code["duplicate_content"].detail == "the same content as 'sound-1' (data.jsonl:1)"
    assert not [finding.code for finding in audit.found if finding.level is Level.broken]


def test_statistics_add_up(audited, golden_conversations, encoder, template):
    records = [record(f"x-{n}", f"question number {n}") for n in range(6)] + [record("y-1", "涨潮是几点？")]
    audit = audited(records, max_length=16)
    statistics = audit.statistics
    whole = statistics.whole
    assert [whole[name] for name in ("conversations", "calls", "observations", "rounds")] == [7, 7, 7, 7]
    assert sum(statistics.tokens_by_kind.values()) == whole["tokens"] == sum(statistics.lengths)
    assert whole["trained"] == sum(
        statistics.tokens_by_kind[kind] for kind in (SpanKind.text, SpanKind.call, SpanKind.call_syntax, SpanKind.stop)
    )
    assert statistics.tokens_by_kind[SpanKind.stop] == statistics.steps.total() == 14
    assert statistics.tokens_by_kind[SpanKind.system] == 7 * len(SYSTEM)
    assert {name: sums["conversations"] for name, sums in statistics.groups["files_read"].items()} == {"data.jsonl": 7}
    assert {name: sums["conversations"] for name, sums in statistics.groups["languages"].items()} == {"en": 6, "zh": 1}
    for group in statistics.groups.values():
        assert sum(group.values(), Counter()) == whole
    assert statistics.tools_called == {"tide": 7}
    assert whole["too_long"] == 7
    assert codes(audit)["too_long"] == 7


def test_too_many_lost_rows_break_the_audit(audited):
    records = [record(f"a-{n}", f"question {n}") for n in range(8)] + [{"id": "b"}, {"id": "c"}]
    assert "too_many_set_aside" not in codes(audited(records, max_rejected=0.2))
    assert codes(audited(records, max_rejected=0.19))["too_many_set_aside"] == 1


def test_a_split_that_leaves_a_part_empty_breaks_the_audit(audited):
    assert codes(audited([record("only")])) == {"empty_part": 1}


# --- Who shares what ---


def compared(records: list[dict], parts: list[str | None]) -> tuple[dict[str, Finding], int]:
    """Findings of conversations that are divided as given, and the held-out user turns that were compared."""
    conversations = [conversation(value, line) for line, value in enumerate(records, 1)]
    findings = empty_findings()
    return findings, compare(conversations, parts, findings, 0.8)


def test_the_split_that_training_makes_holds(audited):
    records = [record(f"a-{n}", f"question {n // 2}", f"answer {n}") for n in range(40)]
    audit = audited(records)
    assert set(codes(audit)) == {"duplicate_user_side"}
    assert {entry.part for entry in audit.data.entries} == {"train", "heldout"}


def test_what_the_held_out_users_say_too_is_in_neither_part(audited, tmp_path):
    said_too = [record("a", "same words"), record("b", "other words"), record("c", "same words")]
    held_out = [record("held", "same words", "other answer")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in held_out))
    audit = audited(said_too, test_path="test.jsonl")
    assert [entry.part for entry in audit.data.entries] == [None, "train", None, "heldout"]
    assert not {"user_side_straddles", "content_straddles"} & codes(audit).keys()


def test_a_split_that_leaks_is_found():
    """As if the division did not hold what it promises."""
    records = [record("a", "same words"), record("b", "same  words\n", "other answer"), record("c", "same words")]
    findings, _ = compared(records, ["train", "heldout", "train"])
    assert findings["user_side_straddles"].count == 1
    assert findings["content_straddles"].count == 0
    findings, _ = compared(records, ["heldout", "train", "train"])
    assert findings["content_straddles"].examples[0].detail == "the same content as 'c' (data.jsonl:3)"
    assert all(CODES[code][0] is Level.broken for code in ("user_side_straddles", "content_straddles"))


def test_near_duplicates_are_found_across_the_split_only():
    asked = "Could you please book me a table for four people at an Italian restaurant this Friday evening"
    records = [
        record("near", asked.upper() + "?!"),
        record("changed", asked.replace("Friday", "Monday")),
        record("far", "What is the weather going to be like in Hamburg on the first of May next year"),
        record("short", "Yes, please"),
        record("held", asked),
        record("held-short", "yes please!"),
        record("held-far", "Transfer two hundred euros from my savings account to my landlord's account now"),
    ]
    findings, turns = compared(records, ["train"] * 4 + ["heldout"] * 3)
    assert turns == 2, "short turns are not compared"
    (example,) = findings["near_duplicate_across_split"].examples
    assert example.id == "held"
    assert "about 100%" in example.detail
    assert "'near'" in example.detail


def test_nothing_to_compare_is_no_error(audited):
    assert codes(audited([{"id": "a"}, {"id": "b"}])) == {"empty_part": 1}
    findings, turns = compared([record("a", "Yes"), record("b", "No")], ["train", "heldout"])
    assert turns == 0
    assert not any(finding.count for finding in findings.values())


def test_memory_holds_no_texts(audited):
    """What is kept of a conversation, beside the sample, does not grow with its text."""

    def kept(words: int) -> int:
        audit = audited([record(f"a-{n}", f"{n} " + "word " * words) for n in range(20)], max_length=20_000)
        audit._sample.clear()
        audit._exemplary.clear()
        for finding in audit.findings.values():
            finding.examples.clear()  # how many there are is bounded, and tested below
        return len(pickle.dumps((audit.statistics, audit.findings)))

    assert kept(2000) == pytest.approx(kept(200), rel=0.01)
    assert sketch("question " * 2000).nbytes == sketch("question " * 20).nbytes == 128


def test_findings_are_bounded_and_say_where(audited):
    audit = audited([record(f"a-{n}", f"question {n}", CALL.replace("tide", f"tool{n}")) for n in range(50)])
    unknown = audit.findings["unknown_tool"]
    assert (unknown.count, unknown.conversations, len(unknown.examples)) == (50, 50, 5)
    assert audit.findings.keys() == CODES.keys(), "no code but these"
    shown = audit.shown()
    assert 24 <= len(shown) <= 26
    assert set(shown["a-0"][1]) == {"unknown_tool", "ends_with_call"}


def test_the_sample_is_the_same_in_any_order(audited):
    records = [record(f"a-{n}", f"question {n}") for n in range(150)]
    assert list(audited(records).shown()) == list(audited(records[::-1]).shown())


@pytest.mark.slow
def test_real_conversations_pass_every_invariant(shared_data, audited):
    lines = (shared_data / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    audit = audited([json.loads(line) for line in lines], max_length=100_000)
    assert not [finding.code for finding in audit.found if finding.level is Level.broken]


def test_a_dataset_of_which_nothing_fits_has_an_empty_part(audited):
    """Also where `dataset.max_rejected` allows it."""
    audit = audited([record(f"c{n}", user=f"question {n}") for n in range(8)], max_length=16, too_long=TooLong.drop)
    assert (
        "no training conversation is left; set aside: {'too_long': 8}"
        in audit.findings["empty_part"].examples[0].detail
    )
