"""Consoles that die under a training, as whole commands: the log file goes on, and SIGHUP alone ends the run, saved."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import steps_logged, wait_until, whole_checkpoints
from tests.faults.zygote_settings import BASE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
OTHER = {"training.max_steps": STEPS, "training.save_steps": 1000, "evaluation.eval_steps": 0}
SETTINGS = [each for each in BASE if each.partition("=")[0] not in ("run_dir", *OTHER)]
SETTINGS += [f"{name}={value}" for name, value in OTHER.items()]
pytestmark = pytest.mark.timeout(1800)


def _command(run: Path, *settings: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"run_dir={run}", *settings]


def _environment() -> dict[str, str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return buffered | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _start(command: list[str], stdout: object = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=_environment(), stdout=stdout, stderr=subprocess.STDOUT)


def _status(run: Path) -> dict[str, str]:
    return json.loads((run / "status.json").read_text())


def _assert_finished(code: int, run: Path, reason: str) -> None:
    log = (run / "train.log").read_text()
    assert (code, _status(run)["state"]) == (0, "finished"), log[-3000:]
    assert log.count(f"stderr is gone ({reason}): the work continues") == 1, log
    assert "Traceback" not in log
    assert log.rstrip().endswith(f"run folder: {run}"), "the log file must go on to the end"
    assert steps_logged(run) == STEPS


def _close_terminal_of_a_training(run: Path, at_hangup: signal.Handlers) -> int:
    """Train in a terminal of its own and close that after a few steps; returns the exit code, negative for a signal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, at_hangup)
        os.execve(sys.executable, _command(run), _environment())
    while steps_logged(run) < 3:  # somebody looks at it: a terminal that is full would keep the training waiting
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        pytest.param(["tracking=wandb"], marks=pytest.mark.slow),
        pytest.param(["distributed=ddp", "distributed.nproc=2"], marks=pytest.mark.slow),
    ],
    ids=["alone", "with W&B", "ranks"],
)
def test_f24_head_takes_one_line_and_goes(tmp_path, ledger, settings):
    run = tmp_path / "run"
    training = _start(_command(run, *settings))
    head = subprocess.Popen(["head", "-1"], stdin=training.stdout, stdout=subprocess.DEVNULL)
    training.stdout.close()
    assert head.wait() == 0
    _assert_finished(training.wait(), run, "Broken pipe")
    ledger("F24", console="head")


@pytest.mark.slow
def test_f24_a_tee_is_killed(tmp_path, ledger):
    run = tmp_path / "run"
    training = _start(_command(run))
    tee = subprocess.Popen(["tee", str(tmp_path / "copy")], stdin=training.stdout, stdout=subprocess.DEVNULL)
    training.stdout.close()
    assert wait_until(lambda: steps_logged(run) >= 3, training.pid)
    tee.kill()
    tee.wait()
    _assert_finished(training.wait(), run, "Broken pipe")
    ledger("F24", console="tee")


@pytest.mark.slow
def test_f24_the_disk_under_the_output_is_full(tmp_path, ledger):
    run = tmp_path / "run"
    with Path("/dev/full").open("wb") as full:
        _assert_finished(_start(_command(run), stdout=full).wait(), run, "No space left on device")
    ledger("F24", console="/dev/full")


def test_f24_a_closed_terminal_stops_the_training_which_is_saved(tmp_path, ledger):
    run = tmp_path / "run"
    assert _close_terminal_of_a_training(run, signal.SIG_DFL) == 129, (run / "train.log").read_text()[-3000:]
    status, log = _status(run), (run / "train.log").read_text()
    assert status["state"] == "stopped"
    assert f"after step {max(whole_checkpoints(run))} of {STEPS}, which is saved" in status["error"]
    assert "stderr is gone (Input/output error): the work continues" in log
    assert "Traceback" not in log
    ledger("F24", console="terminal")


@pytest.mark.slow
def test_f24_a_closed_terminal_leaves_a_training_alone_that_ignores_it(tmp_path, ledger):
    """As `nohup` and `disown` leave it."""
    run = tmp_path / "run"
    _assert_finished(_close_terminal_of_a_training(run, signal.SIG_IGN), run, "Input/output error")
    ledger("F24", console="terminal, nohup")
