"""Every row of the metric table with numbers worked out by hand, and the laws all of them keep."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentft.data.calls import ToolCall
from agentft.errors import EvaluationError
from agentft.evaluation.matching import align_calls, compare_calls, lenient_parameters, strictly_equal
from agentft.evaluation.metrics import aggregate, score_records
from agentft.evaluation.steps import StepRecord, StepScore, read_offered_tool, score_step


def body(name: str, parameters: dict[str, Any] | None = None, **extras: Any) -> dict[str, Any]:
    return {"api_name": name, **extras, "parameters": parameters or {}}


def call(name: str, parameters: dict[str, Any] | None = None, **extras: Any) -> str:
    text = json.dumps(body(name, parameters, **extras), ensure_ascii=False)
    return f"<|startofthink|>```JSON\n{text}\n```<|endofthink|>"


def leniently_equal(left: Any, right: Any) -> bool:
    """Compare two values as parameters are compared under the lenient column of `matching`."""
    return lenient_parameters({"": left}) == lenient_parameters({"": right})


MALFORMED = "<|startofthink|>```JSON\n{oops\n```<|endofthink|>"


def report(*steps: tuple[str, str], **options: Any) -> dict[str, Any]:
    """One conversation per step."""
    records = [
        StepRecord(conversation_id=f"c{number}", step=0, reference=reference, prediction=prediction, **options)
        for number, (reference, prediction) in enumerate(steps)
    ]
    return aggregate(score_records(records), bootstrap_samples=50)


def fraction(found: dict[str, Any], name: str) -> tuple[float, float]:
    metric = found["metrics"][name]
    assert metric["value"] == (metric["numerator"] / metric["denominator"] if metric["denominator"] else None)
    return metric["numerator"], metric["denominator"]


# One exam used for most rows: an exact call; a right tool with one wrong value; a wrong tool; a missed call; a
# malformed call; a right answer; a spurious call on an answer step.
EXAM = (
    (call("weather", {"city": "北京", "day": "1"}), call("weather", {"city": "北京", "day": "1"})),
    (call("weather", {"city": "北京", "day": "1"}), call("weather", {"city": "上海", "day": "1"})),
    (call("hotel", {"city": "北京"}), call("weather", {"city": "北京"})),
    (call("hotel", {"city": "北京"}), "哪一天？"),
    (call("hotel", {"city": "北京"}), MALFORMED),
    ("今天晴", "今天晴"),
    ("今天晴", call("weather", {"city": "北京"})),
)


@pytest.mark.parametrize(
    ("name", "numerator", "denominator"),
    [
        ("tool_acc", 2, 5),
        ("tool_precision", 2, 5),  # attempts: 3 well-formed on action steps, 1 malformed, 1 spurious
        ("tool_f1", 4, 10),
        ("param_em", 1, 5),
        ("param_em_given_tool", 1, 2),
        ("param_em_lenient", 1, 5),
        ("arg_f1", 1 + 0.75, 5),  # second call: HM 1, FM 1, (0.5 + 1)/2 both ways
        ("arg_f1_micro", 2 * (2 + 1), (2 + 2 + 1 + 1 + 1) + (2 + 2 + 1 + 1)),
        ("step_em", 1, 5),
        ("conv_em", 1, 5),
        ("plan_acc", 5, 7),  # wrong: the missed and the spurious call; a malformed call is an attempt
        ("call_wellformed_rate", 4, 5),
        ("rouge_l", 1, 2),  # the spurious call leaves no text
        ("rouge_l_no_call", 1, 2),
        ("action_em", 2, 5),
        ("argument_f1", 1.75, 5),
    ],
)
def test_worked_example(name: str, numerator: float, denominator: float) -> None:
    assert fraction(report(*EXAM), name) == (numerator, denominator)


def test_plan_table_and_confusions_of_the_worked_example() -> None:
    found = report(*EXAM)
    assert found["plan_table"] == {"call": {"call": 4, "no_call": 1}, "no_call": {"call": 1, "no_call": 1}}
    assert {(c["reference"], c["predicted"], c["calls"]) for c in found["confusion"]} == {
        ("hotel", "weather", 1), ("hotel", None, 1), ("hotel", "<malformed>", 1), (None, "weather", 1),
    }  # fmt: skip
    assert found["errors"] == {
        "malformed": 1, "missed_call": 1, "spurious_call": 1, "wrong_tool": 1, "wrong_value": 1,
    }  # fmt: skip


def test_signature_says_what_was_measured() -> None:
    assert report(*EXAM)["signature"] == "agentft-eval|v2|tf|tok:cjk-char-v2|rl:f1|param:strict|align:bip|n:7"


@pytest.mark.parametrize(
    ("reference", "prediction", "f1"),
    [
        ({}, {}, 1),
        ({"a": 1}, {}, 0),
        ({}, {"a": 1}, 0),
        ({"a": 1}, {"a": 1}, 1),
        ({"a": 1}, {"a": 2}, 1 / 2),
        ({"a": 1, "b": 2}, {"a": 1}, 2 / 3),  # R = 1/2, P = 1
        ({"a": 1}, {"a": 1, "b": 2}, 2 / 3),  # R = 1, P = 1/2
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 9}, 0.6),  # R = 1.5/3, P = 1.5/2
        ({"a": 1}, {"b": 1}, 0),
    ],
)
def test_argument_f1_of_the_paper(reference: dict[str, int], prediction: dict[str, int], f1: float) -> None:
    assert report((call("t", reference), call("t", prediction)))["metrics"]["arg_f1"]["value"] == pytest.approx(f1)


def test_lenient_equality_shows_in_param_em_lenient_alone() -> None:
    found = report((call("t", {"n": 1, "x": "a  b", "note": ""}), call("t", {"n": "1", "x": " a b "})))
    assert fraction(found, "param_em") == (0, 1)
    assert fraction(found, "param_em_lenient") == (1, 1)


def test_step_em_wants_every_call_and_no_other() -> None:
    two = call("a") + call("b", {"x": 1})
    assert fraction(report((two, call("b", {"x": 1.0}) + call("a"))), "step_em") == (1, 1)
    assert fraction(report((two, two + call("c"))), "step_em") == (0, 1)
    assert fraction(report((two, two + MALFORMED)), "step_em") == (0, 1)
    assert fraction(report((two, call("a"))), "step_em") == (0, 1)


def test_conv_em_is_per_conversation_and_spares_answer_steps() -> None:
    right, wrong = call("a", {"x": 1}), call("a", {"x": 2})
    steps = {"c1": [(right, right), ("ok", "no")], "c2": [(right, right), (right, wrong)], "c3": [("ok", "ok")]}
    records = [
        StepRecord(conversation_id=name, step=number, reference=reference, prediction=prediction)
        for name, pairs in steps.items()
        for number, (reference, prediction) in enumerate(pairs)
    ]
    assert fraction(aggregate(score_records(records), bootstrap_samples=10), "conv_em") == (1, 2)


def test_hallucinated_tools_are_neither_offered_nor_in_the_reference() -> None:
    offered = {"a": ("x",), "b": None}
    found = report(
        (call("a"), call("a")), (call("a"), call("b")), (call("z"), call("z")), (call("a"), call("y") + MALFORMED),
        offered=offered,
    )  # fmt: skip
    assert fraction(found, "hallucinated_tool_rate") == (1, 5)


def test_hallucinated_parameters_need_a_schema() -> None:
    offered = {"a": ("x", "y"), "b": None, "c": ()}
    found = report(
        (call("a"), call("a", {"x": 1, "w": 2})), (call("b"), call("b", {"q": 1})), (call("c"), call("c", {"r": 1})),
        offered=offered,
    )  # fmt: skip
    assert fraction(found, "hallucinated_param_rate") == (2, 3)
    assert found["metrics"]["hallucinated_param_rate"]["value"] == pytest.approx(2 / 3)


def test_hallucination_is_null_where_nothing_tells_what_is_offered() -> None:
    found = report((call("a"), call("z", {"x": 1})))
    assert found["metrics"]["hallucinated_tool_rate"]["value"] is None
    assert found["metrics"]["hallucinated_param_rate"]["value"] is None
    assert found["counts"]["calls_without_offered_tools"] == 1
    assert report((call("a"), call("z")), offered={})["metrics"]["hallucinated_tool_rate"]["value"] == 1.0


def test_offered_tools_hold_for_the_whole_conversation() -> None:
    first = StepRecord(conversation_id="c", step=0, reference=call("a"), prediction=call("a"), offered={"a": None})
    later = StepRecord(conversation_id="c", step=1, reference=call("b"), prediction=call("a"))
    found = aggregate(score_records([later, first]), bootstrap_samples=10)
    assert fraction(found, "hallucinated_tool_rate") == (0, 2)


@pytest.mark.parametrize(
    ("offered", "parameters"),
    [
        ("weather", None),
        ({"name": "weather"}, None),
        ({"name": "weather", "parameters": []}, ()),
        ({"name": "weather", "parameters": [{"name": "city", "required": True}, {"name": "day"}]}, ("city", "day")),
        ({"name": "weather", "parameters": {"type": "object", "properties": {"city": {}, "day": {}}}}, ("city", "day")),
        ({"name": "weather", "parameters": {"type": "object"}}, ()),
        ({"name": "weather", "parameters": {"city": "string", "day": "string"}}, ("city", "day")),
        ({"type": "function", "function": {"name": "weather", "parameters": {"city": {}}}}, ("city",)),
    ],
)
def test_offered_tools_come_in_several_forms(offered: Any, parameters: tuple[str, ...] | None) -> None:
    assert read_offered_tool(offered) == ("weather", parameters)


def test_url_and_command_are_not_scored_but_reported() -> None:
    with_url = call("a", {"x": 1}, url="http://one", command="c")
    found = report((with_url, call("a", {"x": 1}, url="http://two")), (with_url, with_url), (call("a"), call("a")))
    assert found["metrics"]["param_em"]["value"] == 1.0
    assert fraction(found, "url_match") == (1, 2)


def test_repair_shows_only_in_repaired_metrics() -> None:
    found = report((call("a", {"x": 1}), "<|startofthink|>{'api_name': 'a', 'parameters': {'x': 1,}}<|endofthink|>"))
    assert [found["metrics"][name]["value"] for name in ("tool_acc", "param_em", "arg_f1", "step_em")] == [0, 0, 0, 0]
    repaired = ("tool_acc_repaired", "param_em_repaired", "arg_f1_repaired", "step_em_repaired")
    assert [found["metrics"][name]["value"] for name in repaired] == [1, 1, 1, 1]
    assert found["counts"]["repaired_calls"] == 1


def test_rouge_is_split_by_what_the_answer_follows() -> None:
    steps = [(call("a"), call("a")), ("晴", "晴"), ("好", "坏"), ("", "x"), ("。", "x")]
    records = [
        StepRecord(conversation_id="c", step=number, reference=reference, prediction=prediction)
        for number, (reference, prediction) in enumerate(steps)
    ]
    found = aggregate(score_records(records), bootstrap_samples=10)
    assert fraction(found, "rouge_l") == (1, 2)
    assert fraction(found, "rouge_l_after_call") == (1, 1)
    assert fraction(found, "rouge_l_no_call") == (0, 1)
    assert found["counts"]["rouge_skipped"] == 2
    alone = StepRecord(conversation_id="d", step=4, reference="晴", prediction="晴", after_call=True)
    assert fraction(aggregate(score_records([alone]), bootstrap_samples=10), "rouge_l_after_call") == (1, 1)


def test_nothing_to_count_is_null_and_never_zero() -> None:
    answers = report(("ok", "ok"))
    names = (
        "tool_acc tool_precision tool_f1 param_em param_em_given_tool param_em_lenient arg_f1 arg_f1_micro step_em "
        "conv_em call_wellformed_rate url_match"
    )
    for name in names.split():
        metric = answers["metrics"][name]
        assert (metric["value"], metric["low"], metric["high"], metric["denominator"]) == (None, None, None, 0)
    calls = report((call("a"), "ok"))
    assert calls["metrics"]["rouge_l"]["value"] is None
    assert calls["metrics"]["tool_precision"]["value"] is None
    assert calls["metrics"]["tool_f1"]["value"] == 0.0  # 2 * 0 / (1 + 0) is no 0/0
    assert calls["metrics"]["tool_acc"]["value"] == 0.0
    assert calls["metrics"]["param_em_given_tool"]["value"] is None


# Strict and lenient equality ----------------------------------------------------------------------------------------

BIG = 9007199254740993


@pytest.mark.parametrize(
    ("left", "right", "strict", "lenient"),
    [
        (1, 1.0, True, True),
        (1, "1", False, True),
        ("1", "1.0", False, True),
        ("1.50", 1.5, False, True),
        (0.1, "0.10", False, True),
        ("-5", "5", False, False),
        ("1.5", "15", False, False),
        ("a/b", "ab", False, False),
        ("007", 7, False, False),
        (BIG, BIG - 1, False, False),
        (BIG, float(BIG), False, False),
        (str(BIG), BIG, False, True),
        (10**23, 1e23, True, True),
        (True, 1, False, False),
        (True, "true", False, True),
        (True, "True", False, False),
        (False, 0, False, False),
        (False, None, False, False),
        (None, None, True, True),
        (None, "", False, True),
        (None, 0, False, False),
        (0, "", False, False),
        ("a", "A", False, False),
        ("ＡＢＣ１", "ABC1", False, True),
        ("a  b\n c ", "a b c", False, True),
        ("好。", "好", False, False),
        ("é", "e\u0301", False, True),
        ([1, 2], [2, 1], False, False),
        ([1, 2], [1, 2.0], True, True),
        ([1], [True], False, False),
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, True, True),
        ({"a": None}, {}, False, False),  # null is absent only at the top level of the parameters
        ({"a": 1}, '{"a": "1.0"}', False, True),
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', False, True),
        ("[1, 2", "[1, 2", True, True),
        ("null", None, False, True),
        ('"a"', "a", False, False),
    ],
)
def test_equality_tables(left: Any, right: Any, strict: bool, lenient: bool) -> None:
    assert (strictly_equal(left, right), strictly_equal(right, left)) == (strict, strict)
    assert (leniently_equal(left, right), leniently_equal(right, left)) == (lenient, lenient)


def test_null_is_not_absent_under_strict_equality_but_is_under_lenient() -> None:
    found = report(
        (call("t", {"a": 1, "b": None}), call("t", {"a": 1})), (call("t", {"a": 1}), call("t", {"a": 1, "b": " "}))
    )
    assert fraction(found, "param_em") == (0, 2)
    assert fraction(found, "param_em_lenient") == (2, 2)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just("[1]"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES, JSON_VALUES)
def test_strict_equality_implies_lenient(left: Any, right: Any) -> None:
    assert strictly_equal(left, left)
    assert leniently_equal(left, left)
    assert strictly_equal(left, right) == strictly_equal(right, left)
    if strictly_equal(left, right):
        assert leniently_equal(left, right)


def test_deep_values_do_not_exhaust_the_stack() -> None:
    deep: Any = "x"
    for _ in range(6):
        for _ in range(40):
            deep = [deep]
        deep = json.dumps(deep) if len(json.dumps(deep)) < 100_000 else deep
    assert leniently_equal(deep, deep)


# Alignment ----------------------------------------------------------------------------------------------------------


def requests(*parameters: dict[str, Any], name: str = "t") -> list[ToolCall]:
    return [ToolCall(name, values) for values in parameters]


def test_alignment_is_free_of_order() -> None:
    pairs = align_calls(requests({"x": 1}, {"x": 2}, {"x": 3}), requests({"x": 3}, {"x": 1}, {"x": 2}))
    assert [pair.prediction for pair in pairs] == [1, 2, 0]
    assert all(pair.exact for pair in pairs)


def test_alignment_prefers_an_exact_pair_to_more_matched_arguments() -> None:
    references = requests({"a": 1}, {"a": 1, "b": 2, "c": 3})
    predictions = requests({"a": 1}, {"a": 1, "b": 2, "c": 9})
    pairs = align_calls(references, predictions)
    assert [(pair.prediction, pair.exact) for pair in pairs] == [(0, True), (1, False)]
    # one prediction for two references: the exact one wins although the other reference shares as much
    assert [pair.reference for pair in align_calls(references, requests({"a": 1}))] == [0]


def test_equal_choices_keep_the_order() -> None:
    pairs = align_calls(requests({"x": 1}, {"x": 2}), requests({"x": 8}, {"x": 9}))
    assert [pair.prediction for pair in pairs] == [0, 1]


def _best_by_trying_all(references: list[ToolCall], predictions: list[ToolCall]) -> tuple[int, ...]:
    best: tuple[int, ...] = ()
    short = min(len(references), len(predictions))
    for rows in itertools.combinations(range(len(references)), short):
        for columns in itertools.permutations(range(len(predictions)), short):
            found = [
                compare_calls(references, predictions, i, j)
                for i, j in zip(rows, columns, strict=True)
                if references[i].name == predictions[j].name
            ]
            best = max(best, _objective(found))
    return best


def _objective(pairs: Any) -> tuple[int, ...]:
    found = list(pairs)
    return (
        len(found),
        sum(pair.exact for pair in found),
        sum(pair.full_matches for pair in found),
        sum(pair.half_matches for pair in found),
        sum(pair.lenient for pair in found),
    )


def test_alignment_is_the_exact_optimum() -> None:
    rng = random.Random(11)
    for _ in range(400):
        sides = [
            [
                ToolCall(
                    rng.choice("ab"), {key: rng.choice([1, "1", 2]) for key in rng.sample("xyz", rng.randint(0, 3))}
                )
                for _ in range(rng.randint(0, 4))
            ]
            for _ in range(2)
        ]
        assert _objective(align_calls(*sides)) == (_best_by_trying_all(*sides) or (0,) * 5)


def test_among_equal_choices_the_nearest_order_is_taken() -> None:
    rng = random.Random(13)
    for _ in range(200):
        references, predictions = (
            requests(*({"x": rng.choice([1, 2])} for _ in range(rng.randint(1, 4)))) for _ in range(2)
        )
        best = max(
            (*_objective(found), -sum((pair.reference - pair.prediction) ** 2 for pair in found))
            for rows in itertools.combinations(range(len(references)), min(len(references), len(predictions)))
            for columns in itertools.permutations(range(len(predictions)), len(rows))
            for found in [[compare_calls(references, predictions, i, j) for i, j in zip(rows, columns, strict=True)]]
        )
        pairs = align_calls(references, predictions)
        assert (*_objective(pairs), -sum((pair.reference - pair.prediction) ** 2 for pair in pairs)) == best


def test_dozens_of_calls_are_aligned_quickly() -> None:
    rng = random.Random(2)
    values = [{"x": rng.randint(0, 30), "y": rng.randint(0, 3)} for _ in range(40)]
    shuffled = rng.sample(values, 40)
    assert sum(pair.exact for pair in align_calls(requests(*values), requests(*shuffled))) == 40


# Seed bugs of the old script ----------------------------------------------------------------------------------------


def test_call_without_parameters_is_counted_once() -> None:
    found = report((call("a", {"x": 1}), '<|startofthink|>{"api_name": "a"}<|endofthink|>'))
    assert fraction(found, "tool_acc") == (1, 1)
    assert found["metrics"]["legacy_action_em"]["value"] == 0.5
    assert fraction(found, "legacy_action_em") == (1, 2)


def test_correct_call_before_an_invented_result_counts() -> None:
    run_on = call("a") + "\n\n<|startofexec|>{}<|endofexec|>\n" + call("b")
    assert fraction(report((call("a"), run_on)), "step_em") == (1, 1)


def test_two_reference_calls_are_an_action_step() -> None:
    found = report((call("a") + "\n\n" + call("b"), call("b")))
    assert fraction(found, "tool_acc") == (1, 2)
    assert found["counts"]["answer_steps"] == 0


def test_spurious_call_on_an_answer_step_costs_precision_and_plan() -> None:
    found = report((call("a"), call("a")), ("ok", call("a")))
    assert fraction(found, "tool_precision") == (1, 2)
    assert fraction(found, "plan_acc") == (1, 2)
    assert found["metrics"]["legacy_action_em"]["value"] == 1.0


def test_empty_and_dotted_predictions_are_scored() -> None:
    found = report(("晴", ""), ("晴", "..."), ("sunny", "."))
    assert fraction(found, "rouge_l") == (0, 3)
    assert found["legacy"]["legacy_rouge_l"]["raised"] == "ValueError"
    assert found["metrics"]["legacy_rouge_l"]["value"] is None


def test_chinese_sentences_one_character_apart_are_nearly_equal() -> None:
    found = report(("今天北京的天气很好", "今天北京的天气真好"))
    assert found["metrics"]["rouge_l"]["value"] == pytest.approx(8 / 9)
    assert found["metrics"]["legacy_rouge_l"]["value"] == 0.0


def test_long_answers_do_not_recurse() -> None:
    words = " ".join(f"w{number}" for number in range(1_500))
    found = report((words, words))
    assert found["metrics"]["rouge_l"]["value"] == 1.0
    assert found["legacy"]["legacy_rouge_l"]["raised"] == "RecursionError"


def test_unreadable_reference_is_quarantined_not_scored_as_text() -> None:
    records = [
        StepRecord(conversation_id="c", step=0, reference=MALFORMED, prediction="x"),
        StepRecord(conversation_id="c", step=1, reference=call("a"), prediction=call("a")),
    ]
    scores = score_records(records)
    with pytest.raises(EvaluationError, match=r"'c' step 0 \(not_json"):
        aggregate(scores, bootstrap_samples=10)
    found = aggregate(scores, bootstrap_samples=10, allow_bad_references=True)
    assert [(each["conversation_id"], each["step"]) for each in found["quarantined"]] == [("c", 0)]
    assert found["counts"]["quarantined_references"] == 1
    assert fraction(found, "plan_acc") == (1, 1)
    assert found["metrics"]["rouge_l"]["value"] is None
    assert found["metrics"]["legacy_rouge_l"]["denominator"] == 1


def test_empty_set_and_duplicates_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no step"):
        aggregate([])
    step = StepRecord(conversation_id="c", step=0, reference="a", prediction="a")
    with pytest.raises(EvaluationError, match="more than once"):
        score_records([step, step])
    with pytest.raises(EvaluationError, match="more than once"):
        aggregate([score_step(step), score_step(step)])


# Laws ---------------------------------------------------------------------------------------------------------------

REPLIES = st.sampled_from(
    [
        "晴天",
        "it is sunny",
        "",
        "。",
        call("a"),
        call("a", {"x": 1}),
        call("a", {"x": "1"}) + call("b"),
        "先查 " + call("b", {"y": [1]}),
    ]
)
PREDICTIONS = REPLIES | st.sampled_from([MALFORMED, "<|startofthink|>{", call("z", {"q": None}), "..."])
EXAMS_WITH_BAD_REFERENCES = st.lists(
    st.tuples(st.sampled_from("pqr"), REPLIES | st.just(MALFORMED), PREDICTIONS), min_size=1, max_size=12
)
EXAMS = st.lists(st.tuples(st.sampled_from("pqr"), REPLIES, PREDICTIONS), min_size=1, max_size=12)


def records_of(exam: list[tuple[str, str, str]]) -> list[StepRecord]:
    next_step = dict.fromkeys("pqr", 0)
    records = []
    for name, reference, prediction in exam:
        offered = {"a": ("x",), "b": None}
        records.append(
            StepRecord(
                conversation_id=name, step=next_step[name], reference=reference, prediction=prediction, offered=offered,
                rounds=ord(name) % 5, seen_tool=name == "p",
            )
        )  # fmt: skip
        next_step[name] += 1
    return records


@settings(max_examples=60, deadline=None)
@given(EXAMS_WITH_BAD_REFERENCES, st.randoms(use_true_random=False))
def test_report_does_not_depend_on_order(exam: list[tuple[str, str, str]], rng: random.Random) -> None:
    records = records_of(exam)
    shuffled = rng.sample(records, len(records))
    found, again = (
        aggregate(score_records(some), bootstrap_samples=40, allow_bad_references=True) for some in (records, shuffled)
    )
    assert found == again


@settings(max_examples=60, deadline=None)
@given(EXAMS)
def test_perfect_predictions_score_one_wherever_defined(exam: list[tuple[str, str, str]]) -> None:
    records = records_of([(name, reference, reference) for name, reference, _ in exam])
    metrics = aggregate(score_records(records), bootstrap_samples=40)["metrics"]
    for name, metric in metrics.items():
        if not name.startswith(("legacy", "hallucinated")):
            assert (metric["value"], metric["low"], metric["high"]) in ((1.0, 1.0, 1.0), (None, None, None)), name
    assert metrics["plan_acc"]["value"] == 1.0


@settings(max_examples=60, deadline=None)
@given(EXAMS)
def test_values_are_shares_and_never_nan(exam: list[tuple[str, str, str]]) -> None:
    found = aggregate(score_records(records_of(exam)), bootstrap_samples=40)
    json.dumps(found, allow_nan=False)
    for metric in found["metrics"].values():
        assert (metric["value"] is None) == (metric["denominator"] == 0 or metric["low"] is None)
        if metric["value"] is not None and metric["low"] is not None and metric["high"] is not None:
            assert 0 <= metric["low"] <= metric["high"] <= 1
            assert 0 <= metric["value"] <= 1


@settings(max_examples=40, deadline=None)
@given(EXAMS)
def test_step_scores_survive_json(exam: list[tuple[str, str, str]]) -> None:
    for score in score_records(records_of(exam)):
        assert StepScore.from_json(json.loads(json.dumps(score.to_json()))) == score


def test_breakdowns_by_language_rounds_and_seen_tool() -> None:
    records = [
        StepRecord(
            conversation_id="zh",
            step=0,
            reference=call("a", {"x": "北"}),
            prediction=call("a"),
            rounds=1,
            seen_tool=True,
        ),
        StepRecord(conversation_id="zh", step=1, reference="ok", prediction="ok", rounds=1),
        StepRecord(conversation_id="en", step=0, reference=call("a"), prediction=call("a"), rounds=7, seen_tool=False),
        StepRecord(conversation_id="xx", step=0, reference=call("a"), prediction="", language="de"),
    ]
    breakdowns = aggregate(score_records(records), bootstrap_samples=10)["breakdowns"]
    assert {kind: list(groups) for kind, groups in breakdowns.items()} == {
        "language": ["de", "en", "zh"], "rounds": ["1", "4+"], "seen_tool": ["seen", "unseen"],
    }  # fmt: skip
    assert breakdowns["language"]["zh"]["plan_acc"]["denominator"] == 2  # told by the conversation, not by the step
    assert breakdowns["seen_tool"]["unseen"]["param_em"]["value"] == 1.0


def test_few_conversations_are_marked_as_indicative() -> None:
    few, many = ([(call("a"), call("a"))] * count for count in (99, 100))
    assert report(*few)["metrics"]["tool_acc"]["indicative"]
    assert not report(*many)["metrics"]["tool_acc"]["indicative"]


def test_every_metric_with_a_better_direction_can_choose_the_best_checkpoint():
    from agentft.evaluation.config import BEST_METRICS
    from agentft.evaluation.metrics import METRICS_BY_NAME, PAPER_NAMES

    # Less of what is hallucinated is better, so those cannot be ranked upwards.
    upwards = {name for name in (*METRICS_BY_NAME, *PAPER_NAMES) if not name.startswith("hallucinated")}
    assert set(BEST_METRICS) == upwards | {"loss"}
    assert len(set(BEST_METRICS)) == len(BEST_METRICS)
