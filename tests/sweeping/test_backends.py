"""Other launchers: whoever starts the jobs, the run folders, the results, the deaths and the table are the same."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentft.errors import ConfigError
from agentft.sweeping.launcher import SlurmOptions, read_options
from tests.sweeping.watching import is_alive, wait_for

REPOSITORY = Path(__file__).parents[2]


def needs(package: str) -> pytest.MarkDecorator:
    try:
        there = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        there = False
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


SLURM = pytest.param(["hydra/launcher=slurm", "hydra.launcher.cluster=local"], id="slurm", marks=needs("submitit"))
RAY = pytest.param(["hydra/launcher=ray"], id="ray", marks=[needs("ray"), pytest.mark.slow, pytest.mark.timeout(900)])


@pytest.mark.parametrize("launcher", [SLURM, RAY])
def test_deaths_in_a_queue_are_survived_and_named_and_only_they_are_repeated(sweep: Any, launcher: list[str]) -> None:
    done = sweep.launch("act=ok,raise,kill,exit", *launcher)
    assert done.returncode == 1
    jobs = sweep.jobs()
    assert [jobs[i]["state"] for i in range(4)] == ["finished", *["failed"] * 3]
    assert jobs[1]["reason"] == "exit code 1: ValueError: a broken thing"
    assert (jobs[2]["reason"], jobs[2]["signal"]) == ("killed by SIGKILL (out of memory?)", "SIGKILL")
    assert jobs[3]["exit_code"] == 3
    assert "ValueError: a broken thing" in (sweep.folder / "out/1/job.log").read_text()

    (sweep.folder / "mended").touch()
    done = sweep.launch("act=ok,raise,kill,exit", *launcher)
    assert done.returncode == 0, done.stderr
    assert [sweep.jobs()[i]["attempts"] for i in range(4)] == [1, 2, 2, 2]


@pytest.mark.parametrize("launcher", [SLURM, RAY])
def test_stopping_the_launcher_ends_what_it_has_in_a_queue(sweep: Any, launcher: list[str]) -> None:
    process = sweep.start("act=sleep,ok", *launcher, "hydra.launcher.slots=1", "hydra.launcher.grace=5")
    pids = sweep.folder / "out/0/pids"
    wait_for(lambda: pids.exists() and pids.read_text().count(" "), 240)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())
    assert (sweep.folder / "out/0/asked").exists(), "asked as by Ctrl-C first"
    jobs = sweep.jobs()
    assert [(jobs[i]["state"], jobs[i]["reason"]) for i in range(2)] == [
        ("stopped", "stopped by SIGTERM"),
        ("waiting", None),
    ]


@pytest.mark.slow
@needs("submitit")
def test_a_time_limit_counts_from_the_begin_of_the_job_in_the_queue(sweep: Any) -> None:
    limit = ["hydra.launcher.time_limit=0.02", "hydra.launcher.grace=2"]
    done = sweep.launch("act=sleep", *SLURM.values[0], *limit)
    assert done.returncode == 1
    assert sweep.jobs()[0]["reason"] == "time limit of 0.02 minutes"


@needs("submitit")
def test_the_command_is_started_once_on_each_node_and_told_which_it_is(sweep: Any) -> None:
    done = sweep.launch("text=a", *SLURM.values[0], "hydra.launcher.nodes=2")
    assert done.returncode == 0, done.stderr
    assert "node 0 of 2" in (sweep.folder / "out/0/job.log").read_text()
    assert "node 1 of 2" in (sweep.folder / "out/0/job.log.node1").read_text()


INTERRUPTED = """
import os, sys, time
from pathlib import Path
if Path("saved").exists():
    print("went on")
    sys.exit(0)
try:
    Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(100)
except KeyboardInterrupt:
    time.sleep(0.5)
    Path("saved").touch()
    raise
"""


@needs("submitit")
def test_a_job_whose_time_runs_out_saves_and_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM announces the end by a signal to the agent; submitit puts the job back into the queue."""
    from agentft.sweeping.jobs import Job

    monkeypatch.chdir(tmp_path)
    Path("job.py").write_text(INTERRUPTED)
    options = read_options({"place": "slurm", "cluster": "local"})
    executor = options.make_executor(options.make_slots(1)[0], tmp_path, (), print)
    job = Job(folder=tmp_path / "0", number=0, config_hash="", overrides=[], swept=[], settings={}, threads=1)
    job.folder.mkdir()
    job.command = [sys.executable, "job.py"]
    attempt = executor.start(job)
    wait_for(lambda: Path("pids").exists() and Path("pids").read_text().count(" "), 240)
    os.kill(int(Path("pids").read_text().split()[1]), signal.SIGUSR2)
    wait_for(lambda: attempt.poll() is not None, 240)
    assert attempt.poll() == 0, attempt.lost
    log = (job.folder / "job.log").read_text()
    assert log.count(f"$ {job.command_line}\n") == 2
    assert "went on" in log


@needs("submitit")
def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch` is a program here that keeps what it is given: the file that a real one would read."""
    kept = tmp_path / "kept"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat "$1" >> {kept}\necho Submitted batch job 7\n')
    for name in ("srun", "sacct", "scancel"):
        (program.parent / name).write_text("#!/bin/sh\n")
    for path in program.parent.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    values = {"nodes": 2, "gpus_per_node": 4, "threads_per_job": 16, "memory_gb": 64.0, "minutes": 90}
    named = {"partition": "gpu", "account": "lab", "setup": ["module load cuda"], "parameters": {"mail-type": "END"}}
    options = read_options({"place": "slurm"} | values | named)
    executor = options.make_executor(options.make_slots(3)[0], tmp_path, (), print)
    from agentft.sweeping.jobs import Job

    job = Job(
        folder=tmp_path / "lora_grid" / "0_a", number=0, config_hash="", overrides=[], swept=[], settings={}, threads=16
    )
    job.folder.mkdir(parents=True)
    executor.start(job)
    asked = kept.read_text()
    for line in (
        *("--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--cpus-per-task=16", "--mem=64GB", "--time=90"),
        *("--partition=gpu", "--account=lab", "--mail-type=END", "--job-name=lora_grid_0_a"),
    ):
        assert f"#SBATCH {line}\n" in asked
    assert "\nmodule load cuda\n" in asked


def test_an_unknown_place_and_no_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="place=moon"):
        read_options({"place": "moon"})
    with pytest.raises(ConfigError, match="slots=0"):
        read_options({"place": "slurm", "slots": 0})
    assert len(SlurmOptions().make_slots(12)) == 12, "waiting is the queue's work"


# --- The contract, by the real program ---

TINY = [
    *("model=tiny", "tracking=disabled", "dataset.conversations=8", "dataset.heldout=2", "dataset.max_length=8192"),
    *(
        "training.gradient_accumulation_steps=2",
        "training.logging_steps=1",
        "evaluation.before=false",
        "evaluation.max_new_tokens=4",
    ),
    *(
        "evaluation.eval_steps=2",
        "evaluation.bootstrap_samples=100",
        "evaluation.best_metric=loss",
        "training.max_steps=2",
        "threads=1",
    ),
]
LAUNCHERS = [
    pytest.param(["hydra.launcher.warm_start=false"], id="agentft, fresh interpreters"),
    pytest.param(["hydra.launcher.slots=2", "hydra.launcher.threads_per_job=1"], id="agentft, two at a time"),
    SLURM,
    RAY,
    pytest.param(["hydra/launcher=basic"], id="Hydra's own"),
    pytest.param(
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        id="joblib",
        marks=needs("hydra_plugins.hydra_joblib_launcher"),
    ),
]


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_sweep(tmp_path_factory.mktemp("default"), [])


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_runs_and_the_same_table(
    by_default: Path, launcher: list[str], tmp_path: Path
) -> None:
    other = run_sweep(tmp_path, launcher)
    names = ["0_rank-2", "1_rank-4"]
    for sweep in (by_default, other):
        assert sorted(path.name for path in sweep.iterdir() if (path / "status.json").exists()) == names
    for name in names:
        assert results_of(other / name) == results_of(by_default / name)
    assert table_of(other) == table_of(by_default)


def run_sweep(folder: Path, launcher: list[str], grid: tuple[str, ...] = ("sft_type.rank=2,4",)) -> Path:
    where = "hydra.sweep.dir=sweep"
    command = [sys.executable, str(REPOSITORY / "train.py"), "-m", *grid, *TINY, where, *launcher]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "sweep"


def results_of(run: Path) -> dict[str, Any]:
    """What a run came to, without where and how fast."""
    record = json.loads((run / "run.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run / "metrics" / "after.json").read_text())
    return {
        "losses": [{key: value for key, value in row.items() if "loss" in key or key == "step"} for row in metrics],
        "scores": {key: value for key, value in scores.items() if key != "seconds"},
        "weights": (run / "final" / "adapter_model.safetensors").read_bytes(),
        "sweep": Path(record["sweep"]).name,
        "data": record["data_fingerprint"],
    }


def table_of(sweep: Path) -> list[dict[str, str]]:
    from agentft.comparison.ranking import csv_text, rank
    from agentft.comparison.runs import read_runs

    rows = list(csv.DictReader(csv_text(rank(read_runs([sweep]))).splitlines()))
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes", "folder")} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@needs("hydra_plugins.hydra_optuna_sweeper")
def test_optuna_proposes_and_our_launcher_runs(tmp_path: Path) -> None:
    wishes = ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "hydra.sweeper.direction=maximize"]
    grid = ("sft_type.rank=choice(2,4)", "training.learning_rate=tag(log,interval(1e-4,1e-2))")
    sweep = run_sweep(tmp_path, ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1", *wishes], grid)
    jobs = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/job.json"))]
    assert [job["state"] for job in jobs] == ["finished"] * 3
    rates = {next(word for word in job["overrides"] if word.startswith("training.learning_rate")) for job in jobs}
    assert len(rates) == 3
    assert "best_params" in (sweep / "optimization_results.yaml").read_text()
    assert len(table_of(sweep)) == 3
