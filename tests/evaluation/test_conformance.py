"""`python -m agentft.score` against the plain reference in `reference_metrics.py`, on generated files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentft.score import main
from tests.evaluation.reference_metrics import Expected, Step, cr0, expect

NAMES = ("weather", "天气", "hotel_search")
KEYS = ("city", "日期", "n")
VALUES: tuple[Any, ...] = (
    *(
        "北京",
        "paris",
        "Paris",
        " paris ",
        "ｐａｒｉｓ",
        "a  b",
        "a b",
        "a\nb",
        "",
        "1",
        "１",
        "1.0",
        "1e0",
        "true",
        "-5",
    ),
    *(1, 1.0, 0, 2, True, False, None, 0.1, "0.10", 10**20, 1e20, 2**53, 2**53 + 1),
    *([], {}, [1, 2], [2, 1], ["1", 2], [True], '{"a": 1}', {"a": 1}, {"a": "1"}, {"a": 1, "b": [None]}),
    *({"b": [None], "a": 1.0}, "[1, 2]", "北京。", "null", '"paris"', "“paris”"),
)
ANSWERS = (
    *(
        "",
        "北京今天晴。",
        "北京今天 晴",
        "北京明天晴",
        "It is sunny in Paris.",
        "it is SUNNY in paris",
        "Ｐａｒｉｓ 2 API！",
        "…。",
    ),
    *("한국어 テスト API3 漢字", "a\n\nb c", "ﬁne ½ x² 3.14", "naïve café", "\u3007\u3005\u30fc"),
)
MALFORMED = (
    '<|startofthink|>{"api_name": "weather", "parameters": {"city": "',
    '<|startofthink|>```JSON\n{"api_name": "weather", "parameters": {"city": NaN}}\n```<|endofthink|>',
    '<|startofthink|>{"api_name": "weather", "parameters": {"n": 1},}<|endofthink|>',
    "<|startofthink|><|endofthink|>",
    "<|startofthink|>thinking about weather<|endofthink|>",
    '<|startofthink|>{"parameters": {"city": "paris"}}<|endofthink|>',
    '<|startofthink|>{"api_name": "weather", "parameters": "paris"}<|endofthink|>',
    '<|startofthink|>{"api_name": 7, "parameters": {}}<|endofthink|>',
    "<|startofthink|>[]<|endofthink|>",
    "<|startofthink|>7<|endofthink|>",
)
ENDINGS = ("", "", "", "</s>", "<|im_end|>\n<|im_start|>user", "\n\n<|user|>:and tomorrow?", "<|endoftext|>" * 2)
INVENTED = (
    '\n\n<|startofexec|>```JSON\n{"x": 1}\n```<|endofexec|>\n<|startofthink|>{"api_name": "hotel_search"}<|endofthink|>'
)


def calls() -> st.SearchStrategy[dict[str, Any]]:
    parameters = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3)
    extras = st.sampled_from([{}, {}, {"url": "http://a"}, {"url": "http://b", "command": "x"}])
    return st.builds(
        lambda name, given, extra: {**extra, "api_name": name, "parameters": given},
        st.sampled_from(NAMES),
        parameters,
        extras,
    )


@st.composite
def spans(draw: st.DrawFn, written: list[dict[str, Any]]) -> str:
    """Calls as text: with or without fence, in one array or each on its own, keys in any order, raw line feeds or not."""
    if written and draw(st.integers(0, 4)) == 0:
        bodies: list[Any] = [written]
    else:
        bodies = list(written)
    texts = []
    for body in bodies:
        shuffled = draw(st.randoms(use_true_random=False))
        text = json.dumps(
            reordered(body, shuffled), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
        )
        if draw(st.booleans()):
            text = text.replace("\\n", "\n")
        fence = draw(st.sampled_from(["```JSON\n{}\n```", "```json\n{}```", "{}", "```\n{}\n```\n", "\n{}\n"]))
        texts.append("<|startofthink|>" + fence.replace("{}", text) + "<|endofthink|>")
    return draw(st.sampled_from(["", "\n\n", "\nand then\n"])).join(texts)


def reordered(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, reordered(each, order)) for key, each in value.items()]
        order.shuffle(items)
        return dict(items)
    return [reordered(each, order) for each in value] if isinstance(value, list) else value


@st.composite
def predicted(draw: st.DrawFn, due: list[dict[str, Any]], answer: str) -> str:
    """What a model might say: right, nearly right, something else, too much, broken, run on."""
    kind = draw(st.sampled_from(["near", "near", "near", "other", "answer", "broken"]))
    said: list[dict[str, Any]] = []
    if kind == "near":
        said = [dict(call) for call in draw(st.permutations(due))]
        for call in said:
            if draw(st.integers(0, 2)) == 0:
                call["parameters"] = {
                    **call["parameters"],
                    draw(st.sampled_from((*KEYS, "zz"))): draw(st.sampled_from(VALUES)),
                }
            if draw(st.integers(0, 4)) == 0:
                call["parameters"] = dict(list(call["parameters"].items())[1:])
            if draw(st.integers(0, 5)) == 0:
                call["api_name"] = draw(st.sampled_from((*NAMES, "invented")))
            if not call["parameters"] and draw(st.booleans()):
                del call["parameters"]
        said = said[: draw(st.sampled_from([9, 9, 9, 1]))]
    if kind == "other" or (kind == "near" and draw(st.integers(0, 4)) == 0):
        said += draw(st.lists(calls(), max_size=2))
    text = draw(spans(said))
    if kind == "broken":
        text += draw(st.sampled_from(MALFORMED))
    words = answer if draw(st.booleans()) else draw(st.sampled_from(ANSWERS))
    text = (words + "\n" + text) if draw(st.booleans()) or not text else text
    header = draw(st.sampled_from(["", "", "\n\n<|assistant|>:", "<|assistant|>:"]))
    return header + text + draw(st.sampled_from((*ENDINGS, INVENTED)))


@st.composite
def exams(draw: st.DrawFn) -> list[Step]:
    tools = [
        {"name": "weather", "parameters": [{"name": "city", "required": True}, {"name": "n"}]},
        *({"name": "天气", "parameters": []}, {"name": "hotel_search"}, "hotel_search", "weather"),
    ]
    steps = []
    for number in range(draw(st.integers(1, 4))):
        offered = draw(st.sampled_from([None, "some"]))
        shown = (
            draw(st.lists(st.sampled_from(tools), max_size=3, unique_by=lambda tool: str(tool))) if offered else None
        )
        language = draw(st.sampled_from(["zh", "en"]))
        for step in range(draw(st.integers(1, 4))):
            due = draw(st.lists(calls(), max_size=3)) if draw(st.booleans()) else []
            answer = draw(st.sampled_from(ANSWERS))
            reference = (draw(st.sampled_from(["", "思考\n"])) + draw(spans(due))) if due else answer
            line: Step = {
                "conversation_id": f"c{number}",
                "step": step,
                "reference": reference,
                "prediction": draw(predicted(due, answer)),
                "language": language,
            }
            if shown is not None and draw(st.integers(0, 3)):
                line["offered"] = shown
            steps.append(line)
    return draw(st.permutations(steps))


def scored(steps: list[Step]) -> dict[str, Any]:
    """The report that the command prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        path.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main([str(path), "--json", "--bootstrap-samples", "2"]) == 0
    report = json.loads(printed.getvalue())
    assert isinstance(report, dict)
    return report


def agree(metrics: dict[str, dict[str, Any]], expected: Expected) -> None:
    """Value, numerator and denominator of every row; clustered standard errors of the plain ratios."""
    for name in ROWS:
        numerator, denominator = expected.ratios.get(name, (0, 0))
        found = metrics[name]
        assert found["denominator"] == denominator, name
        assert found["numerator"] == pytest.approx(float(numerator), abs=1e-9), name
        if denominator == 0:
            assert (found["value"], found["low"], found["high"]) == (None, None, None), name
            continue
        assert found["value"] == pytest.approx(float(numerator) / denominator, abs=1e-12), name
        clusters = [pair for pair in expected.by_conversation[name].values() if pair[1]]
        assert found["conversations"] == len(clusters), name
        assert found["se_cr0"] == pytest.approx(cr0(clusters), abs=1e-9), name
        small_sample = math.sqrt(len(clusters) / (len(clusters) - 1)) if len(clusters) > 1 else None
        assert found["se"] == (None if small_sample is None else pytest.approx(small_sample * cr0(clusters), abs=1e-9))
    for name, (least, most, denominator) in expected.ranges.items():
        found = metrics[name]
        assert found["denominator"] == denominator, name
        assert float(least) - 1e-9 <= found["numerator"] <= float(most) + 1e-9, name
        assert (found["value"] is None) == (denominator == 0), name
        if denominator:
            assert found["value"] == pytest.approx(found["numerator"] / denominator, abs=1e-12), name


ROWS = (
    *("tool_acc", "tool_precision", "tool_f1", "param_em", "param_em_given_tool", "arg_f1_micro", "step_em", "conv_em"),
    *("plan_acc", "call_wellformed_rate", "hallucinated_tool_rate", "hallucinated_param_rate"),
    *("rouge_l", "rouge_l_after_call", "rouge_l_no_call"),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(exams())
def test_every_row_of_the_spec_is_what_the_plain_reference_says(steps: list[Step]) -> None:
    report, expected = scored(steps), expect(steps)
    agree(report["metrics"], expected)
    for paper, ours in (("action_em", "tool_acc"), ("argument_f1", "arg_f1"), ("rouge_l", "rouge_l")):
        assert report["paper"][paper] == report["metrics"][ours]["value"] == report["metrics"][paper]["value"]
    assert report["plan_table"] == expected.plan_table
    for name, count in expected.counts.items():
        assert report["counts"][name] == count, name
    assert sum(each["calls"] for each in report["confusion"] if each["reference"] is not None) == expected.confused
    for language in {step["language"] for step in steps}:
        part = [step for step in steps if step["language"] == language]
        agree(report["breakdowns"]["language"][language], expect(part, everything=steps))


def call(name: str, **parameters: Any) -> str:
    return f"<|startofthink|>```JSON\n{json.dumps({'api_name': name, 'parameters': parameters})}\n```<|endofthink|>"


WEATHER = {"name": "weather", "parameters": [{"name": "city"}, {"name": "day"}]}
WORKED = [
    # exact: the order of keys and 1.0 for 1 do not matter
    ("c0", 0, call("weather", city="北京", day=1), call("weather", day=1.0, city="北京"), [WEATHER, "hotel"]),
    # four of five characters in order, the full stop is none
    ("c0", 1, "北京今天晴", "北京明天晴。", None),
    # a spurious call, and no word
    ("c0", 2, "好的", call("hotel"), None),
    # two calls due: one with its value leniently right and a null left out, one replaced by a tool that nobody offered
    (
        "c1",
        0,
        call("weather", city="a") + call("hotel", n="2", x=None),
        call("hotel", n=2) + call("flight"),
        ["weather"],
    ),
    ("c1", 1, call("weather"), '<|startofthink|>{"api_name": "weather", <|endofthink|>', None),
]


def test_an_exam_worked_out_by_hand() -> None:
    fields = ("conversation_id", "step", "reference", "prediction", "offered")
    metrics = scored([dict(zip(fields, step, strict=True)) for step in WORKED])["metrics"]
    expected = {
        "tool_acc": (2, 4),
        "tool_precision": (2, 5),
        "tool_f1": (4, 9),
        "param_em": (1, 4),
        "param_em_given_tool": (1, 2),
        "param_em_lenient": (2, 4),
        "arg_f1": (1 + 1 / 3, 4),  # of hotel: R = 0.5 / 2, P = 0.5 / 1, 2RP / (R + P) = 1 / 3
        "arg_f1_micro": (2 * 2, 5 + 3),
        "step_em": (1, 3),
        "conv_em": (1, 2),
        "plan_acc": (4, 5),
        "call_wellformed_rate": (4, 5),
        "hallucinated_tool_rate": (1, 5),
        "hallucinated_param_rate": (0, 2),
        "rouge_l": (0.8, 2),
        "rouge_l_after_call": (0.8, 1),
        "rouge_l_no_call": (0, 1),
        "url_match": (0, 0),
    }
    for name, ratio in expected.items():
        assert (metrics[name]["numerator"], metrics[name]["denominator"]) == pytest.approx(ratio), name
