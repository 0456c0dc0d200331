"""Two runs are compared on one exam only, paired by conversation, and the outcome is said in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentft.compare import main
from agentft.comparison.pairs import compare_pair
from agentft.errors import EvaluationError, RunError


def call(city: str, name: str = "weather") -> str:
    body = json.dumps({"api_name": name, "parameters": {"city": city}})
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


def write(path: Path, right: Callable[[int], bool], count: int = 120, **extra: object) -> Path:
    rows = [
        {
            "conversation_id": f"c{i}",
            "step": step,
            "reference": [call(f"city {i}"), f"It is sunny in city {i}."][step],
            "prediction": [call(f"city {i}" if right(i) else "nowhere"), f"It is sunny in city {i}."][step],
            **extra,
        }
        for i in range(count)
        for step in (0, 1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_real_difference_is_called_real_and_a_small_one_names_the_size_that_would_show_it(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", lambda i: i % 2 == 0)
    b = write(tmp_path / "b.jsonl", lambda i: i % 5 != 0)
    c = write(tmp_path / "c.jsonl", lambda i: i % 2 == 0 or i in (1, 3))
    assert main([str(a), str(b)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "param_em: B is higher, +30.0 points" in text
    assert "a real difference on 120 conversations" in text
    assert "tool_acc: no difference, +0.0 points" in text
    assert "exact in one run alone: 12 in A, 48 in B, p < 0.001" in text
    assert main([str(a), str(c)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "param_em: not shown, +1.7 points" in text
    needed = compare_pair(a, c).metrics["param_em"].needed_conversations
    assert needed is not None
    assert needed > 120
    assert f"about {needed:,} conversations would show a difference of this size" in text


def test_json_holds_interval_p_holm_mcnemar_and_the_words(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", lambda i: i % 2 == 0)
    b = write(tmp_path / "b.jsonl", lambda i: i % 5 != 0)
    assert main([str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metric = found["metrics"]["arg_f1"]
    assert metric["difference"] == pytest.approx(0.15)
    assert 0 < metric["low"] < 0.15 < metric["high"]
    assert metric["p"] <= metric["p_holm"] < 0.05
    assert metric["real"] is True
    assert found["mcnemar"] == {"only_a": 12, "only_b": 48, "p": pytest.approx(found["mcnemar"]["p"])}
    assert found["conversations"] == 120
    assert any("arg_f1: B is higher" in sentence for sentence in found["words"])
    assert found["verdict"].startswith("B is better than A on these 120 conversations, in param_em, arg_f1, step_em;")


def test_another_exam_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", bool)
    fewer = write(tmp_path / "fewer.jsonl", bool, count=119)
    other = write(tmp_path / "other.jsonl", bool)
    other.write_text(other.read_text().replace("sunny", "cloudy"), encoding="utf-8")
    rollout = write(tmp_path / "replay.jsonl", bool, mode="replay")
    for path, words in ((fewer, "only in A"), (other, "reference(s) differ"), (rollout, "replay")):
        assert main([str(a), str(path)]) == 1
        error = capsys.readouterr().err
        assert "not the same evaluation" in error
        assert words in error
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"broken\.jsonl:1"):
        compare_pair(a, broken)


def test_run_folders_are_compared_by_their_answers(tmp_path, capsys):
    for run, right in (("one", lambda i: i % 2 == 0), ("two", bool)):
        write(tmp_path / run / "predictions" / "after.jsonl", right, count=30)
        write(tmp_path / run / "predictions" / "after.partial.jsonl", right, count=3)
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    text = capsys.readouterr().out
    assert "30 conversations: below 100 all intervals are indicative" in text
    with pytest.raises(RunError, match="this run holds after; choose with --answers"):
        compare_pair(tmp_path / "one", tmp_path / "two", "before")
    assert main([str(tmp_path / "one"), str(tmp_path / "two" / "predictions" / "after.jsonl")]) == 0


def test_a_run_is_equal_to_itself(tmp_path):
    a = write(tmp_path / "a.jsonl", lambda i: i % 3 == 0)
    found = compare_pair(a, a)
    assert all(metric.difference in (None, 0.0) for metric in found.metrics.values())
    assert "the same action steps are exact" in " ".join(found.words)
