"""Work is shared out, results come in order, and no process outlives the one it works for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agentft.data import entries
from agentft.data.entries import MOST_PROCESSES, in_order, process_count
from agentft.errors import DataError

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def work(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 5 == 0 else 0.0)
    return number * number, os.getpid()


def always() -> bool:
    return True


@linux
def test_results_come_in_order_from_forked_processes():
    done = list(in_order(work, range(40), workers=2, ready=always))
    assert [(number, square) for number, (square, _) in done] == [(n, n * n) for n in range(40)]
    pids = [pid for _, (_, pid) in done]
    assert pids[0] == os.getpid(), "the first batch is done here"
    assert len(set(pids[1:])) == 2
    assert os.getpid() not in pids[1:]


@pytest.mark.parametrize(("processes", "ready"), [(1, True), (3, False)])
def test_without_processes_or_before_there_is_much_threads_do_it(processes, ready):
    done = list(in_order(work, range(20), workers=processes, ready=lambda: ready))
    assert [square for _, (square, _) in done] == [n * n for n in range(20)]
    assert {pid for _, (_, pid) in done} == {os.getpid()}


@linux
def test_it_forks_when_it_becomes_ready_and_asks_no_more_then():
    asked = []

    def ready() -> bool:
        asked.append(len(asked))
        return len(asked) == 4

    done = list(in_order(work, range(30), workers=2, ready=ready))
    assert [square for _, (square, _) in done] == [n * n for n in range(30)]
    here = [number for number, (_, pid) in done if pid == os.getpid()]
    assert here == [0, 1, 2, 3]
    assert len(asked) == 4


def test_a_single_batch_forks_nothing(monkeypatch):
    """A fork shows all that its parent holds by then."""
    monkeypatch.setattr(entries, "_in_processes", None)
    assert [square for _, (square, _) in in_order(work, range(1), workers=2, ready=always)] == [0]


@linux
def test_no_batch_is_read_far_ahead():
    """Memory holds a few batches, however many there are."""
    read = []

    def batches():
        for number in range(200):
            read.append(number)
            yield number

    for done, _ in enumerate(in_order(work, batches(), workers=2, ready=always)):
        assert len(read) - done < 12


class OddError(ValueError):
    pass


def refuse(number: int) -> int:
    if number == 7:
        raise OddError(f"batch {number}")
    return number


@linux
@pytest.mark.parametrize("processes", [1, 2])
def test_what_work_raises_is_raised_here(processes):
    results = in_order(refuse, range(100), workers=processes, ready=always)
    with pytest.raises(OddError, match="batch 7"):
        list(results)


def die(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@linux
def test_a_killed_process_is_an_error_in_words():
    with pytest.raises(DataError, match=r"was killed, by want of memory perhaps; dataset\.workers=1"):
        list(in_order(die, range(50), workers=2, ready=always))


def die_while_writing(number: int) -> bytes:
    if number == 3:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(300_000_000)
    return b""


@linux
def test_a_process_killed_while_it_writes_a_result_is_an_error_too():
    with pytest.raises(DataError, match="was killed"):
        list(in_order(die_while_writing, range(50), workers=2, ready=always))


def ask_for_signals(_: int) -> list[str]:
    return [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


@linux
def test_the_handlers_of_the_parent_are_not_those_of_its_workers():
    """Ctrl-C and a scheduler's signals, sent to all processes of a job, are the parent's alone, which ends its workers."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        (_, _), (_, found) = in_order(ask_for_signals, range(2), workers=2, ready=always)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [str(signal.SIG_IGN)] * 3


PARENT = """
import os, signal, sys, time
from agentft.data.entries import in_order

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run as a shell's background job

def work(number):
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.2)
    return number

for number, _ in in_order(work, range(10_000), workers=2, ready=lambda: True):
    pass
"""


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how, tmp_path: Path):
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pids)], stderr=subprocess.DEVNULL)
    while not pids.exists() or len(set(pids.read_text().split())) < 3:
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(how)
    parent.wait(timeout=20)
    workers = set(map(int, pids.read_text().split())) - {parent.pid}
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker waits for work that will never come"
        time.sleep(0.05)


def test_the_number_of_processes_is_bounded_unless_asked_for():
    if sys.platform != "linux":
        assert process_count(7) == 1
        return
    assert 1 <= process_count(0) <= min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    assert process_count(13) == 13
