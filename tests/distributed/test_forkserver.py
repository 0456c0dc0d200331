"""Forked programs: to the program and to whoever watches it, nothing tells a fork from an interpreter of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentft.distributed.forkserver import GONE, can_fork, fork_program
from agentft.errors import RunError
from agentft.signals import STOPS
from agentft.sweeping.jobs import Job
from agentft.sweeping.runner import Attempt, JobProcess, Slot, ThisMachine, start_interpreter, whole_environment
from tests.sweeping.watching import is_alive, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries survive a fork on Linux alone")

PROGRAM = """
import atexit, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

act = sys.argv[1]
given = [os.environ.get(name) for name in ("MINE", "NOT_MINE", "PYTHONSAFEPATH", "PYTHONPATH", "AGENTFT_FORK_SERVER")]
print("ran", __name__, sys.argv[1:], sys.path[0], given, Path.cwd(), flush=True)
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
if act == "object":
    sys.exit(ValueError("said at the end"))
if act.startswith("parent"):
    Path("server").write_text(str(os.getppid()))
    time.sleep(60 if act == "parent-sleep" else 0)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "interrupt":
    raise KeyboardInterrupt
if act == "sleep":
    child = subprocess.Popen(["sleep", "321"], start_new_session=True)
    Path("pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
"""


def fork(command: list[str], own: dict[str, str], log: Path, modules: tuple[str, ...] = ("json",)) -> Attempt:
    at_import = {"NOT_MINE": "of the server"}
    return JobProcess(fork_program(command, whole_environment(own), log, modules=modules, at_import=at_import))


def start_afresh(command: list[str], own: dict[str, str], log: Path) -> Attempt:
    return start_interpreter(command, own, log)


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


def printed(log: Path) -> str:
    """Its output without the frames of a traceback that lie above the program, and without its file's place."""
    lines = log.read_text().splitlines()
    kept = [line for line in lines if not line.startswith((" ", "Traceback"))]
    return "\n".join(kept)


@pytest.mark.parametrize("act", ["ok", "raise", "exit", "words", "object", "kill", "interrupt"])
def test_a_forked_job_ends_and_prints_as_a_fresh_one(program: Path, act: str) -> None:
    command, environment = [sys.executable, "programs/job.py", act, "a b=ü"], {"MINE": "yes"}
    fresh = end_of(start_afresh(command, environment, Path("fresh.log")))
    forked = end_of(fork(command, environment, Path("forked.log")))
    assert forked == fresh
    assert printed(Path("forked.log")) == printed(Path("fresh.log"))
    assert "ran __main__" in printed(Path("fresh.log"))


def test_a_module_is_run_as_by_its_option(program: Path) -> None:
    (program.parent / "__init__.py").touch()
    command = [sys.executable, "-m", "programs.job", "exit"]
    codes = [
        end_of(start_afresh(command, {"MINE": "yes"}, Path("fresh.log"))),
        end_of(fork(command, {"MINE": "yes"}, Path("forked.log"))),
    ]
    assert codes == [3, 3]
    assert printed(Path("forked.log")) == printed(Path("fresh.log"))


def test_signals_to_every_process_of_a_batch_job_leave_the_server_alone(program: Path) -> None:
    """SLURM signals it too: without it nobody would know how the jobs end."""
    server = server_of(program)
    for number in STOPS:
        os.kill(server, number)
    assert end_of(fork([sys.executable, str(program), "parent"], {"MINE": ""}, Path("after.log"))) == 0
    assert int(Path("server").read_text()) == server
    assert "SIG_IGN" not in printed(Path("after.log"))  # to the jobs signals are what they are to a fresh one


def test_jobs_run_beside_each_other_and_each_end_is_its_own(program: Path) -> None:
    acts = ["ok", "exit", "kill", "ok", "raise"]
    running = [fork([sys.executable, str(program), act], {"MINE": ""}, Path(f"{i}.log")) for i, act in enumerate(acts)]
    assert [end_of(attempt) for attempt in running] == [0, 3, -9, 0, 1]
    assert [attempt.poll() for attempt in running] == [0, 3, -9, 0, 1], "asked again"


def test_a_stopped_fork_ends_with_all_it_started(program: Path) -> None:
    attempt = fork([sys.executable, str(program), "sleep"], {"MINE": ""}, Path("log"))
    pids = wait_for_pids(Path("pids"))
    attempt.stop(grace=4.0)
    assert end_of(attempt) in (-signal.SIGINT, -signal.SIGTERM), "the second where a shell made us ignore the first"
    wait_for(lambda: not any(map(is_alive, [pids[0]])))
    os.kill(pids[1], signal.SIGKILL)  # a session of its own, left by a clean end as it would be by a fresh process


def test_a_dead_server_ends_its_jobs_and_the_next_ones_have_another(program: Path) -> None:
    told: list[str] = []
    executor = ThisMachine(["json"], Slot(None, 1), told.append)
    job = Job(folder=Path("run"), number=0, config_hash="", overrides=[], swept=[], settings={}, threads=1)
    job.folder.mkdir()
    job.command, job.environment = [sys.executable, str(program), "sleep"], {"MINE": ""}
    server = server_of(program)
    attempt = executor.start(job)
    pids = wait_for_pids(Path("pids"))
    assert attempt.lost is None
    os.kill(server, signal.SIGKILL)
    assert end_of(attempt) == -signal.SIGKILL
    assert attempt.lost == GONE
    wait_for(lambda: not any(map(is_alive, [*pids, server])))
    job.command[-1] = "parent"
    assert end_of(executor.start(job)) == 0
    assert int(Path("server").read_text()) not in (server, os.getpid()), "forked again"
    assert told == []
    log = (job.folder / "job.log").read_text().splitlines()
    assert [line.split()[-1] for line in log if line.startswith("$ ")] == ["sleep", "parent"]


def test_an_exit_code_is_not_taken_for_the_death_of_the_server(program: Path) -> None:
    program.write_text("import sys; sys.exit(255)")
    attempt = fork([sys.executable, str(program)], {}, Path("log"))
    assert (end_of(attempt), attempt.lost) == (255, None)


def test_jobs_are_not_forked_where_a_library_has_started_threads(
    program: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy would have the locks of these threads, and not the threads."""
    end_server(program)
    folder = program.parent / "libraries"
    folder.mkdir()
    (folder / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[9], daemon=True).start()"
    )
    (folder / "broken.py").write_text("raise ValueError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(RunError, match=GONE):
        fork([sys.executable, str(program), "ok"], {"MINE": ""}, Path("log"), modules=("threads",))
    assert "jobs are not forked: 2 threads run after importing threads" in capfd.readouterr().err
    told: list[str] = []
    executor = ThisMachine(["threads"], Slot(None, 1), told.append)
    job = Job(folder=Path("run"), number=0, config_hash="", overrides=[], swept=[], settings={}, threads=1)
    job.folder.mkdir()
    job.command, job.environment = [sys.executable, str(program), "parent"], {"MINE": ""}
    assert end_of(executor.start(job)) == 0
    assert int(Path("server").read_text()) == os.getpid(), "an interpreter of its own"
    assert told == [f"each job imports its libraries itself from here on: {GONE}"]
    # What cannot be imported is left to the job, which says so in its own log.
    assert end_of(fork([sys.executable, str(program), "ok"], {"MINE": ""}, Path("log"), modules=("broken",))) == 0


def test_what_libraries_print_while_they_are_imported_is_not_shown_and_what_they_print_later_is_the_programs(
    program: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    end_server(program)
    (program.parent / "noisy.py").write_text(
        "import logging, os\nprint('noise')\nos.write(2, b'noise')\nhandler = logging.StreamHandler()"
    )
    program.write_text("import logging, noisy\nlogging.getLogger().addHandler(noisy.handler)\nlogging.warning('heard')")
    monkeypatch.setenv("PYTHONPATH", str(program.parent))
    assert end_of(fork([sys.executable, str(program)], {}, Path("noisy.log"), modules=("noisy",))) == 0
    assert Path("noisy.log").read_text() == "heard\n"
    assert capfd.readouterr() == ("", "")


def test_nothing_of_the_working_directory_is_imported(program: Path) -> None:
    """`multiprocessing` starts its servers by `python -c`, to which every file there is a module."""
    end_server(program)
    for name in ("grp", "bz2", "json", "tempfile", "agentft"):
        Path(f"{name}.py").write_text("raise SystemExit('a file of the working directory was executed')")
    assert end_of(fork([sys.executable, str(program), "ok"], {"MINE": ""}, Path("log"))) == 0


def test_a_forked_program_outlives_its_launcher(program: Path) -> None:
    launcher = program.with_name("launcher.py")
    launcher.write_text(LAUNCHER)
    with Path("pids").open("w") as pids:
        done = subprocess.run([sys.executable, str(launcher), str(program)], stdout=pids, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    job, server = wait_for_pids(Path("pids"))
    assert is_alive(job)
    assert is_alive(server)
    os.kill(job, signal.SIGKILL)
    wait_for(lambda: not is_alive(server))


LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from agentft.distributed.forkserver import fork_program

command = [sys.executable, sys.argv[1], "parent-sleep"]
process = fork_program(command, {**os.environ, "MINE": ""}, Path("log"), modules=["json"], at_import={})
while not Path("server").exists() or not Path("server").read_text():
    time.sleep(0.02)
print(process.pid, Path("server").read_text(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
"""A program without `if __name__ == "__main__"`, which a fork must not import."""


def test_only_plain_programs_of_this_interpreter_are_forked() -> None:
    assert can_fork([sys.executable, "train.py", "a=1"])
    assert can_fork([sys.executable, "-m", "package.program"])
    assert not can_fork([sys.executable, "-O", "train.py"])
    assert not can_fork(["/bin/sh", "train.py"])


def server_of(program: Path) -> int:
    """Return the process id of the server; it is started if need be."""
    assert end_of(fork([sys.executable, str(program), "parent"], {"MINE": ""}, Path("log"))) == 0
    return int(Path("server").read_text())


def end_server(program: Path) -> None:
    """Have the next program forked from a server of its own."""
    server = server_of(program)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not is_alive(server))


def wait_for_pids(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and path.read_text().count(" "))
    return [int(pid) for pid in path.read_text().split()]
