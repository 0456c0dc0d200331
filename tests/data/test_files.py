"""Files are read as the bytes they are: one broken line costs one line, and every loss is named."""

import csv
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from agentft.data import sources
from agentft.data.config import WeightedPath
from agentft.data.conversation import Conversation
from agentft.data.records import Rejection
from agentft.data.sources import PreparationStats, RawRow, count_codes, heldout_files, read_conversations, read_local
from agentft.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def record(name: str, text: str = "hello") -> dict:
    return {"id": name, "conversations": [{"from": "user", "value": text}, {"from": "assistant", "value": "ok"}]}


def lines(*names: str) -> bytes:
    return b"".join(json.dumps(record(name), ensure_ascii=False).encode() + b"\n" for name in names)


def outcome(path: object, report: PreparationStats | None = None) -> list[str]:
    """Ids of what was kept and reasons of what was not, each with its line."""
    report = report or PreparationStats()
    items = read_conversations(read_local(path, stats=report), stats=report)
    return [f"{i.origin.line}:{i.id if isinstance(i, Conversation) else i.reason}" for i in items]


def test_a_line_that_cannot_be_read_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    nested = b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    digits = b'{"id": ' + b"9" * 5_000 + b"}\n"
    twice = b'{"id": "x", "id": "y"}\n'
    path.write_bytes(
        lines("a") + b"\xff\xfe\n" + nested + digits + twice + b"{} {}\n" + b"nonsense\n" + b'{"a": \n' + lines("b")
    )
    assert outcome(path) == [
        "1:a",
        "2:not_utf8",
        "3:too_deep",
        "4:number_too_long",
        "5:duplicate_key",
        "6:two_values",
        "7:not_json",
        "8:not_json",
        "9:b",
    ]


def test_blank_lines_and_padding_are_counted_and_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + lines("a").replace(b"\n", b"\r\n") + b"  \n" + lines("b")[:-1] + b"\0" * 600)
    report = PreparationStats()
    assert outcome(path, report) == ["2:a", "4:b"]
    assert report.blank_lines == 2


def test_only_the_byte_n_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    path.write_text(json.dumps(record("a", text), ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    (conversation,) = read_conversations(read_local(path))
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0].content == text


def test_a_truncated_last_line_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = lines("a") + json.dumps(record("b", "谢谢"), ensure_ascii=False).encode()
    for cut in range(len(lines("a")) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert outcome(path) == ["1:a", "2:truncated_line"], cut
    path.write_bytes(whole)
    assert outcome(path) == ["1:a", "2:b"]


def test_a_line_without_end_is_skipped_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a") + b'{"id": "' + b"x" * 5_000_000 + b'"}\n' + lines("b"))
    assert outcome(path) == ["1:a", "2:line_too_long", "3:b"]


def test_a_string_of_fifty_megabytes_costs_less_memory_than_twice_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a") + b'{"id": "' + b"x" * 50_000_000 + b'"}\n' + lines("b"))
    tracemalloc.start()
    assert outcome(path) == ["1:a", "2:line_too_long", "3:b"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def test_reading_imports_nothing_heavy() -> None:
    heavy = "torch transformers hydra modelscope pyarrow zstandard datasets numpy"
    script = f"import sys, agentft.data.sources; print(set('{heavy}'.split()) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_a_foreign_encoding_is_named_as_a_whole(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a", "b").decode().encode(encoding))
    (rejection,) = read_conversations(read_local(path))
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "not_utf8"
    assert "UTF-" in rejection.detail
    assert "iconv" in rejection.detail


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_element_by_element(
    tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 50)
    path = tmp_path / "a.json"
    values = [record("a"), record("b", "谢" * 300), 7, record("c")]
    text = json.dumps(values, ensure_ascii=False, indent=indent)
    path.write_text(text, encoding="utf-8")
    assert outcome(path) == ["1:a", "2:b", "3:not_an_object", "4:c"]
    path.write_text(text[: text.rindex("assistant")], encoding="utf-8")
    assert outcome(path) == ["1:a", "2:b", "3:not_an_object", "4:not_json"]
    path.write_bytes(text.encode().replace("谢".encode(), b"\xff"))
    assert outcome(path) == ["1:a", "2:not_utf8", "3:not_an_object", "4:c"]


def test_a_json_file_may_hold_lines_or_one_object_or_several_pretty_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(lines("a") + b"broken\n" + lines("b"))
    assert outcome(path) == ["1:a", "2:not_json", "3:b"]
    path.write_text(json.dumps(record("a"), indent=2))
    assert outcome(path) == ["1:a"]
    path.write_text(json.dumps(record("a"), indent=2) + "\n" + json.dumps(record("b"), indent=2))
    assert outcome(path) == ["1:a", "2:b"]


def test_compressed_files_read_like_plain_ones_and_a_cut_one_keeps_what_came_before(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = lines(*(f"n{n}" for n in range(2_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        path = tmp_path / name
        assert len(outcome(path)) == 2_000
        path.write_bytes(path.read_bytes()[:-200])
        kept = outcome(path)
        assert kept[-1].split(":")[1] in ("broken_compression", "truncated_line")
        path.write_bytes(b"no archive")
        assert outcome(path) == ["1:broken_compression"]


def test_a_csv_holds_the_list_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "conversations"])
        writer.writerow(["a", repr(record("a", "line\nbreak, 'quote' \"twice\"")["conversations"])])
        writer.writerow(["b", json.dumps(record("b", "x" * 500_000)["conversations"])])
        writer.writerow(["only one field"])
        writer.writerow(["c", record("c")["conversations"]])
    assert outcome(path) == ["2:a", "3:b", "4:bad_csv", "5:c"]
    path.write_bytes(path.read_bytes() + b'd,"\xff"\n' + b'e,"never closed')
    assert outcome(path)[4:] == ["6:not_utf8", "7:bad_csv"]
    path.write_text("id,text\n1,2\n")
    assert outcome(path) == ["2:conversations_missing"]


def test_parquet_holds_lists_or_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [record(f"n{n}") for n in range(600)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert outcome(path) == [f"{n + 1}:n{n}" for n in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist([{"id": "t", "conversations": repr(rows[0]["conversations"])}]), path)
    assert outcome(path) == ["1:t"]
    path.write_bytes(path.read_bytes()[:-10])
    assert outcome(path) == ["1:broken_parquet"]


def test_a_folder_is_its_files_sorted_and_nothing_outside_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    outside = tmp_path / "secret.jsonl"
    outside.write_bytes(lines("secret"))
    (folder / "b.jsonl").write_bytes(lines("b"))
    (folder / "a.jsonl").write_bytes(lines("a"))
    (folder / "sub" / "c.jsonl").write_bytes(lines("c"))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n\n")
    (folder / "README.md").write_text("hello")
    (folder / ".cache" / "h.jsonl").write_bytes(lines("hidden"))
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "inner.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "pipe.jsonl")
    report = PreparationStats()
    assert outcome(folder, report) == [
        "1:a",
        "1:b",
        "0:empty_file",
        "0:empty_file",
        "1:duplicate",
        "0:link_out_of_folder",
        "0:not_a_file",
        "1:c",
    ]
    assert [Path(name).name for name in report.skipped_files] == ["README.md"]


def test_several_sources_keep_their_weights(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    (tmp_path / "b.jsonl").write_bytes(lines("b"))
    rows = read_local([WeightedPath(path=str(tmp_path / "a.jsonl"), weight=0.5), tmp_path / "b.jsonl"])
    assert [(item.id, item.weight) for item in read_conversations(rows)] == [("a", 0.5), ("b", 1.0)]


def test_a_source_that_is_not_there_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file or folder"):
        read_local([tmp_path / "a.jsonl", tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="no path"):
        read_local([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no record"),
        ("a.txt", b"x", "unknown kind of file"),
        ("a.csv", b"id,conversations\n", "holds no record"),
        ("a.json", b"[]", "holds no record"),
    ],
)
def test_a_source_without_a_record_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_local(path))
    assert str(path) in str(caught.value)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no"):
        list(read_local(folder))


def test_the_report_counts_what_became_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a", "a", "b") + b"nonsense\n")
    report = PreparationStats()
    outcome(path, report)
    assert (report.rows, report.kept) == (4, 2)
    assert report.rejected == {"duplicate": 1, "not_json": 1}
    assert report.notices == {"missing_system": 2}
    assert report.files == [str(path)]
    assert all(isinstance(row, (RawRow, Rejection)) for row in read_local(path))


def test_nulls_that_arrow_puts_into_structs_are_no_fields(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {
            "id": name,
            "messages": [
                {"role": "user", "content": f"q {name}"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
            ],
            "tools": [{"function": {"name": "f", "parameters": {"properties": {key: {"type": "string"}}}}}],
        }
        for name, key, arguments in (("a", "x", {"x": 1, "list": [None]}), ("b", "y", {"y": {"deep": "d"}}))
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [item for item in read_conversations(read_local(path)) if isinstance(item, Conversation)]
    assert [call.arguments for item in found for call in item.tool_calls] == [
        {"x": 1, "list": [None]},
        {"y": {"deep": "d"}},
    ]
    assert [tool.parameter_names for item in found for tool in item.offered] == [{"x"}, {"y"}]


def test_a_null_that_a_file_says_itself_is_an_argument(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    path = tmp_path / "a.ndjson"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (found,) = read_conversations(read_local(path))
    assert isinstance(found, Conversation)
    assert found.tool_calls[0].arguments == {"x": None}


@pytest.mark.parametrize("parts", [False, True], ids=["dataset", "dataset with splits"])
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, parts: bool) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([record(name, f"say {name}") for name in "abc"])
    saved = datasets.DatasetDict({"train": made.select([2, 0]), "test": made.select([1])}) if parts else made
    saved.save_to_disk(tmp_path / "saved")
    report = PreparationStats()
    assert outcome(tmp_path / "saved", report) == (["1:b", "1:c", "2:a"] if parts else ["1:a", "2:b", "3:c"])
    assert {Path(name).name for name in report.skipped_files} <= {
        "state.json",
        "dataset_info.json",
        "dataset_dict.json",
    }
    rows = [read_local(tmp_path / "saved", part=part) for part in ("train", "heldout") if parts]
    ids = [[item.id for item in read_conversations(each)] for each in rows]
    assert ids == ([["c", "a"], ["b"]] if parts else [])


def test_the_splits_of_a_snapshot_are_held_out_by_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001", "validation", "testimony")):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(f"r{number}"))
    assert [path.stem for path in heldout_files(tmp_path)] == ["test-00000-of-00001", "validation"]
    (tmp_path / "train-00000-of-00001.jsonl").rename(tmp_path / "data.jsonl")
    assert heldout_files(tmp_path) == [], "nothing there says that it is for training"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.arrow"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer"):
        list(read_local(tmp_path / name))
    (tmp_path / "b.jsonl").write_bytes(lines("b"))
    assert outcome(tmp_path) == ["0:git_lfs_pointer", "1:b"]


def test_names_that_are_noted_are_bounded() -> None:
    report = PreparationStats()
    for number in range(100):
        count_codes([f"column_not_used:{number}", "plain"], report.notices)
    assert len(report.notices) == 42
    assert report.notices["column_not_used:other_names"] == 60
    assert report.notices["plain"] == 100
