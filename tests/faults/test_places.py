"""Other settings, other places, other company: what changes a run is refused, what does not changes no bit.

Rows F11, F12, F13, F15, F17 and F19 of the matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import (
    STEPS,
    Zygote,
    assert_equal,
    finish,
    kill,
    log_of,
    steps_logged,
    wait_until,
    whole_checkpoints,
)
from tests.faults.zygote_settings import BASE

ROOT = Path(__file__).resolve().parents[2]


def _stopped_at(zygote, run: Path, step: int) -> None:
    assert zygote.run(run, sabotage=[f"die_at_step:{step + 1}"]) == -signal.SIGKILL
    assert max(whole_checkpoints(run)) == step


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_f11_a_nan_in_a_step_is_told_and_reproducible(zygote, ledger, tmp_path, policy):
    told = []
    for name in ("one", "two"):
        run = tmp_path / name
        code = zygote.run(run, settings=[f"training.nonfinite={policy}"], sabotage=["spoil_loss:7"])
        assert code == (1 if policy == "stop" else 0)
        log = (run / "train.log").read_text()
        (line,) = {line.partition("step 7")[2] for line in log.splitlines() if "step 7" in line and "tide_" in line}
        told.append((line.partition(" (")[0], (run / "metrics.jsonl").read_text().count("train/loss")))
        if policy == "skip":
            assert '"train/loss": "nan"' in (run / "metrics.jsonl").read_text()
            assert '"train/skipped_steps": 1' in (run / "metrics.jsonl").read_text()
    assert told[0] == told[1]
    ledger("F11", policy=policy)


CHANGES = {
    "seed": (["seed=43"], "seed: 42 -> 43"),
    "data": (["dataset.test_ratio=0.4"], "data: '"),
    "settings": (["training.learning_rate=0.02"], "training.learning_rate: '0.01' -> '0.02'"),
    "adapter": (["sft_type.rank=4"], "sft_type.rank: 8 -> 4"),
    "model": (["model.shape.hidden=32"], "model.shape.hidden: 16 -> 32"),
    "threads": (["threads=2"], "threads: 1 -> 2"),
}


@pytest.mark.parametrize("what", [pytest.param(c, marks=() if c == "data" else pytest.mark.faults) for c in CHANGES])
def test_f13_what_differs_is_named_and_only_a_flag_goes_on(zygote, ledger, tmp_path, what):
    settings, words = CHANGES[what]
    run = tmp_path / "run"
    _stopped_at(zygote, run, 6)
    assert zygote.run(run, settings=settings) == 1
    said = " ".join(log_of(run).read_text().split())
    assert words in said
    assert "training.allow_changes=true" in said
    ledger("F13", difference=what)
    if what in ("adapter", "model"):
        return  # other shapes: no flag makes them fit
    assert zygote.run(run, settings=[*settings, "training.allow_changes=true"]) == 0, log_of(run).read_text()[-2000:]
    recorded = json.loads((run / "run.json").read_text())["allowed_changes"]
    assert any(change.startswith(words) for change in recorded)


def test_f13_tokenizer_world_size_and_versions_are_named_too():
    from agentft.errors import CheckpointError
    from agentft.training.run_fingerprint import require_same

    saved = {"tokenizer": "a", "processes": 2, "versions": {"torch": "2.13.0", "python": "3.11"}}
    now = {"tokenizer": "b", "processes": 1, "versions": {"torch": "2.14.0", "python": "3.12"}}
    with pytest.raises(CheckpointError) as refusal:
        require_same(Path("step-000001"), saved, now, allow=False)
    for words in ("tokenizer: 'a'", "processes: 2 -> 1", "versions.torch: '2.13.0'", "versions.python"):
        assert words in str(refusal.value)


@pytest.mark.faults
def test_f15_other_hash_seed_folder_locale_and_path_change_no_bit(golden, ledger, tmp_path):
    """A fresh process with another hash seed, the C locale, another working folder; spaces and letters in the path."""
    odd = tmp_path / "mit Leer zeichen, ümläut & 数据" / "run 1"
    (tmp_path / "elsewhere").mkdir()
    environment = {
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    other = Zygote(environment=environment, cwd=tmp_path / "elsewhere")
    try:
        assert_equal(finish(other, odd), golden())
        _stopped_at(other, odd.with_name("run 2"), 6)
        assert_equal(finish(other, odd.with_name("run 2")), golden())
    finally:
        other.close()
    ledger("F15")


def test_f15_an_odd_path_changes_no_bit(zygote, golden, ledger, tmp_path):
    odd = tmp_path / "mit Leer zeichen, ümläut & 数据" / "run 1"
    _stopped_at(zygote, odd, 6)
    assert_equal(finish(zygote, odd, cwd=str(tmp_path)), golden())
    ledger("F15")


@pytest.mark.faults
def test_f15_two_threads_agree_within_a_millionth(zygote, golden, ledger, tmp_path):
    """Equal to the last bit only for equal thread counts, so they are recorded and a resume with others is refused."""
    run = tmp_path / "run"
    assert zygote.run(run, settings=["threads=2"]) == 0
    from tests.faults.harness import result_of

    for (_, two), (_, one) in zip(result_of(run).losses, golden().losses, strict=True):
        assert float.fromhex(two) == pytest.approx(float.fromhex(one), rel=1e-6)
    ledger("F15")


def test_f17_a_second_run_in_the_same_folder_is_refused(zygote, ledger, tmp_path):
    """The first one is stopped in its tracks, so that it surely holds the folder, and goes on unharmed."""
    run = tmp_path / "run"
    pid = zygote.start(run)
    wait_until(lambda: steps_logged(run) >= 2, pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        code = "import sys; from agentft.runs import RunFolder; RunFolder.create(sys.argv[1])"
        second = subprocess.run(
            [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False, cwd=ROOT
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    assert f"is in use by process {pid}" in second.stderr
    assert zygote.wait() == 0
    assert steps_logged(run) == STEPS
    ledger("F17")


@pytest.mark.faults
def test_f17_the_program_itself_is_refused(zygote, ledger, tmp_path):
    run = tmp_path / "run"
    pid = zygote.start(run)
    wait_until(lambda: steps_logged(run) >= 2, pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        command = [sys.executable, str(ROOT / "train.py"), *BASE[:-1], f"run_dir='{run}'"]
        second = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert second.returncode == 1
    assert f"is in use by process {pid}" in second.stderr
    assert zygote.wait() == 0
    ledger("F17")


EXAM = ["evaluation.after=true", "evaluation.conversations=3", "evaluation.max_new_tokens=24"]


@pytest.mark.parametrize("delay", [pytest.param(d, marks=pytest.mark.faults) for d in (0.0, 0.05, 0.15)])
def test_f19_an_evaluation_that_is_killed_gives_the_same_predictions(zygote, ledger, tmp_path, delay):
    def predictions(run: Path) -> list[str]:
        return (run / "predictions" / "after.jsonl").read_text().splitlines()

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert zygote.run(whole, settings=EXAM) == 0, log_of(whole).read_text()[-2000:]
    pid = zygote.start(run, settings=EXAM)
    wait_until(lambda: (run / "final").is_dir(), pid)
    time.sleep(delay)
    kill(pid)
    killed = zygote.wait() == -signal.SIGKILL
    finish(zygote, run, settings=EXAM)
    ledger("F19", kills=int(killed))
    digest = [hashlib.sha256("\n".join(predictions(each)).encode()).hexdigest() for each in (run, whole)]
    assert digest[0] == digest[1]
    ids = [(json.loads(line)["conversation_id"], json.loads(line)["step"]) for line in predictions(run)]
    assert len(ids) == len(set(ids))
