"""A weight is a number of showings, whatever the order of files; the exam knows no weights."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from agentft.data.config import LocalConfig, Split, WeightedPath
from agentft.data.conversation import Conversation, Origin
from agentft.data.entries import divide, in_showing_order
from agentft.data.prepare import prepare_data
from agentft.data.prepared import write_manifest
from agentft.data.records import read_record
from agentft.data.sources import PreparationStats, read_conversations, read_local
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder
from agentft.errors import ConfigError, DataError
from agentft.model.sources import byte_tokenizer
from agentft.recipes.config import require_consistent
from agentft.runs import RunFolder


def record(number: int, name: str = "c") -> dict:
    said = [{"from": "user", "value": f"{name} {number}?"}, {"from": "assistant", "value": f"{name} {number}."}]
    return {"id": f"{name}-{number}", "conversations": said}


def conversations(count: int, weight: float = 1.0) -> list[Conversation]:
    found = []
    for number in range(count):
        outcome = read_record(record(number), Origin("test", number), weight=weight)
        assert isinstance(outcome, tuple)
        found.append(outcome[0])
    return found


def shown(pool: list[Conversation], weight: float) -> list[str]:
    return [c.id for c in in_showing_order([dataclasses.replace(c, weight=weight) for c in pool], seed=1)]


def test_a_weight_is_how_often_a_conversation_is_shown():
    pool = conversations(2000)
    assert Counter(Counter(shown(pool, 3.0)).values()) == {3: 2000}
    assert len(shown(pool, 0.25)) == pytest.approx(500, abs=80)
    times = Counter(Counter(shown(pool, 2.5)).values())
    assert set(times) == {2, 3}
    assert times[3] == pytest.approx(1000, abs=110)


def test_a_greater_weight_adds_showings_and_moves_none():
    pool = conversations(300)
    before = shown(pool, 0.2)
    for weight in (0.7, 1.0, 1.3, 2.0, 2.8):
        after = shown(pool, weight)
        rest = iter(after)
        assert all(name in rest for name in before), weight
        assert not Counter(before) - Counter(after)
        before = after


def test_a_source_is_shown_alike_whatever_the_others_hold():
    one = conversations(100, weight=1.5)
    outcome = read_record(record(1, "other"), Origin("other", 1), weight=4.0)
    assert isinstance(outcome, tuple)
    alone = [c.id for c in in_showing_order(one, seed=1)]
    together = [c.id for c in in_showing_order([outcome[0], *reversed(one)], seed=1)]
    assert [name for name in together if name != "other-1"] == alone


def test_the_exam_knows_no_weights():
    pool = conversations(400)
    heavy = [dataclasses.replace(c, weight=3.0 if at % 2 else 0.1) for at, c in enumerate(pool)]
    plain, weighted = (divide(p, split=Split.content, test_ratio=0.2, seed=1) for p in (pool, heavy))
    assert [c.id for c in weighted.heldout] == [c.id for c in plain.heldout]
    assert weighted.set_aside["left_out_by_weight"] == len(plain.train) - len({c.id for c in weighted.train})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 101.0])
def test_a_weight_that_is_none_is_refused(weight: float):
    with pytest.raises(ConfigError, match=r"dataset\.sources\.weight=.*: expected a number above 0 and at most 100"):
        WeightedPath(path="a.jsonl", weight=weight)


def test_path_and_sources_are_given_one_without_the_other():
    with pytest.raises(ConfigError, match=r"dataset\.path: missing; .*dataset\.sources"):
        require_consistent(LocalConfig(name="local"))
    with pytest.raises(ConfigError, match="expected one of them"):
        require_consistent(LocalConfig(name="local", path="a.jsonl", sources=[WeightedPath(path="b.jsonl")]))


def test_a_file_that_two_sources_hold_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record(1)))
    with pytest.raises(DataError, match=r"a\.jsonl: inside .*, which is given too"):
        read_local([tmp_path, WeightedPath(path=str(tmp_path / "a.jsonl"), weight=2.0)])
    with pytest.raises(DataError, match=r"a\.jsonl: given twice"):
        read_local([tmp_path / "a.jsonl", tmp_path / "." / "a.jsonl"])


def write_sources(folder: Path) -> LocalConfig:
    """30 conversations, one of them with a flaw, in a file of weight 2; 20 in the two files of a folder, of weight 0.5."""
    (folder / "parts").mkdir()
    for path, numbers, name in (("a.jsonl", range(29), "a"), ("parts/b.jsonl", range(10), "b"), ("parts/c.jsonl", range(10), "c")):  # fmt: skip  # noqa: E501
        (folder / path).write_text("".join(json.dumps(record(n, name)) + "\n" for n in numbers))
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"id": "flawed", "conversations": []}\n')
    weights = [
        WeightedPath(path=str(folder / "a.jsonl"), weight=2.0),
        WeightedPath(path=str(folder / "parts"), weight=0.5),
    ]
    return LocalConfig(name="local", sources=weights, test_ratio=0.2)


def test_the_rows_of_a_folder_count_for_the_folder(tmp_path: Path):
    config = write_sources(tmp_path)
    report = PreparationStats()
    list(read_conversations(read_local(config.sources, stats=report), stats=report))
    counts = {Path(name).name: (s["weight"], s["rows"], s["kept"]) for name, s in report.sources.items()}
    assert counts == {"a.jsonl": (2.0, 30, 29), "parts": (0.5, 20, 20)}


def test_the_manifest_says_what_each_source_gave_and_how_much_of_it_is_used(tmp_path: Path):
    config = write_sources(tmp_path)
    tokenizer = byte_tokenizer()
    prepared = prepare_data(config, choose_template("msagent", tokenizer), SegmentEncoder(tokenizer))
    run = RunFolder(tmp_path / "run")
    write_manifest(prepared, run)
    manifest = json.loads(run.data_manifest.read_text())
    a, parts = manifest["sources"]
    assert (a["weight"], a["rows"], a["kept"]) == (2.0, 30, 29)
    assert (parts["weight"], parts["rows"], parts["kept"]) == (0.5, 20, 20)
    assert a["train"] == 2 * (29 - a["heldout"])
    seen = Counter(manifest["train"]["ids"])
    assert sum(count for name, count in seen.items() if name.startswith("a-")) == a["train"]
    assert set(seen.values()) == {1, 2}
    assert parts["train"] == sum(name[0] in "bc" for name in seen)
    assert parts["train"] + manifest["in_neither_part"]["left_out_by_weight"] == 20 - parts["heldout"]


def test_a_conversation_shown_twice_is_set_aside_once(tmp_path: Path):
    long = record(0, "long")
    long["conversations"][1]["value"] = "far too long " * 400
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [long, *(record(n) for n in range(40))]))
    config = LocalConfig(name="local", sources=[WeightedPath(path=str(path), weight=3.0)], test_ratio=0.2)
    tokenizer = byte_tokenizer()
    prepared = prepare_data(config, choose_template("msagent", tokenizer), SegmentEncoder(tokenizer))
    assert prepared.stats.reasons() == {"too_long": 1}
    assert [change["id"] for change in prepared.stats.changed] == ["long-0"]
