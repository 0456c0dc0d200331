"""The sweep launcher: jobs that die in every way cost only themselves, and the same command again does only what is left.

Most tests launch a small program of their own: the launcher starts whatever program it was started from.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from agentft.compare import main as compare
from agentft.errors import ConfigError, RunError
from agentft.sweeping.jobs import Job, config_hash, short_override, varying
from agentft.sweeping.launcher import outcome_of
from agentft.sweeping.runner import make_slots, visible_gpus
from tests.sweeping.watching import is_alive, wait_for

REPOSITORY = Path(__file__).parents[2]


# --- A job that dies costs only itself ---


def test_every_death_is_survived_and_named_and_the_same_command_does_only_what_is_left(sweep: Any) -> None:
    overrides = ["act=ok,raise,kill,exit,quiet_exit,memory", "hydra.launcher.slots=2"]
    done = sweep.launch(*overrides)
    assert done.returncode == 1
    jobs = sweep.jobs()
    assert [jobs[i]["state"] for i in range(6)] == ["finished", *["failed"] * 5]
    assert jobs[1]["reason"] == "exit code 1: ValueError: a broken thing"
    assert (jobs[2]["reason"], jobs[2]["signal"]) == ("killed by SIGKILL (out of memory?)", "SIGKILL")
    assert (jobs[3]["reason"][:11], jobs[3]["exit_code"]) == ("exit code 3", 3)
    assert jobs[4]["reason"] == "exit code 0: SystemExit: 0"
    assert "MemoryError" in jobs[5]["reason"]
    assert all(job["started"] < job["ended"] for job in jobs.values())
    assert "5 of 6 jobs are not finished" in done.stderr
    assert "5 of 6 jobs failed" in done.stderr.splitlines()[-1], "the last word, also for a caller that sees only that"
    assert "ValueError: a broken thing" in (sweep.folder / "out/1/job.log").read_text()
    rows = (sweep.folder / "out/sweep.csv").read_text().splitlines()
    assert len(rows) == 7
    assert "| failed |" in (sweep.folder / "out/sweep.md").read_text()

    (sweep.folder / "mended").touch()
    done = sweep.launch(*overrides)
    assert done.returncode == 0, done.stderr
    jobs = sweep.jobs()
    assert [jobs[i]["state"] for i in range(6)] == ["finished"] * 6
    assert [jobs[i]["attempts"] for i in range(6)] == [1, 2, 2, 2, 2, 2]

    done = sweep.launch("act=raise,ok,kill", "seconds=0.0")
    assert done.returncode == 0
    assert "sweep of 3 jobs, 3 finished before" in done.stderr, "what counts are the settings, not the numbers"
    assert sweep.jobs()[1]["attempts"] == 2


def test_the_printed_command_runs_one_job_alone_and_the_sweep_then_leaves_it_alone(sweep: Any) -> None:
    done = sweep.launch("act=ok,raise")
    (command,) = re.findall(r"alone: (.*)", done.stderr)
    (sweep.folder / "mended").touch()
    subprocess.run(command, shell=True, cwd=sweep.folder, env=sweep.environment, check=True, timeout=60)
    (again,) = re.findall(r"run only these again: (.*)", done.stderr)
    done = subprocess.run(
        again,
        shell=True,
        cwd=sweep.folder,
        env=sweep.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "2 finished before" in done.stderr
    assert sweep.jobs()[1]["attempts"] == 1


def test_a_job_is_tried_again_as_often_as_asked(sweep: Any) -> None:
    done = sweep.launch("act=flaky,raise", "hydra.launcher.retry=1")
    assert done.returncode == 1
    jobs = sweep.jobs()
    assert [(jobs[i]["state"], jobs[i]["attempts"]) for i in range(2)] == [("finished", 2), ("failed", 2)]
    assert "(attempt 2)" in done.stderr
    assert jobs[0]["seconds_in_all"] > jobs[0]["seconds"] > 0, "the table tells what a run took, not what its end took"


def test_a_job_over_its_time_limit_is_ended_with_all_it_started(sweep: Any) -> None:
    done = sweep.launch("act=sleep,stubborn,ok", *LIMIT)
    assert done.returncode == 1
    jobs = sweep.jobs()
    assert [jobs[i]["state"] for i in range(3)] == ["failed", "failed", "finished"]
    assert jobs[0]["reason"] == "time limit of 0.05 minutes"
    assert (sweep.folder / "out/0/asked").exists(), "asked as by Ctrl-C first"
    assert jobs[1]["signal"] == "SIGKILL"
    for number in (0, 1):
        for pid in (sweep.folder / f"out/{number}/pids").read_text().split():
            assert not is_alive(int(pid))


LIMIT = ["hydra.launcher.time_limit=0.05", "hydra.launcher.grace=1", "hydra.launcher.slots=3"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_the_launcher_leaves_no_child_alive(sweep: Any, number: signal.Signals, code: int | None) -> None:
    launcher = sweep.start("act=sleep,stubborn,ok", "hydra.launcher.slots=2", "hydra.launcher.grace=1.5")
    pids = [sweep.folder / f"out/{i}/pids" for i in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text().count(" ") for path in pids))
    launcher.send_signal(number)
    _, output = launcher.communicate(timeout=30)
    assert launcher.returncode == code if code is not None else launcher.returncode != 0
    assert not any(is_alive(int(pid)) for path in pids for pid in path.read_text().split())
    jobs = sweep.jobs()
    assert [jobs[i]["state"] for i in range(3)] == ["stopped", "stopped", "waiting"]
    assert jobs[0]["reason"] == f"stopped by {number.name}"
    assert "3 of 3 jobs are not finished" in output


@pytest.mark.parametrize(("number", "saved"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_repeated_signal_lets_jobs_save_and_only_a_second_ctrl_c_ends_them_at_once(
    sweep: Any, number: signal.Signals, saved: bool
) -> None:
    """Schedulers repeat themselves; a person who presses Ctrl-C again does not want to wait."""
    launcher = sweep.start("act=slow_save,ok", "hydra.launcher.grace=60", "hydra.launcher.slots=1")
    folder = sweep.folder / "out/0"
    wait_for((folder / "pids").exists)
    launcher.send_signal(number)
    wait_for((folder / "asked").exists)
    launcher.send_signal(number)
    if saved:
        (sweep.folder / "go").touch()
    _, text = launcher.communicate(timeout=30)
    assert (folder / "saved").exists() == saved, text
    job = sweep.jobs()[0]
    assert (job["state"], job["reason"]) == ("stopped", f"stopped by {number.name}")
    assert job["signal"] in (["SIGINT"] if saved else ["SIGTERM", "SIGKILL"])
    assert "2 of 2 jobs are not finished" in text, "the report is printed all the same"


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_a_sweep_outlives_its_console(sweep: Any, output: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") if output == "closed pipe" else Path("/dev/full").open("wb") as out:
        done = subprocess.run(
            sweep.command("act=ok,raise"), cwd=sweep.folder, env=sweep.environment, stdout=out, stderr=out, check=False
        )
    assert done.returncode == 1  # of the job that raises
    assert [sweep.jobs()[i]["state"] for i in range(2)] == ["finished", "failed"]
    assert len((sweep.folder / "out/sweep.csv").read_text().splitlines()) == 3


def test_a_closed_terminal_stops_the_sweep_and_leaves_no_child_alive(sweep: Any) -> None:
    """With the live table on it."""
    command = sweep.command("act=sleep", "text=a,b", "hydra.launcher.slots=2")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(sweep.folder)
        os.execve(command[0], command, sweep.environment)
    while len(list(sweep.folder.glob("out/*/pids"))) < 2:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    pids = [int(word) for path in sweep.folder.glob("out/*/pids") for word in path.read_text().split()]
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert [(job["state"], job["reason"]) for job in sweep.jobs().values()] == [("stopped", "stopped by SIGHUP")] * 2
    wait_for(lambda: not any(is_alive(each) for each in pids))


def test_one_launcher_at_a_time_works_in_a_sweep_folder(sweep: Any) -> None:
    first = sweep.start("act=sleep", "hydra.launcher.grace=1")
    wait_for((sweep.folder / "out/0/pids").exists)
    second = sweep.launch("act=sleep")
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=30)
    assert second.returncode == 1
    assert re.search(r"out is in use by process \d+ on .*; wait .* or choose another hydra\.sweep\.dir", second.stderr)


# --- What a job is given ---


def test_values_and_folders_reach_the_job_as_they_were_typed(sweep: Any) -> None:
    texts = ["a b", "a=b", "a,b", 'say "Grüße" 你好', "it's", "[x]{y: 1}", "back\\slash", "null"]
    quoted = ",".join('"' + text.replace('"', '\\"') + '"' for text in texts)
    out = "an out, with=ümlaut"
    done = sweep.launch(
        f"text={quoted}", "hydra.sweep.dir='an out, with=ümlaut'", "hydra.launcher.slots=4", out="unused"
    )
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in sweep.seen(out)] == texts
    assert {row["AGENTFT_SWEEP_DIR"] for row in sweep.seen(out)} == {str(sweep.folder / out)}
    words = done.stderr.splitlines()
    assert any(line.startswith("sweep folder: an out, with=ümlaut") for line in words)


def test_running_jobs_never_share_a_gpu(sweep: Any) -> None:
    done = sweep.launch(
        "seconds=0.3,0.31,0.32,0.33,0.34", "hydra.launcher.gpus_per_job=2", CUDA_VISIBLE_DEVICES="3,7,GPU-ab,1,5"
    )
    assert done.returncode == 0, done.stderr
    assert "2 at a time, each with 2 GPU(s)" in done.stderr
    rows = sweep.seen()
    assert {row["CUDA_VISIBLE_DEVICES"] for row in rows} == {"3,7", "GPU-ab,1"}
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            if one["CUDA_VISIBLE_DEVICES"] == other["CUDA_VISIBLE_DEVICES"]:
                assert one["ended"] <= other["began"] or other["ended"] <= one["began"]


def test_cores_are_shared_out_among_slots() -> None:
    assert [(slot.gpus, slot.threads) for slot in make_slots(None, 1, None, [], cores=8)] == [(None, 8)]
    assert [slot.threads for slot in make_slots(3, 1, None, [], cores=8)] == [2, 2, 2]
    assert [slot.threads for slot in make_slots(None, 1, 4, [], cores=8)] == [4, 4]
    on_gpus = make_slots(None, 2, None, ["0", "1", "2", "3", "4"], cores=8)
    assert [(slot.gpus, slot.threads) for slot in on_gpus] == [(("0", "1"), 4), (("2", "3"), 4)]
    assert make_slots(2, 0, None, ["0"], cores=8)[1].environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in make_slots(1, 1, None, [], cores=8)[0].environment()


@pytest.mark.parametrize(
    ("slots", "gpus_per_job", "gpus", "words"),
    [
        (3, 1, ["0", "1"], "3 slot.*but 2 GPU"),
        (None, 3, ["0", "1"], "3 GPU.* each"),
        (None, 2, [], "no GPU is visible"),
    ],
)
def test_more_than_there_is_is_refused(slots: int | None, gpus_per_job: int, gpus: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_slots(slots, gpus_per_job, None, gpus, cores=4)


def test_visible_gpus_are_those_of_the_environment() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-8a,-1,5"}) == ["2", "GPU-8a"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1c)\nGPU 1: NVIDIA H200 (UUID: GPU-2d)\n", ["0", "1"]),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1c)\n  MIG 1g.18gb Device 0: (UUID: MIG-a1)\n", ["MIG-a1"]),
        ("", []),
    ],
)
def test_gpus_and_their_parts_are_found_without_torch(
    listed: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus({}) == found


# --- Small laws ---


def test_a_sweeper_gets_the_objective_of_a_finished_job_and_the_error_of_a_failed_one(tmp_path: Path) -> None:
    job = Job(folder=tmp_path, number=0, config_hash="x", overrides=["a=1"], swept=[], settings={}, threads=1)
    composed = OmegaConf.create({"a": 1, "hydra": {"job": {"num": 0}}})
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "objective": 0.5}))
    job.state = "finished"
    assert outcome_of(job, composed.copy(), [], 1).return_value == 0.5
    job.state, job.reason = "failed", "exit code 1"
    outcome = outcome_of(job, composed.copy(), [job], 1)
    assert outcome.status == JobStatus.FAILED
    with pytest.raises(RunError, match="1 of 1 jobs failed: .*: exit code 1"):
        _ = outcome.return_value


def test_the_config_hash_is_of_what_a_job_computes_and_not_where() -> None:
    settings = {
        "rank": 4,
        "run_dir": "runs/a",
        "output_dir": "runs",
        "tracking": {"mode": "offline"},
        "dataset": {"a": 1},
    }
    elsewhere = settings | {"run_dir": "runs/b", "output_dir": "/tmp", "tracking": {"mode": "disabled"}}
    elsewhere["dataset"] = {"a": 1, "cache": False}
    assert config_hash(settings) == config_hash(elsewhere)
    assert config_hash(settings) != config_hash(settings | {"rank": 8})


def test_swept_are_the_overrides_in_which_jobs_differ() -> None:
    assert varying([["a=1", "c=3"], ["a=2", "c=3"]]) == [["a=1"], ["a=2"]]
    assert varying([["a=1"]]) == [["a=1"]]


def test_a_live_table_names_settings_shortly_and_values_whole() -> None:
    assert short_override("training.learning_rate=0.001") == "learning_rate=0.001"
    assert short_override("+dataset.path=../a.b/c.jsonl") == "path=../a.b/c.jsonl"


# --- The real program ---

TINY = [
    *("model=tiny", "tracking=disabled", "dataset.conversations=8", "dataset.heldout=2", "dataset.max_length=8192"),
    *(
        "training.gradient_accumulation_steps=2",
        "training.logging_steps=1",
        "evaluation.before=false",
        "evaluation.max_new_tokens=4",
    ),
    *("evaluation.eval_steps=0", "evaluation.bootstrap_samples=100"),
]


@pytest.mark.parametrize("ranks", [(4,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["two", "two by two"])
def test_train_py_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: tuple[int, ...]) -> None:
    small = [*TINY, "training.max_steps=2", "hydra.launcher.slots=2"]
    grid = [f"sft_type.rank={','.join(map(str, ranks))}", "training.learning_rate=1e-3,1e-2"]
    command = [sys.executable, str(REPOSITORY / "train.py"), "-m", *grid, *small, "hydra.sweep.dir=sweep"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "grp.py").write_text("raise SystemExit('a file of the working directory was executed')")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/job.json"))
    swept = ["rank-2_", "rank-4_"] if len(ranks) > 1 else [""]
    names = [f"{rank}learning_rate-{rate}" for rank in swept for rate in ("0.001", "0.01")]
    assert [folder.name for folder in folders] == [f"{number}_{name}" for number, name in enumerate(names)]
    for folder in folders:
        assert json.loads((folder / "run.json").read_text())["sweep"] == str(tmp_path / "sweep")
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "sweep" / "sweep.md").read_text().count("\n| ") == len(names) + 1
    last = folders[-1].name
    alone = json.loads((folders[-1] / "job.json").read_text())["shell"].replace(f"sweep/{last}", f"alone/{last}")
    subprocess.run(alone, shell=True, cwd=tmp_path, env=environment, capture_output=True, timeout=200, check=True)
    weights = [tmp_path / where / last / "final" / "adapter_model.safetensors" for where in ("sweep", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes(), (
        "an interpreter of its own comes to the same, bit for bit"
    )
    assert compare([str(tmp_path / "sweep")]) == 0
    assert "best" in capsys.readouterr().out

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"sweep of {len(names)} jobs, {len(names)} finished before" in done.stderr


DEATHS = """
import os, resource, signal, sys

def die(*_):
    seed = next((int(word[5:]) for word in sys.argv if word.startswith("seed=") and word[5:].isdigit()), None)
    if "hydra.mode=RUN" not in sys.argv or os.path.exists("mended"):
        return
    if seed in (4, 15):
        raise RuntimeError("injected")
    if seed in (8, 19):
        sys.exit(3)
    if seed == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 23:
        resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
        bytearray(2**30)

def arm():
    signal.signal(signal.SIGPROF, die)
    signal.setitimer(signal.ITIMER_PROF, 1.5)

os.register_at_fork(after_in_child=arm)
"""
"""Python runs `sitecustomize.py` at its start, in the process that jobs are forked from too: after 1.5 s of CPU time six
of 24 jobs die by exception, exit, SIGKILL or want of memory."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_chaos_of_24_real_jobs_loses_six_names_six_and_repeats_six(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DEATHS)
    steady = [
        "training.max_steps=40",
        "hydra.launcher.slots=2",
        "hydra.launcher.threads_per_job=1",
        "hydra.sweep.dir=sweep",
    ]
    command = [sys.executable, str(REPOSITORY / "train.py"), "-m", "seed=range(24)", *TINY, *steady]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    first = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700, check=False
    )
    records = {path.parent: json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/job.json")}
    failed = {record["number"]: record["reason"] for record in records.values() if record["state"] == "failed"}
    assert sorted(failed) == [4, 8, 11, 15, 19, 23], first.stderr
    assert sum(record["state"] == "finished" for record in records.values()) == 18
    assert all("injected" in failed[i] for i in (4, 15))
    assert all("exit code 3" in failed[i] for i in (8, 19))
    assert "SIGKILL" in failed[11]
    assert "memory" in failed[23].lower()
    assert first.returncode == 1

    (tmp_path / "mended").touch()
    second = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700, check=False
    )
    assert second.returncode == 0, second.stderr
    attempts = {json.loads((folder / "job.json").read_text())["number"]: folder for folder in records}
    again = [n for n, folder in attempts.items() if json.loads((folder / "job.json").read_text())["attempts"] == 2]
    assert sorted(again) == sorted(failed)
