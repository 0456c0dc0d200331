"""Ranks that fail on purpose, all in one program; test_failures.py says what must be said of them.

python tests/distributed/failing.py <folder> <case>...    prints one JSON line: case -> error, kind, seconds from death to end
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # as the recipes do: loaded once, by the server that ranks are forked from

from agentft.distributed.config import DistributedConfig, ElasticConfig, EngineKind
from agentft.distributed.launch import run_on_ranks
from agentft.errors import AgentftError, ConfigError
from agentft.runtime import World, join_world, leave_world

CASES: dict[str, dict[str, Any]] = {
    "raise": {},
    "user": {},
    "kill": {},
    "hang": {"timeout": 5.0},
    "server": {},
    "restart": {"elastic": ElasticConfig(max_restarts=1)},
    "prepare": {"timeout": 2.5},
    "prepare and hang": {"timeout": 2.5},
}


def rank(payload: str) -> str:
    """Meet the other rank, then do as the case says; rank 1 is the one that fails."""
    case, folder = json.loads(payload)
    world = join_world("cpu", 300)
    world.heartbeat("together")
    world.barrier()
    if case.startswith("prepare"):
        return prepare(case, Path(folder), world)
    if world.rank == 1 and (case != "restart" or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        world.heartbeat("step 3, forward")
        (Path(folder) / f"{case}.died").write_text(str(time.time()))
        match case:
            case "raise":
                raise ValueError(f"a broken thing {os.environ['WANDB_API_KEY']}")
            case "user":
                raise ConfigError("training.epochs=-1: expected a positive number")
            case "kill" | "restart":
                os.kill(os.getpid(), signal.SIGKILL)
            case "server":
                os.kill(os.getppid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
    time.sleep(0.3)
    world.heartbeat("step 3, optimiser")
    world.barrier()
    leave_world()
    return "well"


def prepare(case: str, folder: Path, world: World) -> str:
    """Rank 0 works, or sleeps, for longer than the watch allows without a mark; the other waits for it."""
    with world.keep_alive("preparing"):
        if world.is_main:
            (folder / f"{case}.died").write_text(str(time.time()))
            end = time.time() + 5
            while time.time() < end:
                time.sleep(0.05 if case == "prepare" else 600)
                sum(range(200_000))
        world.barrier()
    leave_world()
    return "well"


def measure(case: str, folder: Path) -> dict[str, Any]:
    config = dataclasses.replace(DistributedConfig(name="test", engine=EngineKind.ddp, nproc=2), **CASES[case])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks, whatever the machine has
    try:
        result = run_on_ranks(rank, json.dumps([case, str(folder)]), config, folder=str(folder), threads=1)
    except AgentftError as error:
        died = float((folder / f"{case}.died").read_text())
        return {"error": str(error), "kind": type(error).__name__, "seconds": time.time() - died}
    return {"result": result}


if __name__ == "__main__":
    print(json.dumps({case: measure(case, Path(sys.argv[1])) for case in sys.argv[2:]}))
