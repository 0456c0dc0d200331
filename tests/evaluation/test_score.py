"""The command line that scores a predictions file without a model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentft.evaluation.steps import StepScore
from agentft.score import main

CALL = '<|startofthink|>```JSON\n{"api_name": "天气", "parameters": {"city": "北京"}}\n```<|endofthink|>'
STEP = {"conversation_id": "c1", "step": 0, "reference": CALL, "prediction": CALL}


def write(folder: Path, *steps: Any) -> Path:
    path = folder / "predictions.jsonl"
    lines = [step if isinstance(step, str) else json.dumps(step, ensure_ascii=False) for step in steps]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_json_report_has_the_promised_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offered = [{"name": "天气", "parameters": [{"name": "city", "required": True}]}, "hotel"]
    path = write(
        tmp_path,
        {**STEP, "offered": offered},
        "",
        {**STEP, "step": 1, "reference": "晴", "prediction": "晴", "language": "zh", "rounds": 1, "seen_tool": None},
    )
    assert main([str(path), "--json", "--bootstrap-samples", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["signature"] == "agentft-eval|v2|tf|tok:cjk-char-v2|rl:f1|param:strict|align:bip|n:1"
    assert {"value", "numerator", "denominator", "low", "high"} <= report["metrics"]["tool_acc"].keys()
    assert report["metrics"]["rouge_l_after_call"]["value"] == 1.0
    assert report["metrics"]["hallucinated_param_rate"]["value"] == 0.0
    assert report["metrics"]["url_match"]["value"] is None
    assert report["counts"]["steps"] == 2
    assert report["paper"] == {"rouge_l": 1.0, "action_em": 1.0, "argument_f1": 1.0}
    assert report["bootstrap"]["seed"] == 0


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, STEP, {**STEP, "step": 1, "prediction": "不"})
    output, steps = tmp_path / "report.json", tmp_path / "steps.jsonl"
    assert main([str(path), "--bootstrap-samples", "50", "--output", str(output), "--steps", str(steps)]) == 0
    table = capsys.readouterr().out
    assert "tool_acc" in table
    assert "1 / 2" in table
    assert "天气 -> -" in table
    assert json.loads(output.read_text(encoding="utf-8"))["metrics"]["tool_acc"]["value"] == 0.5
    restored = [StepScore.from_json(json.loads(line)) for line in steps.read_text(encoding="utf-8").splitlines()]
    assert [score.name_correct for score in restored] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ([STEP, STEP], 2, "stands in line 1 already"),
        ([], 1, "the file holds no step"),
        (["", "  "], 1, "the file holds no step"),
        ([STEP, '{"conversation_id": "c1", '], 2, "not JSON"),
        ([json.dumps(STEP)[:-1] + ', "note": NaN}'], 1, "NaN is no JSON number"),
        ([json.dumps(STEP) + " x"], 1, "not JSON"),
        ([json.dumps(STEP)[:-1] + ', "note": ' + "9" * 5000 + "}"], 1, "not JSON"),
        ([STEP, "\0"], 2, "not JSON"),
        (["[1]"], 1, "expected a JSON object"),
        ([{key: value for key, value in STEP.items() if key != "prediction"}], 1, "field 'prediction' is missing"),
        ([{**STEP, "step": "0"}], 1, "field 'step' is \"0\"; expected an integer from 0"),
        ([{**STEP, "step": True}], 1, "field 'step' is true"),
        ([{**STEP, "step": 0.0}], 1, "field 'step' is 0.0"),
        ([{**STEP, "step": -1}], 1, "field 'step' is -1"),
        ([{**STEP, "conversation_id": 7.0}], 1, "field 'conversation_id' is 7.0; expected a string"),
        ([{**STEP, "conversation_id": True}], 1, "field 'conversation_id' is true; expected a string"),
        ([{**STEP, "conversation_id": 7}, {**STEP, "conversation_id": "7"}], 2, "stands in line 1 already"),
        ([{**STEP, "prediction": None}], 1, "field 'prediction' is null; expected a string"),
        ([{**STEP, "offered": "weather"}], 1, "expected a list of tool names or objects"),
        ([{**STEP, "offered": [{"parameters": []}]}], 1, "expected a tool name or an object with 'name'"),
        ([{**STEP, "rounds": "two"}], 1, "field 'rounds'"),
        ([{**STEP, "after_call": 1}], 1, "field 'after_call'"),
    ],
)
def test_broken_files_are_refused_in_one_line(
    lines: list[Any], line: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, *lines)
    assert main([str(path), "--json"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"{path}:{line}: ")
    assert words in error
    assert error.count("\n") == 1


def test_other_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.jsonl")]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xff"}\n')
    assert main([str(tmp_path / "latin.jsonl")]) == 1
    assert "latin.jsonl:1: not UTF-8" in capsys.readouterr().err


def test_unreadable_reference_fails_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, STEP, {**STEP, "step": 1, "reference": "<|startofthink|>{"})
    assert main([str(path), "--json", "--bootstrap-samples", "10"]) == 1
    assert "'c1' step 1 (unclosed" in capsys.readouterr().err
    assert main([str(path), "--json", "--bootstrap-samples", "10", "--allow-bad-references"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["quarantined_references"] == 1
    assert report["quarantined"][0]["step"] == 1


def test_line_ends_byte_order_mark_and_surrogates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "windows.jsonl"
    bad = {**STEP, "conversation_id": "\ud800\u2028", "reference": "<|startofthink|>"}
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([json.dumps(STEP), json.dumps(bad)]).encode())
    assert main([str(path), "--json", "--bootstrap-samples", "10", "--allow-bad-references"]) == 0
    assert json.loads(capsys.readouterr().out)["quarantined"][0]["conversation_id"] == "\ud800\u2028"


def test_standard_input_and_whole_numbers_as_ids(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({**STEP, "conversation_id": number}) + "\n" for number in (7, "c", 8))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["-", "--json", "--bootstrap-samples", "10"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["conversations"] == 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    assert main(["-", "--json"]) == 1
    assert capsys.readouterr().err.startswith("-:1: not JSON")


def test_scoring_imports_no_torch_and_starts_fast(tmp_path: Path) -> None:
    path = write(tmp_path, STEP)
    program = (
        "import sys, runpy; sys.argv = ['score', sys.argv[1], '--json', '--bootstrap-samples', '10']\n"
        "try: runpy.run_module('agentft.score', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf', 'nltk', 'pandas'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["step_em"]["value"] == 1.0


def test_pieces_are_one_conversation_where_the_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [STEP | {"conversation_id": f"long/{n}"} for n in (1, 2)]
    for given, conversations in ((pieces, 2), ([each | {"piece_of": "long"} for each in pieces], 1)):
        assert main([str(write(tmp_path, *given)), "--json", "--bootstrap-samples", "20"]) == 0
        assert json.loads(capsys.readouterr().out)["counts"]["conversations"] == conversations


MSAGENT = '<|startofthink|>{"api_name": "tide", "parameters": {"at": "Kiel"}}<|endofthink|>'
OTHER_MARKS = [
    '<tool_call>{"name": "tide", "arguments": {"at": "Kiel"}}</tool_call>',
    "<tool_call>\n<function=tide>\n<parameter=at>\nKiel\n</parameter>\n</function>\n</tool_call>",
    '[TOOL_CALLS][{"name": "tide", "arguments": {"at": "Kiel"}}]</s>',
    "<|tool_call_start|>[tide(at='Kiel')]<|tool_call_end|><|im_end|>",
    '<|channel|>commentary to=functions.tide <|constrain|>json<|message|>{"at": "Kiel"}<|call|>',
    '<｜tool▁call▁begin｜>tide<｜tool▁sep｜>{"at": "Kiel"}<｜tool▁call▁end｜>',
    '{"name": "tide", "parameters": {"at": "Kiel"}}',
]


def report_of(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> dict[str, Any]:
    assert main([str(path), "--json", "--bootstrap-samples", "10", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("text", OTHER_MARKS)
def test_calls_in_the_marks_of_any_family_are_read(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The family is that of the references, which reads answers and broken calls too."""
    wrong, broken = text.replace("tide", "wind"), text.replace("{", "{{").replace("=", "")
    steps = [
        {**STEP, "step": number, "reference": reference, "prediction": prediction}
        for number, (reference, prediction) in enumerate(
            [(text, text), (text, wrong), (text, broken), ("High.", "High.")]
        )
    ]
    metrics = report_of(capsys, write(tmp_path, *steps))["metrics"]
    assert metrics["tool_acc"]["numerator"] == metrics["param_em"]["numerator"] == 1
    assert metrics["tool_acc"]["denominator"] == 3
    assert metrics["rouge_l"]["value"] == 1.0


@pytest.mark.parametrize("text", OTHER_MARKS[:-1])
def test_a_prediction_in_other_marks_than_the_reference_is_read(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        {**STEP, "reference": MSAGENT, "prediction": text},
        {**STEP, "step": 1, "reference": "a", "prediction": "a"},
    ]
    metrics = report_of(capsys, write(tmp_path, *steps))["metrics"]
    assert (metrics["tool_acc"]["value"], metrics["param_em"]["value"], metrics["rouge_l"]["value"]) == (1.0, 1.0, 1.0)
    steps = [{**STEP, "reference": text, "prediction": MSAGENT}]
    assert report_of(capsys, write(tmp_path, *steps))["metrics"]["param_em"]["value"] == 1.0


def test_a_reference_in_marks_that_are_not_read_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unread = '<|python_tag|>tide.call(query="Kiel")'
    path = write(tmp_path, {**STEP, "reference": unread}, {**STEP, "step": 1})
    assert main([str(path), "--json"]) == 1
    assert "step 0 (calls_in_text" in capsys.readouterr().err
    path = write(tmp_path, {**STEP, "prediction": unread})
    assert report_of(capsys, path)["metrics"]["call_wellformed_rate"]["value"] == 0.0


def test_a_hole_in_the_steps_of_a_conversation_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [{**STEP, "conversation_id": "whole", "step": step} for step in (3, 4)]
    path = write(tmp_path, STEP, {**STEP, "step": 2}, *whole)
    assert main([str(path), "--bootstrap-samples", "20"]) == 0
    assert f"1 conversations with holes: {STEP['conversation_id']!r} has no step 1; what is missing is not scored" in (
        capsys.readouterr().err
    )
