"""Forked jobs: to the job and to whoever watches it, nothing tells a fork from an interpreter of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentft.errors import RunError
from agentft.signals import STOPS
from agentft.sweeping.forks import GONE, ForkServer, can_fork, is_forkable
from agentft.sweeping.jobs import Job
from agentft.sweeping.places import ThisMachine
from agentft.sweeping.processes import Attempt, FreshProcess
from agentft.sweeping.slots import Slot
from tests.sweeping.watching import is_alive, wait_for

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are watched by pidfd, which only Linux has")

PROGRAM = """
import atexit, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

act = sys.argv[1]
print("ran", __name__, sys.argv[1:], sys.path[0], os.environ["MINE"], os.environ.get("NOT_MINE"), Path.cwd(), flush=True)
interrupt = str(signal.getsignal(signal.SIGINT)).split(" at ")[0]
print(sys.stdin.read() == "", os.getsid(0) == os.getpid(), threading.active_count(), interrupt)
print(sys.modules["__main__"].act, Path(__file__).name, flush=True)
atexit.register(lambda: print("cleaned up"))
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread ended", flush=True))).start()
if act == "raise":
    raise ValueError("broken")
if act == "exit":
    sys.exit(3)
if act == "words":
    sys.exit("said at the end")
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "interrupt":
    raise KeyboardInterrupt
if act == "sleep":
    child = subprocess.Popen(["sleep", "321"], start_new_session=True)
    Path("pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOT_MINE", "of the launcher when the server started")
        server = ForkServer(["json"], {})
    yield server
    server.close()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "programs").mkdir()
    path = tmp_path / "programs" / "job.py"
    path.write_text(PROGRAM)
    return path


def end_of(attempt: Attempt) -> int:
    until = time.monotonic() + 60
    while (code := attempt.poll()) is None:
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return code


def said(log: Path) -> str:
    """Its output without the frames of a traceback that lie above the program, and without its file's place."""
    lines = log.read_text().splitlines()
    kept = [line for line in lines if not line.startswith((" ", "Traceback"))]
    return "\n".join(kept)


@pytest.mark.parametrize("act", ["ok", "raise", "exit", "words", "kill", "interrupt"])
def test_a_forked_job_ends_and_prints_as_a_fresh_one(server: ForkServer, program: Path, act: str) -> None:
    command, environment = [sys.executable, "programs/job.py", act, "a b=ü"], {"MINE": "yes"}
    fresh = end_of(FreshProcess(command, environment, Path("fresh.log"), "$ header\n"))
    forked = end_of(server.start(command, environment, Path("forked.log"), "$ header\n"))
    assert forked == fresh
    assert said(Path("forked.log")) == said(Path("fresh.log"))
    assert "ran __main__" in said(Path("fresh.log"))


def test_a_module_is_run_as_by_its_option(server: ForkServer, program: Path) -> None:
    (program.parent / "__init__.py").touch()
    command = [sys.executable, "-m", "programs.job", "exit"]
    codes = [
        end_of(FreshProcess(command, {"MINE": "yes"}, Path("fresh.log"), "")),
        end_of(server.start(command, {"MINE": "yes"}, Path("forked.log"), "")),
    ]
    assert codes == [3, 3]
    assert said(Path("forked.log")) == said(Path("fresh.log"))


def test_signals_to_every_process_of_a_batch_job_leave_the_server_alone(server: ForkServer, program: Path) -> None:
    """SLURM signals it too: without it nobody would know how the jobs end."""
    command = [sys.executable, str(program), "ok"]
    codes = [end_of(server.start(command, {"MINE": ""}, Path("before.log"), ""))]
    for number in STOPS:
        os.kill(server._process.pid, number)
    codes.append(end_of(server.start(command, {"MINE": ""}, Path("after.log"), "")))
    assert codes == [0, 0]
    assert "SIG_IGN" not in said(Path("after.log"))  # to the jobs signals are what they are to a fresh one


def test_jobs_run_beside_each_other_and_each_end_is_its_own(server: ForkServer, program: Path) -> None:
    acts = ["ok", "exit", "kill", "ok", "raise"]
    running = [
        server.start([sys.executable, str(program), act], {"MINE": ""}, Path(f"{i}.log"), "")
        for i, act in enumerate(acts)
    ]
    assert [end_of(attempt) for attempt in running] == [0, 3, -9, 0, 1]
    assert [attempt.poll() for attempt in running] == [0, 3, -9, 0, 1], "asked again"


def test_a_stopped_fork_ends_with_all_it_started(server: ForkServer, program: Path) -> None:
    attempt = server.start([sys.executable, str(program), "sleep"], {"MINE": ""}, Path("log"), "")
    pids = wait_for_pids(Path("pids"))
    attempt.stop(grace=4.0)
    assert end_of(attempt) in (-signal.SIGINT, -signal.SIGTERM), "the second where a shell made us ignore the first"
    wait_for(lambda: not any(map(is_alive, [pids[0]])))
    os.kill(pids[1], signal.SIGKILL)  # a session of its own, left by a clean end as it would be by a fresh process


def test_a_dead_server_ends_its_jobs_and_the_next_ones_start_afresh(program: Path) -> None:
    told: list[str] = []
    place = ThisMachine(["json"], Slot(0, None, 1), told.append)
    job = Job(folder=Path("run"), number=0, identity="", overrides=[], swept=[], settings={}, threads=1)
    job.folder.mkdir()
    job.command, job.environment = [sys.executable, str(program), "sleep"], {"MINE": ""}
    attempt = place.start(job, "$ first\n")
    pids = wait_for_pids(Path("pids"))
    assert attempt.lost is None
    assert place._server is not None
    place._server._process.kill()
    assert end_of(attempt) == -signal.SIGKILL
    assert attempt.lost == GONE
    wait_for(lambda: not any(map(is_alive, pids)))
    job.command[-1] = "ok"
    assert end_of(place.start(job, "$ second\n")) == 0
    assert told == [f"each job imports its libraries itself from here on: {GONE}"]
    log = (job.folder / "job.log").read_text()
    assert log.count("$ first") == log.count("$ second") == 1
    place.close()


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        ("breaks", "raise ImportError('no such thing')", "ImportError: no such thing"),
        (
            "threads",
            "import threading, time\nthreading.Thread(target=time.sleep, args=[9], daemon=True).start()",
            "2 threads",
        ),
    ],
)
def test_a_server_that_cannot_serve_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, words: str
) -> None:
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer([module], {})
    with pytest.raises(RunError, match=words):
        server.start([sys.executable, "job.py"], {}, tmp_path / "log", "")
    server.close()


def test_only_plain_programs_of_this_interpreter_are_forked() -> None:
    assert is_forkable([sys.executable, "train.py", "a=1"])
    assert is_forkable([sys.executable, "-m", "package.program"])
    assert not is_forkable([sys.executable, "-O", "train.py"])
    assert not is_forkable(["/bin/sh", "train.py"])


def wait_for_pids(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and path.read_text().count(" "))
    return [int(pid) for pid in path.read_text().split()]
