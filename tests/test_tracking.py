"""What was logged is read back: from metrics.jsonl, and from the records of a real offline W&B run."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentft.errors import ConfigError, RunError
from agentft.runs import RunFolder, read_json
from agentft.tracking import STEP, Tracker, TrackingConfig, TrackingMode, exit_code, read_metrics, resolve_mode

KEY = "sentinel0123456789abcdef0123456789abcdef"
TOKEN = "sentinel-ms'token\"7654321"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No network, no key of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "AGENTFT_SWEEP_DIR":
            monkeypatch.delenv(name)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


QUIET = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB__DISABLE_STATS": "true"}


class WandbRecords:
    """One `.wandb` file, read back by W&B's own `leet inspect`: the only place that knows how."""

    def __init__(self, file: Path) -> None:
        self.records = [json.loads(line) for line in self._inspect("--json", str(file)).splitlines()]
        self.overview: dict[str, Any] = json.loads(self._inspect("--summary", "--json", str(file)))

    @staticmethod
    def _inspect(*arguments: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows as they were logged, without W&B's own columns."""
        return [{k: v for k, v in each["item"].items() if not k.startswith("_")} for each in self.of("history")]


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/*.wandb"))


def files_that_hold(folder: Path, secret: str) -> list[Path]:
    """Searched byte by byte, names of files included."""
    needle = secret.encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if needle in path.read_bytes() or secret in str(path.relative_to(folder))]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that logs one of everything, and what W&B wrote of it."""
    folder = tmp_path_factory.mktemp("runs") / "with space 运行"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (QUIET | {"WANDB_API_KEY": KEY, "MODELSCOPE_API_TOKEN": TOKEN}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train.py", "model=tiny", f"+api_key={KEY}", f"tracking.run_name={TOKEN}"])
        config = TrackingConfig(project="laws", tags=["mine", "tiny"], run_name="")
        with RunFolder.create(folder) as run:
            run.write_record(config_yaml="a: 1\n", command=sys.argv, choices={"model": "tiny"}, extra={})
            tree = {"model": {"name": "tiny", "stop_token": "<end>"}, "hub": {"token": "abc"}, "note": f"x {KEY}"}
            names = {"group": "grid-1", "name": f"tiny_{TOKEN}", "tags": ["tiny", "lora", "x" * 80]}
            with Tracker(config, run, config_tree=tree, run_id="abc123", **names) as tracker:
                for step in (1, 2, 3):
                    tracker.log(
                        {"train/loss": [0.5, math.nan, math.inf][step - 1], "train/tokens": 10 * step}, step=step
                    )
                tracker.log({"eval/loss": 0.9, "eval/tool_name": 0.25, "eval/rouge_l": None}, step=2)
                tracker.log({"eval/loss": 1.1, "eval/tool_name": 0.20, "speed/tokens_per_second": 5.0}, step=3)
                rows = [{"id": "1", "answer": f"see {KEY}", "calls": [{"api_name": "天气"}]}, {"id": "2", "ok": False}]
                tracker.log_predictions("heldout", rows)
                run.write_json(run.data_manifest, {"rows": 3})
                (run.final / "子").mkdir(parents=True)
                (run.final / "子" / "adapter.bin").write_bytes(b"abc")
                tracker.artifact("data manifest", "dataset", run.data_manifest)
                tracker.artifact("adapter", "model", run.final)
                tracker.summary({"eval/best": 0.25, "memory_mb": math.nan})
                tracker.summary({"tokens": 60, "note": KEY})
            assert "WANDB_DATA_DIR" not in os.environ
            assert "WANDB_SILENT" not in os.environ
    files = wandb_files(folder)
    assert len(files) == 1
    return run, WandbRecords(files[0])


def test_the_run_is_filed_under_its_names(logged):
    _, wandb = logged
    (started,) = wandb.of("run")
    assert (started["run_id"], started["project"], started["run_group"]) == ("abc123", "laws", "grid-1")
    assert started["job_type"] == "train"
    assert started["display_name"] == "tiny_<redacted:MODELSCOPE_API_TOKEN>"
    assert started["resume"] is True
    assert sorted(wandb.overview["tags"]) == ["lora", "mine", "tiny", "x" * 63 + "…"]
    assert (wandb.overview["state"], wandb.overview["exit_code"]) == ("finished", 0)


def test_the_configuration_reaches_wandb_without_secrets(logged):
    run, wandb = logged
    config = wandb.overview["config"]
    assert config["model"] == {"name": "tiny", "stop_token": "<end>"}
    assert config["hub"] == {"token": "<redacted>"}
    assert config["note"] == "x <redacted:WANDB_API_KEY>"
    assert config["_agentft"]["choices"] == {"model": "tiny"}
    assert config["_agentft"]["run_dir"] == str(run.path)
    assert wandb.of("environment")[0]["args"] == [
        *("model=tiny", "+api_key=<redacted>", "tracking.run_name=<redacted:MODELSCOPE_API_TOKEN>")
    ]


def test_every_value_is_logged_with_its_step(logged):
    _, wandb = logged
    rows = wandb.history
    assert rows[:5] == [
        {STEP: 1, "train/loss": 0.5, "train/tokens": 10},
        {STEP: 2, "train/loss": "NaN", "train/tokens": 20},
        {STEP: 3, "train/loss": "Infinity", "train/tokens": 30},
        {STEP: 2, "eval/loss": 0.9, "eval/tool_name": 0.25},
        {STEP: 3, "eval/loss": 1.1, "eval/tool_name": 0.2, "speed/tokens_per_second": 5},
    ]
    axes = {each.get("glob_name") or each["name"]: each.get("step_metric") for each in wandb.of("metric")}
    assert axes == {STEP: None, **dict.fromkeys(("*", "eval/loss", "eval/tool_name"), STEP)}


def test_the_summary_has_the_best_and_the_last_score(logged):
    run, wandb = logged
    summary = wandb.overview["summary"]
    assert summary["eval/loss"] == {"min": 0.9, "last": 1.1}
    assert summary["eval/tool_name"] == {"max": 0.25, "last": 0.2}
    ours = {"eval/best": 0.25, "memory_mb": "nan", "tokens": 60, "note": "<redacted:WANDB_API_KEY>"}
    assert {key: summary[key] for key in ours} == ours
    assert read_json(run.summary_file) == ours


def test_predictions_become_a_table(logged):
    run, wandb = logged
    assert wandb.overview["summary"]["predictions/heldout"]["nrows"] == 2
    (file,) = run.wandb_dir.glob("offline-run-*/files/media/table/predictions/*.json")
    table = read_json(file)
    assert table["columns"] == ["id", "answer", "calls", "ok"]
    assert table["data"] == [
        ["1", "see <redacted:WANDB_API_KEY>", '[{"api_name": "天气"}]', None],
        ["2", None, None, False],
    ]


def test_artifacts_are_references_to_the_run_folder(logged):
    run, wandb = logged
    artifacts = {each["name"]: each for each in wandb.of("artifact")}
    (manifest,) = artifacts["data-manifest"]["manifest"]["contents"]
    assert manifest["ref"] == f"file://{run.data_manifest}"
    (adapter,) = artifacts["adapter"]["manifest"]["contents"]
    assert (adapter["path"], adapter["ref"]) == ("子/adapter.bin", f"file://{run.final}/子/adapter.bin")


def test_everything_of_wandb_lies_in_the_run_folder(logged):
    run, wandb = logged
    staged = [
        entry["local_path"]
        for each in wandb.of("artifact")
        for entry in each["manifest"]["contents"]
        if "local_path" in entry
    ]
    assert staged
    assert all(Path(path).is_relative_to(run.path) and Path(path).is_file() for path in staged)


def test_no_file_of_the_run_holds_a_secret(logged):
    run, _ = logged
    for secret in (KEY, TOKEN, TOKEN.partition("'")[0]):
        assert files_that_hold(run.path, secret) == []


def test_metrics_are_strict_json_and_read_back_as_numbers(logged):
    run, _ = logged
    for line in run.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    rows = read_metrics(run.metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 3, 2, 3]
    assert math.isnan(rows[1]["train/loss"])
    assert rows[2]["train/loss"] == math.inf
    assert rows[3]["eval/rouge_l"] is None
    assert rows[0].keys() == {"step", "time", "train/loss", "train/tokens"}


def test_a_failing_training_is_marked_failed_and_resumes_under_its_id(tmp_path, monkeypatch):
    sweep = tmp_path / "grid-7"
    monkeypatch.setenv("AGENTFT_SWEEP_DIR", str(sweep))
    config = TrackingConfig()

    def train(step: int, divisor: int) -> None:
        with Tracker(config, run, config_tree={"a": 1}, run_id="same") as tracker:
            tracker.log({"train/loss": 1 / step}, step=step)
            assert 1 / divisor

    with RunFolder.create(sweep / "0_tiny") as run:
        with pytest.raises(ZeroDivisionError):
            train(1, 0)
        train(2, 1)
    assert not run.wandb_dir.exists()  # jobs of a sweep share <sweep>/wandb
    first, second = (WandbRecords(file) for file in wandb_files(sweep))
    assert (first.overview["state"], first.overview["exit_code"]) == ("failed", 1)
    assert (second.overview["state"], second.overview["exit_code"]) == ("finished", 0)
    assert first.overview["run_id"] == second.overview["run_id"] == "same"
    assert first.of("run")[0]["run_group"] == "grid-7"
    assert [row[STEP] for row in first.history + second.history] == [1, 2]
    assert [row["step"] for row in read_metrics(run.metrics_file)] == [1, 2]


CRASH = """
import logging, os, sys
from agentft.runs import RunFolder
from agentft.secrets import install_log_redaction
from agentft.tracking import Tracker, TrackingConfig
install_log_redaction()
key, token = os.environ["WANDB_API_KEY"], os.environ["MODELSCOPE_API_TOKEN"]
with RunFolder.create(sys.argv[1]) as run:
    logging.basicConfig(filename=run.log_file, level=logging.DEBUG)
    run.write_record(config_yaml=f"note: {key}\\n", command=sys.argv, choices=None, extra={"token": token})
    tree = {"key": key, "note": token}
    with Tracker(TrackingConfig(run_name=token), run, config_tree=tree, run_id="x", tags=[key]) as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
        logging.info("key %s", key)
        try:
            raise ValueError(f"refused {token}")
        except ValueError as error:
            run.update_status("failed", error=str(error))
            logging.exception("crash with %s", key)
            raise RuntimeError(f"cannot go on with {key}") from error
"""


def test_a_crash_leaves_no_secret_in_any_file_or_output(tmp_path):
    environ = os.environ | {"WANDB_API_KEY": KEY, "MODELSCOPE_API_TOKEN": TOKEN}
    command = [sys.executable, "-c", CRASH, str(tmp_path / "run"), f"+api_key={KEY}", f"--token={TOKEN}"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: cannot go on with <redacted:WANDB_API_KEY>" in done.stderr
    for secret in (KEY, TOKEN, "sentinel-ms"):
        assert secret not in done.stdout + done.stderr
        assert files_that_hold(tmp_path, secret) == []
    log = (tmp_path / "run" / "train.log").read_text()
    assert "ValueError: refused <redacted:MODELSCOPE_API_TOKEN>" in log
    (file,) = wandb_files(tmp_path / "run")
    assert WandbRecords(file).overview["state"] == "failed"


ALONE = """
import os, signal, subprocess, sys, time
from agentft.runs import RunFolder
from agentft.tracking import Tracker, TrackingConfig, TrackingMode
with RunFolder.create(sys.argv[1]) as run:
    with Tracker(TrackingConfig(mode=TrackingMode(sys.argv[2])), run, config_tree={}, run_id="x") as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
        if sys.argv[3] == "kill":
            for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                assert "wandb-core" in open(f"/proc/{child}/cmdline").read()
                os.kill(int(child), signal.SIGKILL)
            time.sleep(0.3)
        for step in range(2, 6):
            tracker.log({"train/loss": 1.0}, step=step)
        tracker.log_predictions("heldout", [{"a": 1}])
        tracker.summary({"tokens": 3})
print(tracker.mode)
"""


def test_training_outlives_the_helper_process_of_wandb(tmp_path):
    command = [sys.executable, "-c", ALONE, str(tmp_path / "run"), "offline", "kill"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5
    assert read_json(tmp_path / "run" / "summary.json") == {"tokens": 3}
    assert "W&B: log failed: ConnectionResetError" in done.stderr
    assert "W&B logging disabled" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_answer_means_offline_and_no_leak(tmp_path):
    with socket.socket() as taken:  # bound but not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        server = {"WANDB_BASE_URL": f"http://127.0.0.1:{taken.getsockname()[1]}", "WANDB_INIT_TIMEOUT": "1"}
        command = [sys.executable, "-c", ALONE, str(tmp_path / "run"), "online", "live"]
        environ = os.environ | server | {"WANDB_API_KEY": KEY}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "offline\n"
    assert "W&B logs offline from here; upload later with: wandb sync" in done.stderr
    assert KEY not in done.stderr
    assert files_that_hold(tmp_path, KEY) == []
    (file,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    assert [row[STEP] for row in WandbRecords(file).history] == [1, 2, 3, 4, 5, 5]


def test_without_wandb_the_files_are_written_and_wandb_is_not_imported(tmp_path):
    script = (
        "import sys\nfrom agentft.runs import RunFolder\nfrom agentft.tracking import *\n"
        "with RunFolder.create(sys.argv[1]) as run:\n"
        "    with Tracker(TrackingConfig(mode=TrackingMode.disabled), run, config_tree={}, run_id='x') as tracker:\n"
        "        tracker.log({'eval/loss': 1.0}, step=1)\n        tracker.artifact('a', 'b', run.final)\n"
        "assert not {'wandb', 'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True, timeout=60)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert not (tmp_path / "run" / "wandb").exists()


def test_other_ranks_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "run")
    config = TrackingConfig(mode=TrackingMode.online)  # without a key: only rank 0 would refuse
    with Tracker(config, run, config_tree={}, run_id="x", enabled=False) as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
        tracker.rewind(0)
        tracker.summary({"a": 1})
        tracker.log_predictions("heldout", [{"a": 1}])
        tracker.artifact("a", "b", run.final)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def local(tmp_path):
    """A tracker without W&B."""

    def make() -> Tracker:
        return Tracker(TrackingConfig(mode=TrackingMode.disabled), RunFolder(tmp_path), config_tree={}, run_id="x")

    return make


def test_nothing_is_lost_in_silence_outside_the_block(local):
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        local().log({"train/loss": 1.0}, step=1)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(143), 143),
        (SystemExit("no"), 1),
        (KeyboardInterrupt(), 130),
        (ValueError(), 1),
    ],
)
def test_wandb_is_told_how_the_process_ends(error, code):
    assert exit_code(None if error is None else type(error), error) == code


def test_a_full_disk_is_named(local, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with local() as tracker:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
            tracker.log({"train/loss": 1.0}, step=1)
        monkeypatch.undo()


def test_a_resumed_run_measures_the_lost_steps_again(local, tmp_path):
    with local() as tracker:
        for step in (1, 2, 3, 4):
            tracker.log({"train/loss": 1.0 / step}, step=step)
    with local() as tracker:
        tracker.rewind(2)
        tracker.log({"train/loss": 0.1}, step=3)
        tracker.rewind(3)  # nothing is later
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl.rewound")] == [3, 4]


def test_a_half_line_is_left_out_by_readers_and_cut_off_by_the_next_run(local, tmp_path, caplog):
    with local() as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 2, "tr')
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_metrics(file)] == [1]
    assert "unfinished" in caplog.text
    with local() as tracker:
        tracker.log({"train/loss": 1.0}, step=2)
    assert [row["step"] for row in read_metrics(file)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_killed_process_loses_no_line(tmp_path):
    script = (
        "import sys, time\nfrom agentft.runs import RunFolder\nfrom agentft.tracking import *\n"
        "config = TrackingConfig(mode=TrackingMode.disabled)\n"
        "with Tracker(config, RunFolder(sys.argv[1]), config_tree={}, run_id='x') as tracker:\n"
        "    for step in range(1, 501):\n        tracker.log({'train/loss': 1.0}, step=step)\n"
        "    print('done', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 500


def test_scores_are_on_disk_before_training_goes_on(local, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with local() as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
        assert synced == []
        tracker.log({"eval/loss": 1.0}, step=1)
        assert len(synced) == 1


@pytest.mark.parametrize(
    ("mode", "environ", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_mode_follows_settings_environment_and_keys(tmp_path, mode, environ, expected):
    found = resolve_mode(TrackingConfig(mode=TrackingMode(mode)), environ | {"HOME": str(tmp_path)})
    assert found == expected


def test_a_key_in_netrc_counts_for_its_own_server_only(tmp_path):
    home = {"HOME": str(tmp_path)}
    (tmp_path / ".netrc").write_text("machine wandb.example.org:8080 login user password 0123456789\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode(TrackingConfig(), home) == "offline"
    assert resolve_mode(TrackingConfig(), home | {"WANDB_BASE_URL": "http://wandb.example.org:8080"}) == "online"
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://wandb.example.org:8080\n")
    assert resolve_mode(TrackingConfig(), home) == "online"


@pytest.mark.parametrize(("mode", "named"), [("online", None), ("auto", "online"), ("auto", "sometimes")])
def test_a_mode_that_cannot_work_is_refused_before_training(tmp_path, mode, named):
    environ = {"HOME": str(tmp_path)} | ({"WANDB_MODE": named} if named else {})
    with pytest.raises(
        ConfigError, match=r"no key for https://api.wandb.ai: set WANDB_API_KEY|expected online, offline"
    ):
        resolve_mode(TrackingConfig(mode=TrackingMode(mode)), environ)
