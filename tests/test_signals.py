"""What a signal does: noted where work can be saved, raised where there is nothing to save."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import threading
from pathlib import Path

import pytest

from agentft.signals import (
    REQUEUED_BY_LAUNCHER,
    STARTED_BY,
    StopSignal,
    StopSignals,
    describe_exit,
    is_slurm_batch_job,
    requeue_slurm_job,
)

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def heard():
    """Signals that whoever started the tests had ignored (`nohup`, a shell's background job) are heard meanwhile."""
    before = {number: signal.getsignal(number) for number in CODES}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_outside_of_a_training_ends_the_work_with_the_conventional_code(number):
    with StopSignals(), pytest.raises(StopSignal) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == CODES[number]
    assert str(stop.value) == f"stopped by {number.name}"


def test_a_deferred_signal_is_noted_and_raised_when_asked():
    with StopSignals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested is signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)  # repetitions disturb nothing
        with pytest.raises(StopSignal, match="stopped by SIGTERM, saved"):
            signals.raise_if_requested(", saved")


def test_ctrl_c_a_second_time_does_not_wait():
    with StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopSignal):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_another_signal_does_not_end_the_save():
    """SLURM signals agent and job both; whoever started the job then adds a SIGINT of its own."""
    with StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested is signal.SIGUSR1


@pytest.mark.parametrize("variable", [STARTED_BY, "TORCHELASTIC_RUN_ID"])
def test_no_second_ctrl_c_is_a_persons_in_a_process_that_another_has_started(monkeypatch, variable):
    monkeypatch.setenv(variable, "launcher")
    with StopSignals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested is signal.SIGINT


def test_a_signal_that_comes_after_the_save_does_not_disturb_the_end():
    with StopSignals() as program:
        with StopSignals.shared() as signals, signals.deferred():
            assert signals is program
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)


def test_whoever_passes_a_signal_on_is_told_the_first_and_a_person_who_insists_and_decides():
    told = []
    with StopSignals() as signals, signals.deferred(lambda *words: told.append(words)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert told == [(signal.SIGINT, False), (signal.SIGINT, True)]


def test_what_another_rank_has_heard_counts_here_and_comes_but_once():
    with StopSignals() as signals:
        with signals.deferred():
            signals.agree([None, signal.SIGUSR1])
        with pytest.raises(StopSignal, match="stopped by SIGUSR1, saved"):
            signals.raise_if_requested(", saved")
        os.kill(os.getpid(), signal.SIGUSR1)  # the word, come late, which must not disturb the end


def test_a_stop_passes_from_a_rank_to_its_agent_as_it_is():
    stop = pickle.loads(pickle.dumps(StopSignal(signal.SIGUSR1, " after step 3")))
    assert (str(stop), stop.exit_code) == ("stopped by SIGUSR1 after step 3", 138)
    assert stop.signal is signal.SIGUSR1


def test_long_work_within_a_deferred_block_ends_at_once():
    with StopSignals() as signals, signals.deferred():
        with pytest.raises(StopSignal), signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopSignal), signals.at_once():
            pytest.fail("a signal that was noted before must end it before it begins")


def test_handlers_are_put_back_and_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        usual = signal.getsignal(signal.SIGTERM)
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not usual
        assert signal.getsignal(signal.SIGTERM) is usual
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_codes_in_words():
    assert describe_exit(-9) == ("killed by SIGKILL (out of memory?)", "SIGKILL")
    assert describe_exit(-11) == ("killed by SIGSEGV", "SIGSEGV")
    assert describe_exit(2) == ("exit code 2", None)


def test_another_thread_leaves_the_signals_alone():
    seen = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append((signals.is_requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


# --- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program of that name first on PATH, which writes down how it was called; returns the calls."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexit ${{SCONTROL_EXIT:-0}}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def test_a_job_is_queued_again_by_its_id(scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert requeue_slurm_job()
    assert scontrol() == ["requeue 1234"]


def test_a_task_of_an_array_is_queued_again_by_array_and_task(scontrol, monkeypatch):
    for name, value in {"JOB_ID": "1240", "ARRAY_JOB_ID": "1234", "ARRAY_TASK_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert requeue_slurm_job()
    assert scontrol() == ["requeue 1234_7"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "1"},
        {"SLURM_JOB_ID": "1234", REQUEUED_BY_LAUNCHER: "1234"},
    ],
    ids=["not in SLURM", "second task", "job of a sweep"],
)
def test_one_process_of_a_job_asks(scontrol, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not requeue_slurm_job()
    assert scontrol() == []


def test_a_refusal_is_told(scontrol, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SCONTROL_EXIT", "1")
    assert not requeue_slurm_job()
    assert "submit it again by hand" in caplog.text


@pytest.mark.parametrize(
    ("environment", "can_start_again"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "interactive"}, False),
        ({}, False),
    ],
)
def test_a_session_of_salloc_is_no_batch_job(scontrol, monkeypatch, environment, can_start_again):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_slurm_batch_job() == can_start_again
