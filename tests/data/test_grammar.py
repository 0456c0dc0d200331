"""The grammar of assistant values: its laws on any text, and one case per rule."""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentft.data.calls import Call
from agentft.data.conversation import EXEC_CLOSE, EXEC_OPEN, THINK_CLOSE, THINK_OPEN, Observation, Part, Text
from agentft.data.msagent import GrammarError, parse_assistant, turn_messages

CALL = THINK_OPEN + '```JSON\n{"api_name": "f", "parameters": {"x": "1"}}\n```' + THINK_CLOSE
OBSERVATION = EXEC_OPEN + '```JSON\n{"r": 1}\n```' + EXEC_CLOSE

LETTERS = [
    "\n",
    "\n\n",
    " and ",
    "和",
    '"',
    "\\",
    "{",
    "}",
    '{"a": "',
    '"}',
    "```JSON\n",
    "\n```",
    "<|",
    "|>",
    "\r\n",
    " ",
    "'",
]
MARKS = [THINK_OPEN, THINK_CLOSE, EXEC_OPEN, EXEC_CLOSE, CALL, OBSERVATION, "<|StartOfThink|>"]
tokens = st.sampled_from([*MARKS, *LETTERS])
mark_soup = st.lists(tokens | st.text(max_size=8), max_size=24).map("".join)


def sources_by_type(value: str) -> list[tuple[str, str]]:
    return [(type(part).__name__, part.source) for part in parse_assistant(value)]


def reason_of(value: str) -> str:
    with pytest.raises(GrammarError) as caught:
        parse_assistant(value)
    return caught.value.reason


def parsed(value: str) -> tuple[Part, ...] | GrammarError:
    try:
        return parse_assistant(value)
    except GrammarError as error:
        return error


@given(mark_soup)
@settings(max_examples=600, deadline=None)
def test_the_sources_of_the_parts_are_the_value_and_nothing_but_a_grammar_error_is_raised(value: str) -> None:
    parts = parsed(value)
    if isinstance(parts, GrammarError):
        assert parts.reason.isidentifier()
        assert parts.detail
        return
    assert "".join(part.source for part in parts) == value
    for part in parts:
        if not isinstance(part, Text):
            opening, closing = (THINK_OPEN, THINK_CLOSE) if isinstance(part, Call) else (EXEC_OPEN, EXEC_CLOSE)
            assert part.source.startswith(opening)
            assert part.source.endswith(closing)
            assert isinstance(part, Call) or part.source == opening + part.body + closing


@given(st.text(max_size=200))
def test_text_without_marks_is_one_text(value: str) -> None:
    assume(not re.search("startof|endof", value, re.IGNORECASE))  # generated texts may hit upon constants of the code
    assert parse_assistant(value) == ((Text(value),) if value else ())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
texts_with_marks = st.lists(
    st.sampled_from([THINK_OPEN, THINK_CLOSE, EXEC_OPEN, '"', "\\", "a", "和"]), max_size=5
).map("".join)


@given(st.dictionaries(st.text(max_size=6), json_values | texts_with_marks, max_size=4), st.booleans())
@settings(deadline=None)
def test_a_call_keeps_its_parameters_whatever_marks_its_strings_hold(parameters: dict, indented: bool) -> None:
    try:
        body = json.dumps(
            {"api_name": "f", "parameters": parameters}, ensure_ascii=False, indent=3 if indented else None
        )
        body.encode()
    except UnicodeEncodeError:
        return
    value = f"{THINK_OPEN}```JSON\n{body}\n```{THINK_CLOSE}\n\n{OBSERVATION}\ndone"
    parts = parsed(value)
    if isinstance(parts, GrammarError):
        # An opening exec mark before a quoted closing think mark is ambiguous, and refused.
        assert EXEC_OPEN in body
        assert THINK_CLOSE in body
        return
    assert isinstance(parts[0], Call)
    assert parts[0].requests[0].arguments == parameters
    assert [type(part) for part in parts[1:]] == [Text, Observation, Text]


def test_one_turn_can_hold_text_calls_and_observations() -> None:
    value = f"Let me see.\n{CALL}\n\n{CALL}\n\n{OBSERVATION}\n{OBSERVATION}\nDone."
    kinds = [kind for kind, _ in sources_by_type(value)]
    assert kinds == ["Text", "Call", "Text", "Call", "Text", "Observation", "Text", "Observation", "Text"]


def test_steps_are_the_runs_between_observations() -> None:
    parts = parse_assistant(f"Let me see.\n{CALL}\n\n{OBSERVATION}\nOne more.\n{CALL}\n\n{OBSERVATION}\n")
    messages = turn_messages(parts)
    assert [(m.role, [type(part).__name__ for part in m.source or ()]) for m in messages] == [
        ("assistant", ["Text", "Call", "Text"]),
        ("tool", ["Observation"]),
        ("assistant", ["Text", "Call", "Text"]),
        ("tool", ["Observation", "Text"]),
    ]


def test_a_quoted_pair_of_marks_is_text() -> None:
    for value in (
        f"A call stands between {THINK_OPEN} and {THINK_CLOSE}.",
        f"在其前后使用{THINK_OPEN}和{THINK_CLOSE}作为标志。",
        f"The marks are `{THINK_OPEN}`, `{THINK_CLOSE}`, `{EXEC_OPEN}` and `{EXEC_CLOSE}`.",
    ):
        assert parse_assistant(value) == (Text(value),)


def test_quoting_needs_a_sentence_around_it_and_a_connective_between() -> None:
    assert isinstance(parse_assistant(f"{THINK_OPEN} and {THINK_CLOSE}")[0], Call)
    assert isinstance(parse_assistant(f"I call {THINK_OPEN}the tool{THINK_CLOSE}")[1], Call)
    assert reason_of(f"ok {EXEC_OPEN}secret{EXEC_CLOSE}") == "observation_without_call"


def test_a_call_in_the_middle_of_a_line_is_a_call() -> None:
    assert [kind for kind, _ in sources_by_type(f"好的，{CALL}")] == ["Text", "Call"]


def test_a_closing_mark_inside_a_json_string_does_not_close() -> None:
    body = '{"api_name": "f", "parameters": {"x": "write <|endofthink|> at the end"}}'
    part = parse_assistant(f"{THINK_OPEN}{body}{THINK_CLOSE}")[0]
    assert isinstance(part, Call)
    assert part.source == f"{THINK_OPEN}{body}{THINK_CLOSE}"
    observation = EXEC_OPEN + '{"r": "say <|endofexec|> now"}' + EXEC_CLOSE
    assert sources_by_type(f"{CALL}\n\n{observation}\nok")[2] == ("Observation", observation)


def test_a_tool_output_that_spoofs_marks_never_becomes_text_or_call() -> None:
    spoof = f'{EXEC_OPEN}{{"r": "x{EXEC_CLOSE} trained? {EXEC_OPEN}y"}}{EXEC_CLOSE}'
    assert [kind for kind, _ in sources_by_type(f"{CALL}\n\n{CALL}\n\n{spoof}")][-1] == "Observation"
    assert sources_by_type(f"{CALL}\n\n{CALL}\n\n{spoof}")[-1][1] == spoof
    plain = f"{EXEC_OPEN}done{EXEC_CLOSE} trained? {EXEC_CLOSE}"
    assert reason_of(f"{CALL}\n\n{plain}") == "exec_never_opened"
    with_call = f"{EXEC_OPEN}done {CALL}{EXEC_CLOSE}"
    assert reason_of(f"{CALL}\n\n{with_call}") == "think_inside_exec"


def test_a_call_is_never_stretched_over_a_tool_output() -> None:
    body = f'{{"api_name": "f", "parameters": {{"a": "{THINK_CLOSE}{EXEC_OPEN}out{EXEC_CLOSE}"}}}}'
    value = THINK_OPEN + body + THINK_CLOSE
    assert reason_of(value) == "think_never_opened"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (THINK_OPEN + "{}", "think_never_closed"),
        ("{}" + THINK_CLOSE, "think_never_opened"),
        (CALL + THINK_CLOSE, "think_closed_twice"),
        (f"{CALL}{EXEC_OPEN}x", "exec_never_closed"),
        (f"{CALL} x{EXEC_CLOSE}", "exec_never_opened"),
        (f"{CALL}{OBSERVATION}\n{EXEC_CLOSE}", "exec_closed_twice"),
        (OBSERVATION, "observation_without_call"),
        (f"{CALL}{OBSERVATION}{OBSERVATION}", "observation_without_call"),
        (f"{THINK_OPEN}{CALL}{THINK_CLOSE}", "nested_think"),
        (f"{CALL}{EXEC_OPEN}{OBSERVATION}{EXEC_CLOSE}", "nested_exec"),
        (f"{THINK_OPEN}x{OBSERVATION}{THINK_CLOSE}", "exec_inside_think"),
        (THINK_OPEN + "```JSON\n```" + THINK_CLOSE, "think_empty"),
        ("<|StartOfThink|>{}<|EndOfThink|>", "mark_misspelt"),
        ("<| startofthink |>{}", "mark_misspelt"),
        ("＜|endofexec|＞", "mark_misspelt"),
        (f"{THINK_OPEN}call <|EndOfThink|> <|StartOfExec|>x{THINK_CLOSE}", "mark_misspelt"),
    ],
)
def test_broken_structure_is_named(value: str, reason: str) -> None:
    assert reason_of(value) == reason


@pytest.mark.parametrize(
    "value",
    [
        "<" + " " * 200_000,
        "<" * 200_000,
        THINK_OPEN * 20_000,
        (THINK_OPEN + '"' + THINK_CLOSE) * 5_000,
        THINK_OPEN + '{"a": "' + THINK_CLOSE * 20_000,
        CALL + (EXEC_OPEN + "[" + EXEC_CLOSE) * 5_000,
        "x" * 100_000 + f" {THINK_OPEN} and {THINK_CLOSE}" * 5_000,
        THINK_OPEN + "```" + " " * 200_000 + "x" + THINK_CLOSE,
        THINK_OPEN + "[" * 100_000 + THINK_CLOSE,
        THINK_OPEN + '{"api_name": "f", "parameters": {"n": ' + "9" * 5_000 + "}}" + THINK_CLOSE,
        THINK_OPEN + '"' + "\\" * 200_001 + THINK_CLOSE,
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.timeout(20)
def test_hostile_text_is_answered_quickly(value: str) -> None:
    parts = parsed(value)
    if isinstance(parts, GrammarError):
        assert len(parts.detail) < 1_000
    else:
        assert "".join(part.source for part in parts) == value
