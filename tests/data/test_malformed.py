"""Every malformed record and file of the shared data has the outcome that its `suggest` gives.

`load` is a conversation, `care` a conversation with a notice about a call or quoted marks, `skip` a rejection. Where we say
more than `suggest`, on purpose:

| defect | suggest | here, and why |
|---|---|---|
| `ends_with_user` | skip | the steps before the last user turn load; that turn is left out, and counted as `last_user_left_out` |
| `id_duplicate_same_content` | load | the record loads; in a stream it is dropped as `duplicate`, since repeating it would weigh it double |
| `missing_system`, `empty_system`, `id_missing`, `id_null`, `id_number`, `tool_list_entry_not_json` | load | loads, with a notice that states the repair |
| `messages_instead`, `from_human_gpt` | skip | the forms openai and sharegpt are read by `dataset.format=auto`; these two records hold MSAgent marks in assistant text, which no such form has: `marks_in_text` |
| `react_variant` | skip | rejected with the hint dataset.format=react, under which it loads: prose may hold the keywords, so it must be asked for |
"""  # noqa: E501

import json
from collections import Counter
from pathlib import Path

import pytest

from agentft.data.calls import read_literal
from agentft.data.config import Format
from agentft.data.conversation import Conversation, Origin
from agentft.data.records import Rejection, read_record
from agentft.data.sources import PreparationStats, RawRow, read_conversations, read_local
from agentft.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason=f"{DATA} is not there: the shared data is not part of the repository"
)

REPAIRS = {"missing_system", "empty_system", "id_missing", "id_number", "tool_entry_flawed"}
"""Notices about a harmless repair; every other notice is for a metric or a native template to mind."""

REASONS = {
    "system_only": "no_user_turn",
    "user_only": "ends_with_user",
    "starts_with_assistant": "starts_with_assistant",
    "assistant_user_swapped": "two_assistant_turns",
    "two_users_in_a_row": "two_user_turns",
    "two_assistants_in_a_row": "two_assistant_turns",
    "system_in_middle": "system_in_middle",
    "two_systems": "two_system_turns",
    "empty_assistant": "empty_assistant",
    "blank_assistant": "empty_assistant",
    "empty_assistant_in_middle": "empty_assistant",
    "empty_user": "empty_user",
    "exec_never_closed": "exec_never_closed",
    "think_never_closed": "think_never_closed",
    "exec_never_opened": "exec_never_opened",
    "think_never_opened": "think_never_opened",
    "exec_closed_twice": "exec_closed_twice",
    "exec_before_think": "observation_without_call",
    "exec_without_think": "observation_without_call",
    "nested_think": "nested_think",
    "nested_exec": "nested_exec",
    "exec_inside_think": "exec_inside_think",
    "marks_overlap": "exec_inside_think",
    "marks_wrong_case": "mark_misspelt",
    "marks_with_spaces": "mark_misspelt",
    "think_empty": "think_empty",
    "conversations_json_string_twice": "conversations_text_twice",
    "conversations_repr_with_code": "conversations_unreadable_text",
    "conversations_repr_cut": "conversations_unreadable_text",
    "conversations_plain_text": "conversations_unreadable_text",
    "conversations_not_a_list": "conversations_not_a_list",
    "conversations_null": "conversations_not_a_list",
    "conversations_empty": "conversations_empty",
    "conversations_missing": "conversations_missing",
    "messages_instead": "marks_in_text",
    "from_human_gpt": "marks_in_text",
    "turn_null": "turn_not_an_object",
    "turn_is_string": "turn_not_an_object",
    "turn_without_from": "role_missing",
    "turn_without_value": "value_missing",
    "value_null": "value_not_text",
    "user_value_null": "value_not_text",
    "value_number": "value_not_text",
    "value_list": "value_not_text",
    "from_null": "unknown_role",
    "from_misspelt": "unknown_role",
    "from_misspelt_user": "unknown_role",
    "from_tool": "marks_in_text",  # `tool` is a role of sharegpt, which has no MSAgent marks
    "react_variant": "form_react",
    "lone_surrogate": "lone_surrogate",
}

CARE = {
    "mark_inside_json_string": "mark_inside_call",
    "marks_quoted_in_summary": "marks_quoted_in_text",
    "think_json_cut": "call_not_json",
    "think_json_single_quotes": "call_not_json",
    "think_json_trailing_comma": "call_not_json",
    "think_json_fullwidth": "call_not_json",
    "think_raw_newline_in_string": "raw_control_character_in_call",
    "think_plain_text": "call_not_json",
    "api_name_missing": "call_no_name",
    "api_name_null": "call_no_name",
    "api_name_unknown": "unknown_tool",
    "parameters_missing": "call_without_parameters",
    "parameters_is_list": "call_parameters_not_an_object",
    "parameters_is_json_string": "call_parameters_not_an_object",
    "parameters_not_declared": "undeclared_parameter",
    "call_is_a_list": "call_is_a_list",
    "json_nan_and_big_numbers": "call_not_json",
    "json_nested_800_deep": "call_not_json",
}


def malformed() -> list[dict]:
    path = DATA / "malformed.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


@pytest.mark.parametrize("record", malformed(), ids=lambda record: f"{record['group']}-{record['defect']}")
def test_a_malformed_record_has_the_outcome_that_is_suggested(record: dict) -> None:
    outcome = read_record(record, Origin("malformed.jsonl", 1))
    if record["defect"] == "ends_with_user":
        assert not isinstance(outcome, Rejection)
        assert outcome[1][-1] == "last_user_left_out"
        assert [turn.text for turn in outcome[0].turns] == [turn["value"] for turn in record["conversations"][:-1]]
        return
    if record["suggest"] == "skip":
        assert isinstance(outcome, Rejection), "expected a rejection"
        assert outcome.reason == REASONS[record["defect"]]
        assert outcome.detail
        return
    assert not isinstance(outcome, Rejection), outcome
    conversation, notices = outcome
    codes = {code for code in notices if not code.startswith("column_not_used:")}
    if record["suggest"] == "care":
        assert CARE[record["defect"]] in codes
    else:
        assert codes <= REPAIRS
        assert not any(message.malformed_calls for message in conversation.messages)
    read = (
        read_literal(record["conversations"]) if isinstance(record["conversations"], str) else record["conversations"]
    )
    assert [turn.text for turn in conversation.turns] == [turn["value"] for turn in read]


def test_unreadable_calls_are_kept_as_calls_with_their_failure() -> None:
    for record in malformed():
        if CARE.get(record["defect"], "").startswith(("call_not_json", "call_no_name", "call_parameters")):
            outcome = read_record(record, Origin("malformed.jsonl", 1))
            assert not isinstance(outcome, Rejection)
            messages = outcome[0].messages
            (call, *_) = (call for message in messages for call in message.malformed_calls)
            assert call.requests == ()
            assert any(message.role == "tool" for message in messages)


def test_rejected_forms_say_how_to_select_them() -> None:
    by_defect = {record["defect"]: record for record in malformed()}
    for defect, form in (("messages_instead", "openai"), ("from_human_gpt", "sharegpt"), ("react_variant", "react")):
        outcome = read_record(by_defect[defect], Origin("malformed.jsonl", 1), form=Format.msagent)
        assert isinstance(outcome, Rejection)
        assert outcome.reason == f"form_{form}"
        assert f"dataset.format={form}" in outcome.detail
    asked_for = read_record(by_defect["react_variant"], Origin("malformed.jsonl", 1), form=Format.react)
    assert not isinstance(asked_for, Rejection)
    assert asked_for[0].tool_calls[0].arguments == {"category": "habitat", "limit": 3}


def test_the_whole_set_read_as_one_stream_counts_every_record() -> None:
    report = PreparationStats()
    outcomes = list(read_conversations(read_local(DATA / "malformed.jsonl", stats=report), stats=report))
    suggested = Counter(record["suggest"] for record in malformed())
    assert len(outcomes) == report.rows == sum(suggested.values()) == 110
    assert report.rejected["duplicate"] == 1
    assert report.kept == suggested["load"] + suggested["care"] + 1 - 1, "ends_with_user more, a duplicate less"
    assert report.notices["duplicate_id_renamed"] == 1
    assert [o.origin.line for o in outcomes] == list(range(1, 111))


FILES = json.loads((DATA / "malformed_files" / "manifest.json").read_text()) if DATA.exists() else {}
KEPT_AND_REASONS: dict[str, tuple[int, list[tuple[int, str]]]] = {
    "bom.jsonl": (4, []),
    "crlf.jsonl": (4, []),
    "truncated_last_line.jsonl": (3, [(4, "truncated_line")]),
    "no_final_newline.jsonl": (4, []),
    "blank_lines.jsonl": (4, []),
    "non_utf8.jsonl": (2, [(2, "not_utf8"), (3, "not_utf8")]),
    "gb18030.jsonl": (2, [(2, "not_utf8"), (4, "not_utf8")]),
    "utf16.jsonl": (0, [(0, "not_utf8")]),
    "nul_bytes.jsonl": (4, []),
    "garbage_line.jsonl": (2, [(2, "not_json"), (4, "not_an_object"), (5, "not_an_object"), (6, "not_an_object")]),
    "two_objects_on_a_line.jsonl": (1, [(1, "two_values")]),
    "duplicate_ids.jsonl": (2, [(3, "duplicate")]),
    "pretty_array.json": (4, []),
    "line_separator_in_text.jsonl": (1, []),
    "conversations_repr.csv": (4, []),
    "conversations_repr.jsonl": (4, []),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_gives_what_can_be_read_and_names_the_rest(name: str) -> None:
    path = DATA / "malformed_files" / name
    if name in ("empty.jsonl", "only_blank.jsonl"):
        with pytest.raises(DataError, match=name):
            list(read_local(path))
        return
    rows = list(read_local(path))
    readable = sum(isinstance(row, RawRow) and isinstance(row.value, dict) for row in rows)
    assert readable == FILES[name]["readable_records"]
    outcomes = list(read_conversations(rows))
    kept, reasons = KEPT_AND_REASONS[name]
    assert sum(isinstance(outcome, Conversation) for outcome in outcomes) == kept
    assert [(o.origin.line, o.reason) for o in outcomes if isinstance(o, Rejection)] == reasons


def test_the_reason_for_a_foreign_encoding_says_how_to_convert() -> None:
    for name, encoding in (("utf16.jsonl", "UTF-16"), ("gb18030.jsonl", "GB18030")):
        rejections = [row for row in read_local(DATA / "malformed_files" / name) if isinstance(row, Rejection)]
        assert all(f"iconv -f {encoding} -t UTF-8" in rejection.detail for rejection in rejections)


def test_the_folder_of_malformed_files_reads_to_its_end() -> None:
    report = PreparationStats()
    outcomes = list(read_conversations(read_local(DATA / "malformed_files", stats=report), stats=report))
    assert len(outcomes) == report.rows
    assert len(report.files) == len(FILES) + 1  # manifest.json is a .json file like any other
    assert report.rejected["empty_file"] == 2
    assert report.kept > 0
