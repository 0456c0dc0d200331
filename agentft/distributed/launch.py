"""Start the ranks of a job, watch and stop them, and return the result of rank 0 or the first failure.

The program stays as the agent of its machine, with torch's `elastic_launch`. Each rank is a fresh process that gets the
resolved configuration as text. Agent and ranks exchange words by files in a temporary folder: heartbeats, errors, stops.

A signal to a process group or a SLURM job reaches agent, server and ranks alike. So all stop signals stay blocked in ranks,
the server that they are forked from, and what they start; the agent writes a stop into the folder, and a thread in each
rank does as the signal would have done.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentft import errors, progress
from agentft.distributed import forkserver
from agentft.distributed.config import DistributedConfig, choose_topology
from agentft.errors import AgentftError, ConfigError, RankError
from agentft.runs import RunFolder, RunState, read_json
from agentft.runtime import HEARTBEAT_VARIABLE, World, available_cores, join_world, leave_world
from agentft.secrets import redact_text
from agentft.signals import STARTED_BY, STOPS, StopSignal, StopSignals, describe_exit, die_with

log = logging.getLogger(__name__)

Entry = Callable[[str], Any]
"""A top-level function that runs one rank: resolved configuration -> a small result that can be pickled."""

_ELASTIC = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*")
"""Variables by which torch tells a rank who it is."""

_AGENT = "torch.distributed.elastic"
_LOUD = (
    _AGENT,
    f"{_AGENT}.agent.server.api",
    f"{_AGENT}.agent.server.local_elastic_agent",
    "torch.multiprocessing.spawn",
)
"""Loggers of torch's agent; three of them have levels of their own."""


def run_on_ranks(
    entry: Entry,
    payload: str,
    distributed: DistributedConfig,
    *,
    folder: str,
    threads: int | None,
    require: Callable[[int], None] = lambda ranks: None,
) -> Any:
    """Run `entry(payload)` on every rank of this machine and return the result of its first.

    Args:
        folder: Where rank 0 writes; the output of the others goes into its `ranks/`.
        threads: CPU threads of a rank; None: an even share of the cores.
        require: Told how many ranks there will be on all machines, before any starts; raises if they cannot run.

    Raises:
        ConfigError: the settings, the launcher and the devices do not go together.
        RankError: a rank died, hung, or the machines did not meet; the failed rank's traceback comes first.
        StopSignal: a signal to this process ended the job; its ranks have saved what they could, and ended.
        AgentftError: whatever a rank raised for the user.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    topology = choose_topology(distributed, gpus=torch.cuda.device_count(), job=Path(folder).name)
    require(topology.ranks)
    told = f"starting {topology.nproc} ranks ({distributed.name})"
    if topology.nnodes > 1:
        told += f" on this machine, one of {topology.nnodes}; they meet at {topology.endpoint}"
    progress.console().print(told, highlight=False)
    logs = Path(folder) / "ranks"
    logs.mkdir(parents=True, exist_ok=True)
    quiet = {rank: Std.ALL for rank in range(topology.nproc) if rank or topology.node > 0}
    launch = LaunchConfig(
        min_nodes=topology.nnodes,
        max_nodes=topology.nnodes,
        nproc_per_node=topology.nproc,
        run_id=topology.job,
        rdzv_backend="c10d",
        rdzv_endpoint=topology.endpoint,
        rdzv_configs={"is_host": topology.node == 0} if topology.node >= 0 else {},
        local_addr="127.0.0.1" if topology.nnodes == 1 else None,
        max_restarts=distributed.elastic.max_restarts,
        monitor_interval=0.2,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
        shutdown_timeout=distributed.elastic.grace,
        signals_to_handle="",  # they are heard by `_telling`, and torch would end ranks in the middle of their save
    )
    for name in _LOUD:  # `explain` says what happened; torch would print several screens of it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.stdout.flush()
    if topology.nnodes > 1:
        # A store of its own for every attempt: the agents of several machines count attempts differently.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with (
        _noting_the_end(RunFolder(folder), topology.node),
        tempfile.TemporaryDirectory(prefix="agentft-ranks-", ignore_cleanup_errors=True) as temporary,
        _telling(heartbeats := Path(temporary), machines=topology.nnodes) as signals,
        _hang_watch(heartbeats, distributed.timeout) as hangs,
    ):
        share = threads or max(1, available_cores() // topology.nproc)
        environment = {
            **os.environ,
            HEARTBEAT_VARIABLE: str(heartbeats),
            "OMP_NUM_THREADS": str(share),
            STARTED_BY: "agent",
        }
        try:
            modules = [entry.__module__, *(() if torch.cuda.device_count() else forkserver.LIBRARIES)]
            with forkserver.fork_server(modules, for_ranks=True):  # torch is loaded once on each machine
                results = elastic_launch(launch, _run_rank)(entry, payload, environment, os.getpid())
        except ChildFailedError as error:
            if all(failure.exitcode == _GAVE_UP for failure in error.failures.values()):
                signals.raise_if_requested()
            failures = _read_failures(heartbeats)
            for rank, failure in error.failures.items():
                ended, _ = describe_exit(failure.exitcode)
                if failure.exitcode == forkserver.SERVER_DIED:
                    ended += ", or the process that ranks are forked from has died"
                failures.setdefault(rank, RankFailure(rank, failure.pid, 0.0, "", f"ended: {ended}", ""))
            raise explain(failures, hang=hangs[-1] if hangs else None, logs=logs) from None
        except RendezvousError as error:
            if topology.nnodes == 1:
                raise RankError(
                    "the ranks of this machine cannot reach each other: is the loopback interface up?"
                ) from error
            raise RankError(f"the {topology.nnodes} machines did not meet at {topology.endpoint}: {error}") from error
    first = results[min(results)]
    if isinstance(first, StopSignal):
        raise first
    return first


@contextmanager
def _noting_the_end(run: RunFolder, node: int) -> Iterator[None]:
    """Say in the run's status how the body ended, where the rank that writes it could not; on the first machine alone."""
    try:
        yield
    except (RankError, StopSignal) as error:
        if node <= 0 and run.status_file.is_file() and read_json(run.status_file).get("state") == "running":
            with RunFolder.create(run.path) as own:
                progress.set_up_logging(own.log_file)
                state: RunState = "stopped" if isinstance(error, StopSignal) else "failed"
                own.update_status(state, error=f"{type(error).__name__}: {error}")
                log.error("%s", error)
        raise


def _run_rank(entry: Entry, payload: str, environment: Mapping[str, str], agent: int) -> Any:
    """Run one rank with the `environment` of this job; what it raises is written down for the agent.

    A stop is returned: for torch's agent an error of one rank is a reason to end the others, which may still save.
    """
    os.environ.update({name: value for name, value in environment.items() if not _ELASTIC.fullmatch(name)})
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # into which torch would write the error as it is, secrets included
    folder = Path(os.environ[HEARTBEAT_VARIABLE])
    with _obeying(agent, folder) as signals:
        try:
            return entry(payload)
        except BaseException as error:
            with signals.deferred():
                if isinstance(stop := as_stop(error), StopSignal):
                    return stop
                rank, trace = int(os.environ.get("RANK", "0")), redact_text("".join(traceback.format_exception(error)))
                kind, message = type(error).__name__, redact_text(str(error))
                failure = RankFailure(rank, os.getpid(), time.time(), kind, message, trace)
                (folder / f"failure-{rank}.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
                raise


@contextmanager
def rank_of(distributed: DistributedConfig, folder: str) -> Iterator[World]:
    """Join the other ranks for the body, wherever they were started from; `folder` is where rank 0 will write.

    Raises:
        ConfigError: the ranks were given different folders.
    """
    import torch

    world = join_world("cuda" if torch.cuda.device_count() else "cpu", distributed.timeout + 60)
    try:
        folders = sorted(set(world.gather(folder)))
        if len(folders) > 1:
            raise ConfigError(
                f"run_dir: the machines have different ones ({', '.join(folders)}); give run_dir=... "
                "alike on each, on a disk that all of them see"
            )
        world.heartbeat("starting")
        yield world
    finally:
        leave_world()


def threads_of_rank() -> int:
    """Return the CPU threads of this rank: what its launcher gave it, else an even share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# --- Failures ---

BROKE_OFF = "another rank broke off"
"""How the message of a rank begins that ends because another one has failed."""

_LOST = (
    BROKE_OFF,
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""Parts of the errors of a rank that has lost another: never the cause."""


def _tells_of_a_loss(message: str) -> bool:
    return any(words in message for words in _LOST)


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The end of one rank."""

    rank: int
    pid: int
    time: float
    kind: str
    """Name of the exception; empty where the process ended without one."""
    message: str
    traceback: str


def _read_failures(folder: Path) -> dict[int, RankFailure]:
    """Return what the ranks of this machine wrote down when they failed, by rank."""
    found = {}
    for path in folder.glob("failure-*.json"):
        with suppress(OSError, ValueError):  # one that was killed while it wrote
            failure = RankFailure(**json.loads(path.read_text(encoding="utf-8")))
            found[failure.rank] = failure
    return found


def explain(failures: Mapping[int, RankFailure], *, hang: str | None, logs: Path) -> AgentftError:
    """Return the error that the job ends with: one that a rank raised for the user as it was, else a `RankError`."""
    if hang is not None:
        return RankError(f"{hang}. The output of the ranks is in {logs}")
    first = min(failures.values(), key=lambda each: (_tells_of_a_loss(each.message), each.time, each.rank))
    raised = getattr(errors, first.kind, None)
    if isinstance(raised, type) and issubclass(raised, AgentftError):
        again: AgentftError = raised(first.message)
        return again
    others = sorted(rank for rank in failures if rank != first.rank)
    seen = f"; then rank {', '.join(map(str, others))} lost the connection to it" if others else ""
    what = f"{first.kind}: {first.message}" if first.kind else first.message
    stack = f"{first.traceback}\n" if first.traceback else ""
    return RankError(
        f"{stack}rank {first.rank} (pid {first.pid}) failed first: {what}{seen}. The output of the ranks is in {logs}"
    )


# --- Hangs ---


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The progress of a rank at a time; ranks that wait for another have named the exchange they wait in."""

    rank: int
    time: float
    pid: int
    where: str


def _read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the newest heartbeat of each rank of this machine."""
    found = []
    for path in folder.glob("rank-*"):
        with suppress(OSError, ValueError):  # one that is just being written is read the next time
            moment, pid, where = path.read_text(encoding="utf-8").rstrip("\n").split(" ", 2)
            found.append(Heartbeat(int(path.name.removeprefix("rank-")), float(moment), int(pid), where))
    return sorted(found, key=lambda each: each.rank)


def _kill(heartbeats: Iterable[Heartbeat]) -> None:
    for each in heartbeats:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)


@contextmanager
def _hang_watch(folder: Path, timeout: float) -> Iterator[list[str]]:
    """Look at the heartbeats during the body, and end ranks that hang; the list that it yields then says which was slowest."""
    hangs: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            found = _read_heartbeats(folder)
            if found and time.time() - max(each.time for each in found) > timeout:
                hangs.append(_describe_hang(found, timeout))
                _kill(found)  # the stuck rank would not hear anything gentler, and the others wait for it
                for each in found:
                    (folder / f"rank-{each.rank}").unlink(missing_ok=True)

    thread = threading.Thread(target=watch, name="hang-watch", daemon=True)
    thread.start()
    try:
        yield hangs
    finally:
        done.set()
        thread.join()


def _describe_hang(heartbeats: list[Heartbeat], timeout: float) -> str:
    slowest = min(heartbeats, key=lambda each: each.time)
    others = "".join(f"; rank {each.rank} at {each.where!r}" for each in heartbeats if each is not slowest)
    return (
        f"no rank got anywhere for {timeout:g} s (distributed.timeout): the slowest is rank {slowest.rank} "
        f"(pid {slowest.pid}), at {slowest.where!r} for {time.time() - slowest.time:.0f} s{others}"
    )


# --- Stops ---

_GAVE_UP = 75
"""Exit code of a rank that could not end by itself."""
_STOP = "stop"
"""File by which the agent tells its ranks the number of the signal."""
_LEFT = "left"
"""File of a rank that has stopped: another one that waits for it where Python hears no signal would wait for ever."""
_LISTEN_SECONDS = 0.2
_LAST_SECONDS = 5.0
"""Time of a rank to write down its error, once torch's agent ends it since another one has failed."""
_LATE_SECONDS = 3.0
"""How much later than another rank this one may be told of a stop."""


@contextmanager
def _telling(folder: Path, *, machines: int) -> Iterator[StopSignals]:
    """Pass a stop signal of this process on to its ranks; they end by themselves, and a second Ctrl-C ends them at once.

    Raises:
        StopSignal: it came before the ranks of several machines had met, which may take for ever.
    """

    def tell(number: signal.Signals, insists: bool) -> None:
        (folder / _STOP).write_text(f"{int(number)}\n", encoding="ascii")
        if insists:
            _kill(_read_heartbeats(folder))
            raise StopSignal(number)
        if machines > 1 and not any(folder.glob("rank-*")):
            raise StopSignal(number, " before the machines had met")

    with StopSignals.shared() as signals, signals.deferred(tell):
        signals.raise_if_requested()
        yield signals


@contextmanager
def _obeying(agent: int, folder: Path) -> Iterator[StopSignals]:
    """In a rank: end with the server that it was forked from, and stop when the process `agent` says so in `folder`."""
    die_with(forkserver.server_pid or os.getppid())
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    done = threading.Event()
    with StopSignals() as signals:
        threading.Thread(target=_listen, args=(agent, folder, signals, done), name="stops", daemon=True).start()
        try:
            yield signals
        finally:
            done.set()
            if signals.is_requested():
                (folder / _LEFT).touch()


def as_stop(error: BaseException) -> BaseException:
    """Return what ended this rank: the stop, where `error` only tells that another one has stopped a little earlier."""
    if not _tells_of_a_loss(str(error)):
        return error
    with StopSignals.shared() as signals, signals.deferred():
        until = time.monotonic() + _LATE_SECONDS
        while signals.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return error if signals.requested is None else StopSignal(signals.requested)


def _listen(agent: int, folder: Path, signals: StopSignals, done: threading.Event) -> None:
    """Wait for the agent's file; and for the SIGTERM by which torch's agent ends a rank when another one has failed."""
    told, end = False, float("inf")
    while True:
        if _is_ended_by(agent):
            end = min(end, time.monotonic() + (0.0 if done.is_set() else _LAST_SECONDS))
        if told and not signals.is_requested() and end == float("inf") and (folder / _LEFT).exists():
            end = time.monotonic() + _LAST_SECONDS
        if time.monotonic() >= end:
            os._exit(_GAVE_UP)
        with suppress(OSError, ValueError):  # none yet, or it is just being written
            number = int((folder / _STOP).read_text(encoding="ascii"))
            if not told and not done.is_set():
                told = True
                _thread.interrupt_main(signal.Signals(number))  # as if it had come from outside


def _is_ended_by(agent: int) -> bool:
    """Wait a little for SIGTERM, and say whether that process sent one."""
    if sys.platform != "linux":
        time.sleep(_LISTEN_SECONDS)
        return False
    info = signal.sigtimedwait([signal.SIGTERM], _LISTEN_SECONDS)
    return info is not None and info.si_pid == agent
