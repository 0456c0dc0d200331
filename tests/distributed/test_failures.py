"""What becomes of a job whose rank dies or hangs, with real processes and real signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "sentinel-0123456789abcdef"
pytestmark = pytest.mark.timeout(900)


def fail(folder: Path, *cases: str) -> dict:
    """Run cases of failing.py in one program, in a folder with a file that must not be imported."""
    (folder / "grp.py").write_text("raise SystemExit('a file of the working directory was executed')")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("failing.py")), str(folder), *cases],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = [path for path in folder.rglob("*") if path.is_file() and KEY in path.read_text(errors="replace")]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr, "files with the key": written}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return fail(tmp_path_factory.mktemp("failing"), "raise", "user", "kill", "hang")


@pytest.fixture(scope="module")
def more_failures(tmp_path_factory):
    return fail(tmp_path_factory.mktemp("more"), "server", "restart", "prepare", "prepare and hang")


def test_the_traceback_of_the_rank_that_failed_comes_first(failures):
    found = failures["raise"]
    assert found["kind"] == "RankError"
    assert found["error"].startswith("Traceback")
    assert "failing.py" in found["error"]
    assert "rank 1 (pid " in found["error"]
    assert "failed first: ValueError: a broken thing <redacted:WANDB_API_KEY>" in found["error"]


def test_no_file_of_a_failed_rank_holds_a_secret_of_its_error(failures):
    assert failures["files with the key"] == []
    assert KEY not in failures["stderr"]


def test_what_a_rank_raised_for_the_user_comes_back_as_it_was(failures):
    assert failures["user"]["kind"] == "ConfigError"
    assert failures["user"]["error"] == "training.epochs=-1: expected a positive number"


def test_a_killed_rank_ends_the_job_and_is_named(failures):
    found = failures["kill"]
    assert found["kind"] == "RankError"
    assert "rank 1 (pid " in found["error"]
    assert "SIGKILL" in found["error"]
    # A promise and no timing: the waiting rank would otherwise wait for 300 s.
    assert found["seconds"] < 60


def test_a_hang_is_cut_and_the_slowest_rank_is_named(failures):
    found = failures["hang"]
    assert found["kind"] == "RankError"
    assert "no rank got anywhere for 5 s (distributed.timeout): the slowest is rank 1" in found["error"]
    assert "at 'step 3, forward'" in found["error"]
    assert "rank 0 at 'step 3, optimiser'" in found["error"]


@pytest.mark.slow
def test_ranks_start_again_where_restarts_are_allowed(more_failures):
    assert more_failures["restart"] == {"result": "well"}


@pytest.mark.slow
def test_a_rank_that_prepares_for_longer_than_the_watch_allows_is_not_cut(more_failures):
    assert more_failures["prepare"] == {"result": "well"}


@pytest.mark.slow
def test_a_rank_that_sleeps_while_it_should_prepare_is_cut(more_failures):
    found = more_failures["prepare and hang"]
    assert found["kind"] == "RankError"
    assert "no rank got anywhere for 2.5 s" in found["error"]


@pytest.mark.slow
def test_the_death_of_the_process_that_ranks_are_forked_from_is_noticed(more_failures):
    found = more_failures["server"]
    assert found["kind"] == "RankError"
    assert "the process that ranks are forked from has died" in found["error"]
    assert found["seconds"] < 60


def test_torch_prints_no_pages_of_its_own_about_it(failures):
    assert re.findall(r"^[A-Z]\d{4} .*", failures["stderr"], re.MULTILINE) == []


@pytest.mark.slow
def test_ranks_without_a_loopback_interface_end_with_one_line(tmp_path):
    """In a network of its own, where no interface is up; torch waits a minute."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("making a network namespace is not allowed here")
    words = ["distributed=ddp", "distributed.nproc=2", "model=tiny", "dataset.conversations=20", "tracking=disabled"]
    command = ["unshare", "-n", sys.executable, str(ROOT / "train.py"), *words, f"run_dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot reach each other: is the loopback interface up?" in done.stderr.splitlines()[-1]
