"""Prepared data: what the short way in memory gives, whatever the order of work, and the same from the cache."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agentft.data import entries as entries_module
from agentft.data import prepare, synthetic, tokens
from agentft.data.config import (
    Format,
    LocalConfig,
    ModelScopeConfig,
    Reasoning,
    Split,
    SyntheticConfig,
    TooLong,
    WeightedPath,
)
from agentft.data.conversation import Conversation
from agentft.data.entries import divide, keep_apart
from agentft.data.prepare import prepare_data
from agentft.data.prepared import (
    PreparedData,
    write_manifest,
)
from agentft.data.render import MsagentTemplate
from agentft.data.sources import PreparationStats, is_large, read_conversations, read_local
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder
from agentft.data.truncation import Truncator
from agentft.errors import DataError
from agentft.model.sources import byte_tokenizer as make_tokenizer
from agentft.runs import RunFolder
from tests.data.chat_families import with_template

COUNT = 150

BUILD = prepare.build_data
"""As it is; tests put others in its place."""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """Conversations of one to three rounds, a broken line, a blank one, a repetition and an id with other content."""
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in synthetic.generate(COUNT, seed=3)]
    again = json.loads(lines[7])
    again["conversations"][1]["value"] += " Please."
    path.write_text("\n".join([*lines, "{broken", "", lines[5], json.dumps(again), ""]), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AGENTFT_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "_STARTED", time.time())  # somebody may have saved a file as pytest started
    return tmp_path / "cache"


def settings(data_file: Path, **changes) -> LocalConfig:
    defaults = {"name": "local", "path": str(data_file), "max_length": 1100, "test_ratio": 0.2, "max_rejected": 0.9}
    return LocalConfig(**{**defaults, **changes})


CASES = {
    "all": {},
    "drop": {"too_long": TooLong.drop},
    "split": {"too_long": TooLong.split},
    "sample": {"max_samples": 20, "test_sample": 5},
    "more than there is": {"max_samples": 1000},
    "unseen tools": {"split": Split.unseen_tools, "max_length": 2000},
}


@pytest.mark.parametrize("case", CASES)
def test_streaming_gives_what_the_short_way_in_memory_gives(case, data_file, template, encoder, tmp_path):
    config = settings(data_file, cache=False, **CASES[case])
    prepared = prepare_data(config, template, encoder)
    train, heldout, outcomes = in_memory(config, template, encoder)
    assert [show(example) for example in prepared.train] == [show(piece.example) for piece in train]
    assert [show(example) for example in prepared.heldout_examples] == [show(piece.example) for piece in heldout]
    assert list(prepared.heldout) == [piece.conversation for piece in heldout]
    assert prepared.train_tools == {call.name for p in train for call in p.conversation.tool_calls}
    assert prepared.stats.fitted == outcomes
    manifest = json.loads(manifest_of(prepared, tmp_path)[0])
    assert manifest["train"]["ids"] == [piece.example.id for piece in train]
    assert manifest["train"]["tokens"] == sum(len(piece.example) for piece in train)
    assert manifest["train"]["labelled_tokens"] == sum(piece.example.trained_tokens for piece in train)
    assert manifest["train"]["steps"] == sum(len(piece.example.steps()) for piece in train)
    assert manifest["heldout"]["content_hashes"] == [piece.conversation.content_hash for piece in heldout]
    assert manifest["set_aside"]["duplicate"] == 1


@pytest.fixture
def forks(monkeypatch) -> list[int]:
    """Take every dataset for a large one, in small batches; the numbers of processes that were forked."""
    made: list[int] = []
    fork = entries_module._in_processes
    for module in (entries_module, prepare):
        monkeypatch.setattr(module, "BATCH_CONVERSATIONS", 12)
    monkeypatch.setattr(prepare, "is_large", lambda config: True)

    def counted(work, batches, processes):
        made.append(processes)
        return fork(work, batches, processes)

    monkeypatch.setattr(entries_module, "_in_processes", counted)
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
@pytest.mark.parametrize("case", [*CASES, "fit", "weights"])
def test_forked_processes_prepare_what_one_process_prepares(case, data_file, template, encoder, tmp_path, forks):
    """Examples, exam, stats and every id: repetitions and equal ids stand in other batches than what they repeat."""
    changes = CASES.get(case, {"too_long": TooLong.fit})
    if case == "weights":
        sources = [WeightedPath(path=str(data_file), weight=1.4)]
        changes = {"path": None, "sources": sources}
    alone = prepare_data(settings(data_file, cache=False, workers=1, **changes), template, encoder)
    assert forks == []
    forked = prepare_data(settings(data_file, cache=False, workers=2, **changes), template, encoder)
    assert set(forks) == {2}
    assert forked.fingerprint == alone.fingerprint
    assert [show(example) for example in forked.train] == [show(example) for example in alone.train]
    assert list(forked.heldout) == list(alone.heldout)
    assert forked.stats.to_json() == alone.stats.to_json()
    assert forked.stats.notices["duplicate_id_renamed"] == 1
    assert forked.stats.rejected["duplicate"] == 1


def test_tokenizers_that_disagree_in_a_forked_process_are_found_and_all_is_prepared_again(
    data_file, template, encoder, forks, monkeypatch, caplog
):
    encode, parent = tokens._Fastokens.encode, os.getpid()

    def spoiled(self, texts):
        found = encode(self, texts)
        return found if os.getpid() == parent else [ids[::-1].copy() for ids in found]

    expected = prepare_data(settings(data_file, cache=False, workers=1), template, encoder)
    monkeypatch.setattr(tokens._Fastokens, "encode", spoiled)
    with caplog.at_level(logging.WARNING, "agentft"):
        found = prepare_data(settings(data_file, cache=False, workers=2), template, encoder)
    assert "begun again with tokenizers alone" in caplog.text
    assert found.fingerprint == expected.fingerprint
    assert found.stats == expected.stats


def test_a_dataset_is_large_by_its_bytes_or_number_before_it_is_read(tmp_path):
    small, large = tmp_path / "small.jsonl", tmp_path / "folder" / "large.jsonl"
    large.parent.mkdir()
    small.write_text("{}")
    large.write_text(" " * 3_000_001)
    assert not is_large(settings(small))
    assert is_large(settings(large))
    assert is_large(settings(large.parent))
    assert not is_large(settings(large, max_samples=100)), "what is sampled may be little"
    assert [is_large(SyntheticConfig(name="s", conversations=count)) for count in (200, 5000)] == [False, True]
    assert not is_large(ModelScopeConfig(name="m", id="a/b"))


def test_sources_with_weights_and_an_exam_of_its_own_are_prepared_as_in_memory(data_file, template, encoder, tmp_path):
    exam = tmp_path / "exam.jsonl"
    lines = data_file.read_text(encoding="utf-8").split("\n")
    other = [json.dumps(record) for record in synthetic.generate(10, seed=4, part="heldout")]
    exam.write_text("\n".join([*lines[:5], *other]), encoding="utf-8")
    for name, part in (("a", lines[:60]), ("b", lines[60:COUNT])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    sources = [
        WeightedPath(path=str(tmp_path / "a.jsonl"), weight=2.5),
        WeightedPath(path=str(tmp_path / "b.jsonl"), weight=0.4),
    ]
    for sample in (-1, 30):
        config = settings(data_file, path=None, sources=sources, test_path=str(exam), cache=False, max_samples=sample)
        prepared = prepare_data(config, template, encoder)
        train, heldout, _ = in_memory(config, template, encoder)
        assert [show(example) for example in prepared.train] == [show(piece.example) for piece in train]
        assert list(prepared.heldout) == [piece.conversation for piece in heldout]
        assert prepared.stats.left_out["held_out_too"] == 5
        assert prepared.stats.left_out["left_out_by_weight"] > 10
    assert max(Counter(prepared.train.ids).values()) > 1


def in_memory(config, template, encoder):
    """Training pieces, held-out pieces and outcomes by the parts of agentft put together without a disk."""

    def read(paths):
        return [item for item in read_conversations(read_local(paths)) if isinstance(item, Conversation)]

    from agentft.data.sources import _local_sources

    if config.test_path is None:
        parts = divide(read(_local_sources(config)), split=config.split, test_ratio=config.test_ratio, seed=config.seed)
    else:
        parts = keep_apart(read(_local_sources(config)), read(config.test_path), seed=config.seed)
    found, outcomes = [], {}
    for part, pool, sample, too_long in (
        ("train", parts.train, config.max_samples, config.too_long),
        (
            "heldout",
            parts.heldout,
            config.test_sample,
            config.too_long if config.too_long is TooLong.drop else TooLong.split,
        ),
    ):
        pieces, used, counted = [], 0, Counter()
        for fitted in Truncator(template, encoder, config.max_length).fit([(each, too_long) for each in pool]):
            if used == sample:
                break
            counted[str(fitted.outcome)] += 1
            pieces += fitted.pieces
            used += bool(fitted.pieces)
        outcomes[part] = counted
        found.append(pieces)
    return *found, outcomes


def show(example) -> tuple:
    return example.id, example.input_ids.tolist(), example.spans, example.context_rounds, example.span_weights


def manifest_of(prepared: PreparedData, folder: Path) -> tuple[bytes, bytes]:
    with RunFolder.create(folder / f"run-{time.monotonic_ns()}") as run:
        write_manifest(prepared, run)
        return run.data_manifest.read_bytes(), run.rejected_file.read_bytes()


def test_from_the_cache_everything_is_the_same_byte_for_byte(data_file, template, encoder, cache, tmp_path, caplog):
    config = settings(data_file)
    with caplog.at_level(logging.INFO):
        kept = prepare_data(config, template, encoder)
        assert "kept in the cache" in caplog.text
        assert "from the cache" not in caplog.text
        cached = prepare_data(config, template, encoder)
    assert "data: from the cache" in caplog.text
    fresh = prepare_data(dataclasses.replace(config, cache=False), template, encoder)
    assert manifest_of(kept, tmp_path) == manifest_of(cached, tmp_path) == manifest_of(fresh, tmp_path)
    assert [show(e) for e in cached.train] == [show(e) for e in fresh.train]
    assert list(cached.heldout) == list(fresh.heldout)
    assert kept.stats == cached.stats == fresh.stats
    assert kept.stats.reasons() == {"too_long": kept.stats.reasons()["too_long"], "not_json": 1, "duplicate": 1}


def test_every_part_of_an_account_survives_its_file(data_file, template, encoder):
    stats = prepare_data(settings(data_file, cache=False), template, encoder).stats
    stats.layout.update(["z", "a", "a"])
    stats.left_out.update(["held_out_too"])
    stats.skipped_files.append("README.md")
    stats.joined = 1
    stats.source_of_file["a.jsonl"] = "folder"
    assert stats.notices
    assert stats.changed
    for part in dataclasses.fields(PreparationStats):
        assert getattr(stats, part.name), part.name
    again = PreparationStats.from_json(stats.to_json())
    assert again == stats
    assert type(again.notices) is Counter
    assert list(again.layout.items()) == list(stats.layout.items())


def test_jobs_that_differ_in_nothing_that_decides_tokens_share_the_cache(data_file, template, encoder, cache):
    prepare_data(settings(data_file), template, encoder)
    prepare_data(settings(data_file, name="mine", max_rejected=0.8, cache_limit_gb=3.0), template, encoder)
    assert len(entries(cache)) == 1
    with pytest.raises(DataError, match="max_rejected"):
        prepare_data(settings(data_file, max_rejected=0.0), template, encoder)
    assert len(entries(cache)) == 1


def _other_code(monkeypatch, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(prepare._PACKAGE / "data", package / "data")
    shutil.copytree(prepare._PACKAGE / "recipes", package / "recipes")
    monkeypatch.setattr(prepare, "_PACKAGE", package)
    with (package / "data" / "synthetic" / "zh.yaml").open("a") as file:
        file.write("# another line\n")
    for path in (each for each in package.rglob("*") if each.is_file()):
        os.utime(path, (1, 1))


CHANGES: dict[str, dict] = {
    "max_length": {"max_length": 1000},
    "too_long": {"too_long": TooLong.drop},
    "seed": {"seed": 1},
    "sample": {"max_samples": 20},
    "test_ratio": {"test_ratio": 0.3},
    "format": {"format": Format.msagent},
    "reasoning": {"reasoning": Reasoning.drop},
}


BY_DEFAULT = ("data", "max_length", "seed", "template", "tokenizer", "code", "library")


@pytest.mark.parametrize(
    "part", [*BY_DEFAULT, *(pytest.param(part, marks=pytest.mark.slow) for part in CHANGES if part not in BY_DEFAULT)]
)
def test_whatever_decides_the_tokens_makes_another_entry(
    part, data_file, template, encoder, cache, tmp_path, monkeypatch
):
    path = Path(shutil.copy(data_file, tmp_path / "talks.jsonl"))
    before = prepare_data(settings(path), template, encoder)
    config = settings(path, **CHANGES.get(part, {}))
    match part:
        case "data":
            text = path.read_text(encoding="utf-8")
            stat = path.stat()
            path.write_text(text.replace(" the ", " tha "), encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert path.stat().st_size == stat.st_size
        case "template":
            template = MsagentTemplate("!")
        case "tokenizer":
            tokenizer = make_tokenizer()
            tokenizer.add_tokens(["weather"])
            encoder = SegmentEncoder(tokenizer)
        case "code":
            _other_code(monkeypatch, tmp_path)
        case "library":
            monkeypatch.setattr(prepare, "version", lambda name: "0.0.1")
    after = prepare_data(config, template, encoder)
    assert len(entries(cache)) == 2
    fresh = prepare_data(dataclasses.replace(config, cache=False), template, encoder)
    assert after.fingerprint == fresh.fingerprint
    if part not in ("code", "library", "format", "reasoning"):
        assert after.fingerprint != before.fingerprint


def test_code_that_changed_after_the_process_began_is_not_cached(
    data_file, template, encoder, cache, tmp_path, monkeypatch, caplog
):
    _other_code(monkeypatch, tmp_path)
    later = prepare._STARTED + 1
    os.utime(tmp_path / "package" / "data" / "render.py", (later, later))
    prepare_data(settings(data_file), template, encoder)
    assert "changed after this process began" in caplog.text
    assert entries(cache) == []


def test_data_that_changes_while_it_is_read_is_refused(data_file, template, encoder, cache, tmp_path, monkeypatch):
    path = Path(shutil.copy(data_file, tmp_path / "talks.jsonl"))

    def build_and_change(*arguments):
        BUILD(*arguments)
        path.write_bytes(path.read_bytes() + b"\n")

    monkeypatch.setattr(prepare, "build_data", build_and_change)
    with pytest.raises(DataError, match="changed while they were read"):
        prepare_data(settings(path), template, encoder)
    assert entries(cache) == []


def _spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed bit": lambda entry: _spoil(entry / "train" / "examples.bin"),
    "a cut file": lambda entry: os.truncate(entry / "heldout" / "counts.npy", 200),
    "a lost file": lambda entry: (entry / "stats.json").unlink(),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_anew_and_said(damage, data_file, template, encoder, cache, caplog):
    before = prepare_data(settings(data_file), template, encoder)
    (entry,) = entries(cache)
    DAMAGES[damage](entry)
    after = prepare_data(settings(data_file), template, encoder)
    assert "is incomplete or damaged" in caplog.text
    assert after.fingerprint == before.fingerprint
    assert entries(cache) == [entry]
    caplog.clear()
    assert prepare_data(settings(data_file), template, encoder).stats == after.stats
    assert "is incomplete or damaged" not in caplog.text


def test_an_entry_that_another_process_removes_meanwhile_ends_no_training(data_file, template, encoder, cache):
    (cache / "going").mkdir(parents=True)
    (cache / "going" / "manifest.json").write_text("{}")
    (cache / "going" / "ids.bin").symlink_to("gone")  # listed, and not there when it is looked at
    prepare_data(settings(data_file, cache_limit_gb=1e-9), template, encoder)
    assert len([path for path in entries(cache) if path.name != "going"]) == 1


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def _in_process(work: Callable[..., None], *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_of_processes_that_begin_at_once_one_builds_and_all_get_the_same(
    data_file, template, encoder, cache, tmp_path, monkeypatch
):
    def counted(*arguments):
        with (tmp_path / "builds").open("a") as file:
            file.write("x")
        BUILD(*arguments)

    def work(number: int) -> None:
        prepared = prepare_data(settings(data_file), template, encoder)
        (tmp_path / f"result-{number}").write_text(prepared.fingerprint + str(len(prepared.train)))

    monkeypatch.setattr(prepare, "build_data", counted)
    processes = [_in_process(work, number) for number in range(4)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "x"
    assert len({(tmp_path / f"result-{number}").read_text() for number in range(4)}) == 1


@pytest.mark.parametrize("moment", ["while tokenising", "before it is sealed"])
def test_a_killed_builder_leaves_nothing_that_is_taken_for_good(
    moment, data_file, template, encoder, cache, tmp_path, monkeypatch
):
    reached = tmp_path / "reached"

    def stop_here() -> None:
        reached.touch()
        time.sleep(600)

    def build_then_stop(*arguments):
        BUILD(*arguments)
        stop_here()

    append = prepare.ExampleWriter.append

    def append_then_stop(writer, example):
        append(writer, example)
        if len(writer.digests) == 20:
            stop_here()

    with monkeypatch.context() as patch:
        if moment == "while tokenising":
            patch.setattr(prepare.ExampleWriter, "append", append_then_stop)
        else:
            patch.setattr(prepare, "build_data", build_then_stop)
        process = _in_process(prepare_data, settings(data_file), template, encoder)
        while not reached.exists():
            assert process.is_alive()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert entries(cache) == []
    assert any(path.is_dir() for path in cache.iterdir())
    prepared = prepare_data(settings(data_file), template, encoder)
    assert [path.name[:1] for path in cache.iterdir() if path.is_dir()] != ["."]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    assert prepared.fingerprint == prepare_data(settings(data_file, cache=False), template, encoder).fingerprint


def test_a_full_disk_is_said_and_leaves_nothing(data_file, template, encoder, cache, tmp_path):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            prepare_data(settings(data_file), template, encoder)
        except DataError as error:
            (tmp_path / "said").write_text(str(error))

    _in_process(work).join(120)
    assert "no room for the prepared data" in (tmp_path / "said").read_text()
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_above_its_limit_the_cache_forgets_what_was_not_used_for_longest(data_file, template, encoder, cache):
    for seed in (1, 2):
        prepare_data(settings(data_file, seed=seed), template, encoder)
    old, new = sorted(entries(cache), key=lambda entry: (entry / "manifest.json").stat().st_mtime_ns)
    os.utime(old / "manifest.json", (1, 1))
    os.utime(new / "manifest.json", (2, 2))
    size = sum(file.stat().st_size for entry in (old, new) for file in entry.rglob("*") if file.is_file())
    opened = prepare_data(settings(data_file, seed=1), template, encoder)  # now the one that was used last
    prepare_data(settings(data_file, seed=3, cache_limit_gb=1.1 * size / 1e9), template, encoder)
    assert old in entries(cache)
    assert new not in entries(cache)
    assert len(opened.train[0]) > 0


def test_without_a_place_to_write_the_data_is_prepared_all_the_same(
    data_file, template, encoder, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AGENTFT_DATA_CACHE", str(tmp_path / "file" / "cache"))
    prepared = prepare_data(settings(data_file), template, encoder)
    assert len(prepared.train) > 50
    assert "data: no cache" in caplog.text


def test_the_ids_of_a_mapped_example_are_the_callers_own(data_file, template, encoder, cache):
    prepared = prepare_data(settings(data_file), template, encoder)
    example = prepared.train[0]
    example.input_ids[:] = 0
    assert not np.array_equal(prepared.train[0].input_ids, example.input_ids)


def test_a_snapshots_own_test_files_are_the_exam(template, encoder, tmp_path):
    def rows(name: str, count: int) -> str:
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "mood": "good"}]
        made = (
            {"id": f"{name}{n}", "messages": [{**turns[0], "content": f"{name} {n}"}, turns[1]]} for n in range(count)
        )
        return "".join(json.dumps(row) + "\n" for row in made)

    (tmp_path / "data").mkdir()
    for name, count in (("train", 5), ("test", 2), ("validation", 1)):
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_text(rows(name, count))
    config = LocalConfig(name="local", path=str(tmp_path), cache=False)
    data = prepare_data(config, template, encoder)
    assert sorted(data.train.ids) == [f"train{n}" for n in range(5)]
    assert sorted(data.heldout_examples.ids) == ["test0", "test1", "validation0"]
    assert data.stats.notices["field_not_carried:mood"] == 8
    assert [(source["rows"], source["kept"]) for source in data.stats.sources.values()] == [(8, 8)]


def test_what_the_layout_leaves_out_of_declarations_is_counted_by_name(template, encoder, tmp_path):
    parameters = {"type": "object", "properties": {}, "additionalProperties": False, "$defs": {"a": {}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    messages = [{"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "user", "content": f"{n}"}, *messages], "tools": [tool]} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LocalConfig(name="local", path=str(tmp_path / "a.jsonl"), test_ratio=0.3, cache=False)
    parts = ("$defs", "additionalProperties", "strict")
    assert prepare_data(config, template, encoder).stats.layout == {f"schema_part_not_written:{p}": 20 for p in parts}


@pytest.mark.parametrize("row", [{"query": "q", "response": "a"}, {"data": [{"messages": []}]}, {"text": "a"}])
def test_a_file_without_a_usable_row_ends_with_why_and_what_is_known(row, template, encoder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(20)) + "[1]\n" * 3 + "nonsense\n")
    with pytest.raises(DataError) as caught:
        prepare_data(LocalConfig(name="local", path=str(path), max_rejected=1.0, cache=False), template, encoder)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 6
    assert lines[0] == "none of 24 rows can be used; they were set aside for:"
    assert f"20 conversations_missing, first {path}:1: no field 'messages'" in lines[1]
    assert all(repr(key) in lines[1] for key in row)
    assert "3 not_an_object" in lines[2]
    assert "xlam (query, tools, answers)" in lines[-1]


def test_what_rewritten_history_costs_is_said(tmp_path, caplog):
    """Qwen3's template drops the thoughts before a question, so each round is an example of its own."""
    tokenizer = with_template(make_tokenizer(), "qwen3")
    path = tmp_path / "thinking.jsonl"
    rounds = [
        {"role": role, "content": text, **({"reasoning_content": "t" * 300} if role == "assistant" else {})}
        for text in ("one", "two", "three")
        for role in ("user", "assistant")
    ]
    rows = [{"id": f"{n}", "messages": [{**rounds[0], "content": f"question {n}"}, *rounds[1:]]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stable, kept in ((False, 3), (True, 1)):
        caplog.clear()
        layout = choose_template("native", tokenizer, stable=stable)
        with caplog.at_level("INFO"):
            prepared = prepare_data(settings(path, max_length=4000), layout, SegmentEncoder(tokenizer))
        cost = prepared.rewritten_history
        conversations = prepared.stats.used("train")
        assert len(prepared.train) == kept * conversations
        assert (cost["conversations"], cost["examples"]) == (
            (conversations, 3 * conversations) if kept == 3 else (0, 0)
        )
        said = [record for record in caplog.records if "rewrites history" in record.message]
        assert [record.levelname for record in said] == (["WARNING"] if cost["tokens"] else [])
    assert prepared.stats.layout["step_left_out_template_drops_reasoning"] == 2 * 20, "and those steps are named"


@pytest.mark.parametrize("streams", [False, True])
def test_a_few_conversations_have_an_exam_and_the_manifest_says_who_may_leave_it(
    streams, data_file, template, encoder, tmp_path, monkeypatch, caplog
):
    """Read again where they were taken for many, and tokenised at once."""
    monkeypatch.setattr(prepare, "is_large", lambda config: streams)
    caplog.set_level("INFO")
    config = settings(data_file, cache=False, test_ratio=None)
    prepared = prepare_data(config, template, encoder)
    train, heldout, _ = in_memory(config, template, encoder)
    assert [show(example) for example in prepared.train] == [show(piece.example) for piece in train]
    assert [show(example) for example in prepared.heldout_examples] == [show(piece.example) for piece in heldout]
    about = json.loads(manifest_of(prepared, tmp_path)[0])["heldout"]
    assert 0 < about["may_be_trained_on_when_the_data_grows"] <= about["conversations"]
    assert f"an exam of {about['conversations']} conversations is small" in caplog.text
    assert ("read again" in caplog.text) == streams


def test_a_ratio_of_0_trains_on_every_row(data_file, template, encoder, tmp_path, caplog):
    prepared = prepare_data(settings(data_file, cache=False, test_ratio=0.0), template, encoder)
    manifest = json.loads(manifest_of(prepared, tmp_path)[0])
    assert manifest["heldout"]["conversations"] == len(prepared.heldout) == 0
    assert manifest["train"]["conversations"] == prepared.stats.kept - prepared.stats.fitted["train"]["set_aside"]
    assert "no conversation is held out" in caplog.text
