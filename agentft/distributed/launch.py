"""One function that starts the ranks of a job and comes back with rank 0's result.

The program composes its configuration once and stays as the agent of its machine: torch's `elastic_launch` starts the
ranks, starts them again where `elastic.max_restarts` allows it, and ends them all when one has died. Each rank is a fresh
process that gets the resolved configuration as text. Between machines the agents meet at `LaunchTopology.endpoint`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentft.distributed.config import DistributedConfig, LaunchTopology
from agentft.distributed.forkserver import fork_server
from agentft.distributed.stops import (
    GAVE_UP,
    RankFailure,
    as_stop,
    explain,
    hang_watch,
    obeying,
    read_failures,
    telling,
)
from agentft.errors import RankError
from agentft.runtime import available_cores
from agentft.secrets import redact_text
from agentft.signals import STARTED_BY, StopSignal
from agentft.world import HEARTBEAT_VARIABLE

Entry = Callable[[str], Any]
"""A top-level function that runs one rank: resolved configuration -> a small result that can be pickled."""

_ELASTIC = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*")
"""Variables by which torch tells a rank who it is."""

_LOUD = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",  # these have levels of their own
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.multiprocessing.spawn",
)
"""Loggers of torch's agent."""


def start_ranks(
    entry: Entry,
    payload: str,
    topology: LaunchTopology,
    config: DistributedConfig,
    *,
    folder: Path,
    threads: int | None,
) -> Any:
    """Run `entry(payload)` on every rank of this machine and return the result of its first.

    Args:
        entry: What each rank runs.
        payload: The resolved configuration.
        topology: How many ranks, and where the machines meet.
        config: Time limits and restarts.
        folder: The run folder; the output of ranks besides rank 0 goes into its `ranks/`.
        threads: CPU threads of a rank; null: the cores shared out evenly.

    Raises:
        RankError: a rank died, hung, or the machines did not meet; the failed rank's traceback comes first.
        StopSignal: a signal to this process ended the job; its ranks have saved what they could, and ended.
        AgentftError: whatever a rank raised for the user.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = folder / "ranks"
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
        max_restarts=config.elastic.max_restarts,
        monitor_interval=0.2,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
        shutdown_timeout=config.elastic.grace,
        signals_to_handle="",  # they are heard by `telling`, and torch would end ranks in the middle of their save
    )
    for name in _LOUD:  # `explain` says what happened; torch would print several screens of it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.stdout.flush()
    if topology.nnodes > 1:
        # A store of its own for every attempt: the agents of several machines count attempts differently.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="agentft-ranks-", ignore_cleanup_errors=True) as temporary,
        telling(heartbeats := Path(temporary), machines=topology.nnodes) as signals,
        hang_watch(heartbeats, config.timeout) as hangs,
    ):
        share = threads or max(1, available_cores() // topology.nproc)
        environment = {
            **os.environ,
            HEARTBEAT_VARIABLE: str(heartbeats),
            "OMP_NUM_THREADS": str(share),
            STARTED_BY: "agent",
        }
        try:
            with fork_server([entry.__module__], for_ranks=True):  # torch is loaded once on each machine
                results = elastic_launch(launch, _run_rank)(entry, payload, environment, os.getpid())
        except ChildFailedError as error:
            if all(failure.exitcode == GAVE_UP for failure in error.failures.values()):
                signals.raise_if_requested()
            failures = read_failures(heartbeats)
            for rank, failure in error.failures.items():
                failures.setdefault(rank, RankFailure.of_exit(rank, failure.pid, failure.exitcode))
            raise explain(failures, hang=hangs[-1] if hangs else None, logs=logs) from None
        except RendezvousError as error:
            raise RankError(f"the {topology.nnodes} machines did not meet at {topology.endpoint}: {error}") from error
    first = results[min(results)]
    if isinstance(first, StopSignal):
        raise first
    return first


def _run_rank(entry: Entry, payload: str, environment: Mapping[str, str], agent: int) -> Any:
    """Run one rank; what it raises is written down for the agent before the process ends.

    A stop is returned: for torch's agent an error of one rank is a reason to end the others, which may still save.

    The server that ranks are forked from has the environment of the first job in this program; this is the present one.
    """
    os.environ.update({name: value for name, value in environment.items() if not _ELASTIC.fullmatch(name)})
    with obeying(agent, Path(os.environ[HEARTBEAT_VARIABLE])) as signals:
        try:
            return entry(payload)
        except BaseException as error:
            with signals.deferred():
                if isinstance(stop := as_stop(error), StopSignal):
                    return stop
                _write_failure(error, Path(os.environ[HEARTBEAT_VARIABLE]))
                raise


def _write_failure(error: BaseException, folder: Path) -> None:
    record = {
        "time": time.time(),
        "pid": os.getpid(),
        "kind": type(error).__name__,
        "message": redact_text(str(error)),
        "traceback": redact_text("".join(traceback.format_exception(error))),
    }
    rank = os.environ.get("RANK", "0")
    (folder / f"failure-{rank}.json").write_text(json.dumps(record), encoding="utf-8")
