"""The old script's values, bug for bug. Constants marked (rouge 1.0.1) were made with that package."""

from __future__ import annotations

import random

import pytest

from agentft.evaluation.matching import LegacyStep, legacy_metrics, legacy_step


def call(body: str) -> str:
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


RIGHT = call('{"api_name": "a", "parameters": {"x": "1"}}')
NO_PARAMETERS = call('{"api_name": "a"}')


def test_double_count_of_a_call_without_parameters() -> None:
    step = legacy_step(RIGHT, NO_PARAMETERS)
    assert (step.actions, step.inputs) == ((1, 0), (0,))
    metrics = legacy_metrics([legacy_step(RIGHT, RIGHT), step])
    assert metrics["legacy_action_em"].value == pytest.approx(2 / 3)
    assert metrics["legacy_input_em"].value == 0.5
    assert legacy_metrics([step])["legacy_action_em"].value == 0.5


def test_two_calls_in_the_reference_make_it_a_text() -> None:
    assert legacy_step(RIGHT + "\n\n" + RIGHT, RIGHT).is_text
    assert legacy_step(call("{broken}"), RIGHT).is_text


def test_correct_call_followed_by_an_invented_one_scores_nothing() -> None:
    step = legacy_step(RIGHT, RIGHT + "<|startofexec|>{}<|endofexec|>" + RIGHT)
    assert (step.actions, step.inputs) == ((0,), (0,))


def test_wrong_tool_with_equal_parameters_and_true_for_one() -> None:
    assert legacy_step(RIGHT, RIGHT.replace('"a"', '"b"')) == LegacyStep(actions=(0,), inputs=(1,))
    one, true = (RIGHT.replace('"1"', value) for value in ("1", "true"))
    assert legacy_step(one, true).inputs == (1,)
    assert legacy_step(one, one.replace("1", '"1"')).inputs == (0,)


def test_spurious_call_on_an_answer_step_costs_no_action() -> None:
    step = legacy_step("it is sunny", RIGHT)
    assert step.is_text
    assert step.actions == ()


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on a mat", 0.9090909041322315),
        ("今天天气很好", "今天天气很好", 0.999999995),
        ("今天天气很好", "今天天气真好", 0.0),
        ("a b. c d. a", "a c b. d", 0.999999995),
        ("sunny", "", 0.0),
        ("x", " . ", 0.0),
    ],
)
def test_rouge_over_sets_of_blank_separated_words(reference: str, prediction: str, expected: float) -> None:
    assert legacy_step(reference, prediction).rouge_l == expected  # (rouge 1.0.1)


@pytest.mark.parametrize("prediction", [".", "..."])
def test_full_stops_alone_raise(prediction: str) -> None:
    metrics = legacy_metrics([legacy_step("sunny", prediction)])
    assert metrics["legacy_rouge_l"].value is None
    assert metrics["legacy_rouge_l"].raised == "ValueError"


def test_long_texts_raise_recursion_error() -> None:
    words = " ".join(f"w{number}" for number in range(1_500))
    assert legacy_step(words, words).raised == "RecursionError"
    words = " ".join(f"w{number}" for number in range(900))
    assert legacy_step(words, words).rouge_l == 0.999999995


def test_empty_lists_divide_by_zero() -> None:
    metrics = legacy_metrics([])
    assert {metric.raised for metric in metrics.values()} == {"ZeroDivisionError"}
    assert {metric.value for metric in metrics.values()} == {None}


def test_equals_the_package_rouge_where_it_is_installed() -> None:
    rouge = pytest.importorskip("rouge", reason="the old script's package is not installed").Rouge()
    rng = random.Random(3)
    pieces = ["a", "b", "c", "天气", "d ", ".", " ", "\n", "e.", " x", " y"]
    for _ in range(500):
        reference, prediction = ("".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(2))
        step = legacy_step(reference, prediction)
        try:
            expected = rouge.get_scores([prediction or " "], [reference], avg=True)["rouge-l"]["f"]
        except ValueError:
            assert step.raised == "ValueError"
        else:
            assert step.rouge_l == expected
