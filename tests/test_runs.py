"""One writer, whole files, strict JSON, and a folder that says where it comes from."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agentft import runs
from agentft.errors import RunError
from agentft.runs import RunFolder, git_state, json_text, read_json

KEY = "sentinel-0123456789abcdef"

HOLD = """
import sys, time
from agentft.runs import RunFolder
run = RunFolder.create(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_has_the_folder(holder, tmp_path):
    with pytest.raises(RunError, match=rf"in use by process {holder.pid} on \S+, started 2\S+; .*choose another"):
        RunFolder.create(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunFolder.create(tmp_path / "run").release()


def test_the_same_process_cannot_take_a_folder_twice(tmp_path):
    with RunFolder.create(tmp_path / "run"), pytest.raises(RunError, match=f"process {os.getpid()} "):
        RunFolder.create(tmp_path / "run")
    RunFolder.create(tmp_path / "run").release()


def test_a_worker_that_outlives_its_parent_does_not_keep_the_folder(tmp_path):
    script = (
        "import os, sys, time\nfrom agentft.runs import RunFolder\nRunFolder.create(sys.argv[1])\n"
        "pid = os.fork()\nif pid == 0:\n    os.close(1)\n    time.sleep(30)\n    os._exit(0)\n"
        "print(pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, timeout=60
    )
    worker = int(done.stdout)
    try:
        deadline = time.monotonic() + 10
        while True:  # the worker needs a moment to run its first line
            try:
                RunFolder.create(tmp_path / "run").release()
                break
            except RunError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_parent_keeps_the_folder_when_a_child_is_forked(tmp_path):
    with RunFolder.create(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RunError, match="in use"):
            RunFolder.create(tmp_path / "run")


def test_opening_names_what_is_missing_and_changes_nothing(tmp_path):
    with pytest.raises(RunError, match="nowhere is not a run folder: config.yaml and run.json not there; expected"):
        RunFolder.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is not a run folder"):
        RunFolder.open(tmp_path / "file")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(RunError, match="config.yaml and run.json not there"):
        RunFolder.open(folder)
    (folder / "config.yaml").write_text("")
    with pytest.raises(RunError, match="not a run folder: run.json not there"):
        RunFolder.open(folder)
    (folder / "run.json").write_text("{}")
    assert RunFolder.open(folder).path == folder
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml", "run.json"]


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["with space", "运行-ü", "deep/er/than/that"])
def test_odd_folder_names_work(tmp_path, name):
    with RunFolder.create(tmp_path / name) as run:
        run.update_status("running")
        assert read_json(run.status_file)["state"] == "running"


def test_a_relative_folder_stays_the_same_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder.create("run") as run:
        monkeypatch.chdir("/")
        run.update_status("running")
    assert (tmp_path / "run" / "status.json").is_file()


def test_opened_folders_take_results_but_no_record(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(RunError, match="opened to read"):
        run.update_status("running")
    with pytest.raises(RunError, match="opened to read"):
        run.write_record(config_yaml="", command=[], choices=None, extra={})
    run.write_json(run.metrics("heldout"), {"rouge_l": 0.5})
    assert read_json(tmp_path / "metrics" / "heldout.json") == {"rouge_l": 0.5}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_names_of_results_stay_inside_the_folder(tmp_path, name):
    with pytest.raises(RunError, match="cannot name a file"):
        RunFolder(tmp_path).predictions(name)


class BrokenDiskError(RuntimeError):
    pass


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    run = RunFolder(tmp_path)
    run.write_text(run.summary_file, "old")

    def fail(*_args, **_kwargs):
        raise BrokenDiskError

    monkeypatch.setattr(Path if broken == "replace" else os, broken, fail)
    with pytest.raises(BrokenDiskError):
        run.write_text(run.summary_file, "new" * 100_000)
    monkeypatch.undo()
    assert run.summary_file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_what_cannot_be_written_as_json_touches_no_file(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        run.write_json(run.summary_file, {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path):
    script = (
        "import sys\nfrom agentft.runs import RunFolder\nrun = RunFolder(sys.argv[1])\nprint('on', flush=True)\nn = 0\n"
        "while True:\n    n += 1\n    value = {'n': n, 'fill': ['x' * 50] * (n * 37 % 4000), 'end': n}\n"
        "    run.write_json(run.summary_file, value)"
    )
    run = RunFolder(tmp_path)
    for trial in range(5):
        writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(5):
            time.sleep(0.007 + 0.003 * trial)
            if run.summary_file.exists():
                value = read_json(run.summary_file)
                assert value["n"] == value["end"]
        writer.kill()
        writer.wait()
        writer.stdout.close()
        value = read_json(run.summary_file)
        assert value["n"] == value["end"]


def test_files_get_the_permissions_of_ordinary_files(tmp_path):
    run = RunFolder(tmp_path)
    run.write_text(run.config_file, "a: 1")
    (tmp_path / "ordinary").write_text("")
    assert run.config_file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_json_is_strict_and_takes_what_a_run_has():
    class Colour(enum.StrEnum):
        red = "r"

    @dataclasses.dataclass
    class Point:
        x: float
        where: Path

    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "number": np.float32(0.5),
        "count": np.int64(3),
        "bad": np.float64("nan"),
        "point": Point(1.0, Path("a")),
        "colour": Colour.red,
        "set": {2, 1},
        "words": "工具\ud800",
        3: None,
        "yes": True,
    }
    text = json_text(value)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "nan": "nan",
        "inf": ["inf", "-inf"],
        "number": 0.5,
        "count": 3,
        "bad": "nan",
        "point": {"x": 1.0, "where": "a"},
        "colour": "r",
        "set": [1, 2],
        "words": "工具\ud800",
        "3": None,
        "yes": True,
    }


def test_a_lone_surrogate_does_not_cost_the_file(tmp_path):
    run = RunFolder(tmp_path)
    run.write_json(run.summary_file, {"answer": "a\ud800工"})
    assert read_json(run.summary_file) == {"answer": "a\ud800工"}
    assert "工" in run.summary_file.read_text(encoding="utf-8")


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(RunError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_status_keeps_what_was_said_before_and_starts_anew_in_another_process(tmp_path):
    with RunFolder.create(tmp_path) as run:
        run.update_status("running", step=3, steps=10, loss=math.nan)
        run.update_status("running", step=4)
        status = read_json(run.status_file)
        assert (status["state"], status["step"], status["steps"], status["loss"]) == ("running", 4, 10, "nan")
        assert status["pid"] == os.getpid()
        assert status["started"] <= status["updated"]
        run.write_json(run.status_file, status | {"pid": 1, "error": "killed"})
        run.update_status("finished")
        assert read_json(run.status_file).keys() == {"state", "pid", "host", "started", "updated"}


def test_the_record_says_where_the_run_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("AGENTFT_SWEEP_DIR", str(tmp_path / "sweep"))
    with RunFolder.create(tmp_path / "run") as run:
        for attempt in (1, 2):
            run.write_record(
                config_yaml=f"model: tiny\nnote: {KEY}\n",
                command=["train.py", "model=tiny", f"+api_key={KEY}", f"run_name={KEY}"],
                choices={"model": "tiny"},
                extra={"devices": ["cpu"], "threads": 2, "attempt": attempt},
            )
        record = read_json(run.record_file)
    assert run.config_file.read_text() == "model: tiny\nnote: <redacted:WANDB_API_KEY>\n"
    assert record["command"] == ["train.py", "model=tiny", "+api_key=<redacted>", "run_name=<redacted:WANDB_API_KEY>"]
    assert record["packages"]["numpy"] == np.__version__
    assert record["sweep"] == str(tmp_path / "sweep")
    assert (record["devices"], record["threads"], record["attempt"]) == (["cpu"], 2, 2)
    assert record["cpu"]["cores"] >= 1
    assert record["started"].endswith("+00:00")
    assert record["git"].keys() >= {"revision", "dirty"}
    assert [earlier["attempt"] for earlier in record["earlier"]] == [1]
    assert "earlier" not in record["earlier"][0]
    assert RunFolder.open(tmp_path / "run").path == tmp_path / "run"
    assert KEY not in run.record_file.read_text()


def test_what_agentft_records_itself_cannot_be_given(tmp_path):
    with RunFolder.create(tmp_path) as run, pytest.raises(ValueError, match="git is recorded by agentft itself"):
        run.write_record(config_yaml="", command=[], choices=None, extra={"git": "x"})


def test_git_state_is_that_of_the_repository_that_tracks_agentft(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    module = tmp_path / "agentft" / "runs.py"
    module.parent.mkdir()
    module.write_text("1")
    (tmp_path / "other").write_text("1")
    monkeypatch.setattr(runs, "__file__", str(module))
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "only another project's file")
    assert git_state()["revision"] is None
    assert "did not match any file" in git_state()["reason"], "as git says"
    git("add", ".")
    git("commit", "-qm", "all")
    assert git_state() == {"revision": git("rev-parse", "HEAD").strip(), "dirty": False, "changed": []}
    module.write_text("2")
    assert git_state()["changed"] == [" M agentft/runs.py"]
    assert git_state()["dirty"] is True
    if os.geteuid() == 0:
        for path in (tmp_path, tmp_path / ".git"):
            os.chown(path, 12345, 12345)
        assert git_state()["revision"], "of a clone that another user owns"


def test_every_path_of_a_run_folder_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "run_folder.md").read_text(encoding="utf-8")
    listed = {name: path for path, name in re.findall(r"^\| `([^`]+)`[^|]* \| `([^`]+)` \|", page, re.MULTILINE)}
    run = RunFolder("/run")
    actual = {
        name: str(path.relative_to("/run"))
        for name, path in vars(run).items()
        if isinstance(path, Path) and path != run.path
    }
    for name in ("predictions", "metrics"):
        actual[f"{name}(name)"] = str(getattr(run, name)("<name>").relative_to("/run"))
    actual["rank_log(rank)"] = str(run.rank_log(1).parent.relative_to("/run"))
    assert {name: path.rstrip("/") for name, path in listed.items()} == actual
