"""A whole training on two ranks, from the command to the run folder: killed in the middle, started again, moved."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentft.distributed.config import DistributedConfig, EngineKind, choose_topology
from agentft.errors import ConfigError
from agentft.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [
    *(
        "model=tiny",
        "model.shape.hidden=32",
        "model.shape.intermediate=64",
        "dataset.conversations=12",
        "dataset.heldout=3",
    ),
    *(
        "training.gradient_accumulation_steps=2",
        "training.max_steps=6",
        "training.logging_steps=1",
        "training.save_steps=1",
    ),
    *("evaluation.eval_steps=0", "evaluation.before=false", "evaluation.max_new_tokens=4", "sft_type.dropout=0"),
    *("tracking=disabled", "threads=1", "training.learning_rate=0.01"),
]
pytestmark = pytest.mark.timeout(1800)


def _command(run: Path, *settings: str) -> list[str]:
    return [sys.executable, "train.py", *TINY, f"run_dir={run}", *settings]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def _ranks_of(agent: int) -> list[int]:
    """Return the processes that are forked from the agent's server, by parent."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return [rank for server in children.get(agent, []) for rank in children.get(server, [])]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "elsewhere"])
def test_a_killed_rank_starts_again_from_the_last_checkpoint_and_one_process_goes_on_elsewhere(tmp_path, goes_on):
    """The ranks find an empty cache, too, and build the model once: not again when they start again."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    log = (tmp_path / "out").open("w")
    agent = subprocess.Popen(
        _command(
            run,
            "distributed=ddp",
            "distributed.nproc=2",
            "distributed.elastic.max_restarts=1",
            "training.pause_at_fraction=0.7",
        ),
        cwd=ROOT,
        env=_environment() | {"AGENTFT_CACHE": str(cache)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    while not list(run.glob("checkpoints/step-*")):
        assert agent.poll() is None, (tmp_path / "out").read_text()[-2000:]
        time.sleep(0.05)
    ranks = _ranks_of(agent.pid)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    assert agent.wait() == 0, (tmp_path / "out").read_text()[-3000:]
    assert "resuming from" in (run / "train.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "paused"
    assert (run / "final" / "adapter_model.safetensors").is_file()
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 2, 3, 4], "each step once, though the rank died after the first"
    _assert_built_once(run, cache)
    if not goes_on:
        return

    # The rest on one process, in the same folder.
    elsewhere = _command(run, "distributed=single")
    done = subprocess.run(elsewhere, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming with changed setting ranks: 2 -> 1" in (run / "train.log").read_text()
    whole = tmp_path / "whole"
    done = subprocess.run(_command(whole), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _losses(run) == pytest.approx(_losses(whole), rel=2e-6)
    assert len(_losses(run)) == 6


def test_settings_that_cannot_run_are_refused_before_anything_loads(tmp_path):
    run = tmp_path / "run"
    command = _command(run, "distributed=ddp", "distributed.nproc=2", "training.gradient_accumulation_steps=3")
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be shared evenly by 2 ranks" in done.stderr
    assert not run.exists() or not list(run.glob("*.log"))


# --- An empty cache ---------------------------------------------------------------------------------------------------

ENGINES = ["fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]


def _train_from_an_empty_cache(tmp_path: Path, *settings: str) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    short = ["distributed.nproc=2", "training.max_steps=1", f"run_dir={run}"]
    done = subprocess.run(
        [sys.executable, "train.py", *settings, *short],
        cwd=ROOT,
        env=_environment() | {"AGENTFT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_built_once(run, cache)


def _assert_built_once(run: Path, cache: Path) -> None:
    (model,) = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert (model / "model.safetensors").is_file()
    logs = (run / "train.log").read_text() + (run / "ranks" / "rank-1.log").read_text()
    assert logs.count(f"building {model} once") == 1, logs


@pytest.mark.slow  # by default with ddp alone, above, where a rank is killed
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
def test_ranks_that_find_an_empty_cache_build_the_model_once(tmp_path, engine):
    if engine.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    _train_from_an_empty_cache(tmp_path, *TINY, f"distributed={engine}")


@pytest.mark.slow
def test_ranks_that_find_an_empty_cache_convert_the_default_model_once(tmp_path):
    kept = [each for each in TINY if not each.startswith("model")]
    _train_from_an_empty_cache(tmp_path, *kept, "distributed=ddp")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _all_end_well(commands: list[list[str]]) -> None:
    """Run programs side by side."""
    running = [
        subprocess.Popen(
            each, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for each in commands
    ]
    printed = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(commands), "\n".join(
        text[-2000:] for text in printed
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    """Losses of one process."""
    whole = tmp_path_factory.mktemp("whole") / "run"
    _all_end_well([_command(whole)])
    return _losses(whole)


@pytest.mark.slow
def test_torchrun_starts_the_same_ranks(tmp_path, expected):
    worker = ["-m", "agentft.worker", *TINY, f"run_dir={tmp_path / 'run'}", "distributed=fsdp"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _all_end_well([[*torchrun, *worker]])
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_torchrun_on_two_machines_trains_one_model(tmp_path, expected):
    """Two agents of torchrun stand for two machines: the line of docs/distributed.md."""
    worker = ["-m", "agentft.worker", *TINY, f"run_dir={tmp_path / 'run'}", "distributed=ddp"]
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *endpoint]
    _all_end_well([[*torchrun, *worker]] * 2)
    assert _losses(tmp_path / "run") == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_bare_hosts_train_one_model(tmp_path, expected):
    """The same command twice stands for two hosts: the line of docs/distributed.md."""
    run = tmp_path / "run"
    nodes = ["distributed.nproc=1", "distributed.nnodes=2", f"distributed.rdzv_endpoint=127.0.0.1:{_free_port()}"]
    _all_end_well([_command(run, "distributed=ddp", *nodes)] * 2)
    assert _losses(run) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("n1,n2", "n1"), ("rack[2,4]-ib", "rack2-ib"), ("login", "login")],
)
def test_machines_meet_at_the_first_host_that_slurm_names(nodes, first):
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}
    places = choose_topology(
        DistributedConfig(name="ddp", engine=EngineKind.ddp, nproc=4), gpus=0, job="x", environ=step
    )
    assert (places.ranks, places.node, places.job, places.endpoint.partition(":")[0]) == (8, 1, "7.0", first)


def test_restarts_of_torchrun_over_machines_need_a_store_for_each_attempt(monkeypatch):
    from agentft.runtime import join_world

    for name, value in {"GROUP_WORLD_SIZE": "2", "MAX_RESTARTS": "3", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name if name.startswith("GROUP") else f"TORCHELASTIC_{name}", value)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        join_world("cpu", 1)


@pytest.mark.slow
def test_two_nodes_of_a_slurm_sweep_train_one_model(tmp_path):
    """submitit's local executor stands for two nodes, each with one rank."""
    pytest.importorskip("submitit")
    sweep = tmp_path / "sweep"
    command = [
        *(sys.executable, "train.py", "-m", *TINY, "hydra/launcher=slurm", "hydra.launcher.cluster=local"),
        *(
            "hydra.launcher.nodes=2",
            f"hydra.sweep.dir={sweep}",
            "distributed=ddp",
            "distributed.nproc=1",
            "sft_type.rank=4",
        ),
    ]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    (run,) = {path.parent for path in sweep.glob("**/metrics.jsonl")} or {sweep}
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run / "run.json").read_text())["choices"]["distributed"] == "ddp"
    whole = tmp_path / "whole"
    alone = _command(whole, "sft_type.rank=4")
    subprocess.run(alone, cwd=ROOT, env=_environment(), capture_output=True, check=True)
    assert _losses(run) == pytest.approx(_losses(whole), rel=2e-6)


def test_a_rank_with_nothing_to_evaluate_trains_on_with_the_others(tmp_path):
    """One held-out conversation on two ranks: what FSDP gathers ahead must not follow from a rank's own evaluation."""
    settings = ["distributed=fsdp", "distributed.nproc=2", "dataset.heldout=1", "evaluation.before=true"]
    rest = ["training.max_steps=2", "evaluation.after=false", "distributed.timeout=60"]
    command = _command(tmp_path / "run", *settings, *rest)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr
    assert len(_losses(tmp_path / "run")) == 2
