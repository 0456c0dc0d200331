"""Run a sweep from Hydra's list of overrides to its table: plan the jobs, skip what is done, run the rest, compare."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from agentft.distributed import forkserver
from agentft.errors import ConfigError, RunError
from agentft.runs import SWEEP_FOLDER_VARIABLE, RunFolder, readable
from agentft.signals import REQUEUED_BY_LAUNCHER, StopSignals, requeue_slurm_job, slurm_job_id
from agentft.sweeping.halving import Halving, run_halving
from agentft.sweeping.jobs import LOG, Display, Job, config_hash, earlier_jobs, varying
from agentft.sweeping.runner import Executor, LaunchOptions, Pool, Say, Slot, ThisMachine, make_slots, visible_gpus

_OURS = ("hydra.run.dir", "hydra.mode", "hydra.sweep", "hydra.launcher", "hydra/sweeper", "hydra/launcher")
"""How overrides begin that concern the sweep and not a job."""

_EXPLAINED = 5
"""Failures that are explained: when all fail, they fail alike."""

_RECIPES = {"TrainConfig": "agentft.recipes.train", "EvaluateConfig": "agentft.recipes.evaluate"}
"""Schema of a program's settings -> what its jobs import."""

# --- Settings of the launchers ---


@dataclass(kw_only=True)
class LocalOptions(LaunchOptions):
    """`hydra/launcher=agentft`: processes of this machine."""

    gpus_per_job: int = field(default=1, metadata={"minimum": 0, "maximum": 1024})
    """GPUs of one job, its own while it runs; 0: jobs see no GPU."""
    threads_per_job: int | None = field(default=None, metadata={"minimum": 1, "maximum": 1024})
    """CPU threads of one job; null: the cores shared out among the slots (without a GPU: one slot with all)."""
    warm_start: bool = True
    """Without a GPU, on Linux: fork jobs from one process that has imported the libraries; false: never."""

    def make_slots(self, jobs: int) -> list[Slot]:
        return make_slots(self.slots, self.gpus_per_job, self.threads_per_job, visible_gpus())

    def make_executor(self, slot: Slot, sweep: Path, modules: Sequence[str], say: Say) -> Executor:
        return ThisMachine(modules if self.warm_start else (), slot, say)


@dataclass(kw_only=True)
class _QueueOptions(LaunchOptions):
    """Of launchers that hand jobs to a queue, which knows the machines."""

    threads_per_job: int = field(default=1, metadata={"minimum": 1, "maximum": 1024})
    """Cores of one job, on each of its nodes."""

    def make_slots(self, jobs: int) -> list[Slot]:
        """Return a slot for each job, unless fewer are wanted: waiting is the queue's work."""
        return [Slot(None, self.threads_per_job)] * max(1, min(jobs, self.slots or jobs))


@dataclass(kw_only=True)
class RayOptions(_QueueOptions):
    """`hydra/launcher=ray`: tasks of a Ray cluster."""

    place: str = "ray"
    address: str | None = None
    """Of the cluster (`auto`, `ray://host:10001`); null: RAY_ADDRESS, else Ray is started on this machine."""
    gpus_per_job: int = field(default=0, metadata={"minimum": 0, "maximum": 1024})
    """GPUs of one job."""

    def make_executor(self, slot: Slot, sweep: Path, modules: Sequence[str], say: Say) -> Executor:
        from agentft.sweeping.backends import RayCluster

        return RayCluster(self.address, threads=self.threads_per_job, gpus=self.gpus_per_job, grace=self.grace)


@dataclass(kw_only=True)
class SlurmOptions(_QueueOptions):
    """`hydra/launcher=slurm`: jobs in SLURM's queue, by submitit."""

    place: str = "slurm"
    cluster: str = "slurm"
    """`slurm`, or `local`: processes of this machine stand for nodes."""
    nodes: int = field(default=1, metadata={"minimum": 1, "maximum": 10**5})
    """Nodes of one job; its command is started once on each."""
    gpus_per_node: int = field(default=0, metadata={"minimum": 0, "maximum": 1024})
    """GPUs of one job on each node."""
    memory_gb: float | None = field(default=None, metadata={"above": 0, "maximum": 10**6})
    """Memory of one job on each node; null: SLURM's default."""
    minutes: int = field(default=1440, metadata={"minimum": 1, "maximum": 10**6})
    """SLURM's time limit; shortly before it a job goes back into the queue and resumes from its last checkpoint."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job, such as `module load cuda`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch` by their long names."""

    def make_executor(self, slot: Slot, sweep: Path, modules: Sequence[str], say: Say) -> Executor:
        from agentft.sweeping.backends import Slurm

        local = self.cluster == "local"
        parameters = {  # None is left out, and what is SLURM's is without it
            "nodes": 1 if local else self.nodes,
            "tasks_per_node": self.nodes if local else 1,
            "cpus_per_task": self.threads_per_job,
            "gpus_per_node": self.gpus_per_node or None,
            "mem_gb": self.memory_gb,
            "timeout_min": self.minutes,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": self.setup or None,
            "slurm_additional_parameters": self.parameters or None,
        }
        return Slurm(parameters, sweep, local=local, grace=self.grace)


LAUNCHERS: dict[str, type[LaunchOptions]] = {"agentft": LocalOptions, "ray": RayOptions, "slurm": SlurmOptions}


def read_options(values: Mapping[str, Any]) -> LaunchOptions:
    """Return the options of a launcher of ours from Hydra's values for it.

    Raises:
        ConfigError: there is no such launcher, or a number is outside of its range.
    """
    place = values.get("place")
    if place not in LAUNCHERS:
        raise ConfigError(f"hydra.launcher.place={place}: expected one of {', '.join(LAUNCHERS)}")
    return LAUNCHERS[place](**{name: _plain(value) for name, value in values.items()})


# --- A sweep ---


class SweepLauncher(Launcher):
    """Hydra's launcher for each job of a sweep in a process of its own; `hydra_plugins` names it to Hydra."""

    def __init__(self, **options: Any) -> None:
        self.options = read_options(options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over before `launch`; the task itself runs in the processes."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not finished yet, and return an outcome for each job."""
        from agentft.config.main import full_error  # which has been imported when a sweep begins

        setup_globals()
        options, sweep = self.options, Path(str(self.config.hydra.sweep.dir)).absolute()
        halving = None if options.eta is None else Halving(options.eta, options.rungs)
        slots = options.make_slots(len(job_overrides))
        if (own := slurm_job_id()) is not None:
            os.environ[REQUEUED_BY_LAUNCHER] = own  # for the jobs, which do not ask themselves
        with RunFolder.create(sweep, setting="hydra.sweep.dir"):  # two launchers would start every job twice
            jobs, configs = self._plan(sweep, job_overrides, initial_job_idx, slots[0].threads)
            distinct = list({job.config_hash: job for job in jobs}.values())
            for job in distinct:
                job.write()
            waiting = [job for job in distinct if job.state != "finished"]
            display = Display(sweep, distinct, len(slots))
            before = f", {len(distinct) - len(waiting)} finished before" if len(waiting) < len(distinct) else ""
            share = f"{len(slots[0].gpus)} GPU(s), " if slots[0].gpus else ""
            share += f"{slots[0].threads} thread(s)"
            display.say(f"sweep of {len(distinct)} jobs{before}; {len(slots)} at a time, each with {share}")
            recipe = _RECIPES.get(getattr(OmegaConf.get_type(self.config), "__name__", ""))
            # For a single job, importing once is importing no less.
            modules = ("agentft.config", recipe, *forkserver.LIBRARIES) if recipe and waiting[1:] else ()
            with (
                full_error(),  # jobs have it as it was given
                StopSignals.shared() as signals,
                signals.at_once(),  # one that came while jobs were composed, too; a repetition leaves the report alone
                contextlib.closing(options.make_executor(slots[0], sweep, modules, display.say)) as executor,
                display,
            ):

                def run(due: Sequence[Job]) -> signal.Signals | None:
                    return Pool(slots, options, executor, signals, display).run(due)

                stopped = run(waiting) if halving is None else run_halving(distinct, halving, run, display.say)
            self._report(sweep, distinct, display)
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped == signal.SIGUSR1:  # announced by SLURM: the time is up
            os.environ.pop(REQUEUED_BY_LAUNCHER, None)
            requeue_slurm_job()
        if stopped is not None:
            raise SystemExit(128 + stopped)
        failed = [job for job in distinct if not job.is_done]
        return [outcome_of(job, composed, failed, len(distinct)) for job, composed in zip(jobs, configs, strict=True)]

    def _plan(
        self, sweep: Path, job_overrides: Sequence[Sequence[str]], first_number: int, threads: int
    ) -> tuple[list[Job], list[DictConfig]]:
        """Compose every job, and tell by the hash of its settings whether an earlier launch has it already."""
        known = earlier_jobs(sweep)
        planned: dict[str, Job] = {}
        jobs, configs = [], []
        differing = varying([list(filter_overrides(list(overrides))) for overrides in job_overrides])
        for i, overrides in enumerate(job_overrides):
            composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = first_number + i
            configs.append(composed)
            settings = _settings(composed)
            key = config_hash(settings)
            if key not in planned:  # else `rank=4,4`, or only its folder differs
                folder, record = known.get(key, (None, {}))
                if folder is None:
                    folder = sweep / str(composed.hydra.sweep.subdir)
                    if folder.exists() and any(folder.iterdir()):  # another job has it already
                        folder = folder.with_name(f"{folder.name}_{key[:6]}")
                planned[key] = job = Job(
                    folder=folder,
                    number=first_number + i,
                    config_hash=key,
                    overrides=list(filter_overrides(list(overrides))),
                    swept=differing[i],
                    settings=settings,
                    threads=settings.get("threads") or threads,
                    environment={SWEEP_FOLDER_VARIABLE: str(sweep)},
                )
                job.take_over(record)
                job.command = _command(self.config, overrides, folder)
                if "threads" in settings and settings["threads"] is None:
                    job.command.append(f"threads={job.threads}")
            jobs.append(planned[key])
        return jobs, configs

    def _report(self, sweep: Path, jobs: Sequence[Job], display: Display) -> None:
        """Print and write the table; then print what failed, why, and how to resume."""
        from agentft.compare import write_sweep_tables

        try:
            write_sweep_tables(sweep, display.console)
        except Exception as error:  # the jobs' results are on disk: no fault of a table may cost the sweep its outcome
            display.say(f"no table: {type(error).__name__}: {error}")
        left = [job for job in jobs if not job.is_done]
        display.say(f"sweep folder: {readable(sweep)}")
        if not left:
            return
        display.say(f"{len(left)} of {len(jobs)} jobs are not finished:")
        explained = [job for job in left if job.state == "failed"][:_EXPLAINED]
        for job in left:
            display.say(f"  {job.name}: {job.outcome}")
            if job in explained:
                display.say(f"    log:   {readable(job.folder / LOG)}")
                display.say(f"    alone: {job.command_line}")
        if sum(job.state == "failed" for job in left) > _EXPLAINED:
            display.say("  the others' commands are in their job.json, under `shell`")
        again = [*entry_point(), *sys.argv[1:]]
        if not any(str(o).startswith("hydra.sweep.dir=") for o in self.config.hydra.overrides.hydra):
            again.append(f"hydra.sweep.dir={quoted(readable(sweep))}")  # so that finished jobs are found
        display.say(f"run only these again: {shlex.join(again)}")


def _settings(composed: DictConfig) -> dict[str, Any]:
    """Return everything but Hydra's own node, resolved; that one cannot be before the job runs."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        return {str(name): _plain(composed[name]) for name in composed if name != "hydra"}
    finally:
        HydraConfig.instance().cfg = before


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    return value.name if isinstance(value, Enum) else value


def _command(config: DictConfig, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return what anybody can type to run this job alone."""
    hydra = config.hydra
    flags = []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", readable(Path(source.path))]
    flags += ["--config-name", str(hydra.job.config_name)]
    kept = [str(o) for o in hydra.overrides.hydra if not str(o).lstrip("+~").startswith(_OURS)]
    return [*entry_point(), *flags, *kept, *overrides, f"hydra.run.dir={quoted(readable(folder))}", "hydra.mode=RUN"]


def entry_point() -> list[str]:
    """Return interpreter and program of this process: a script, or a module run with `-m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return [sys.executable, "-m", str(spec.name).removesuffix(".__main__")]
    return [sys.executable, sys.argv[0]]


def quoted(text: str) -> str:
    """Return `text` as the value of a Hydra override."""
    if re.fullmatch(r"[A-Za-z_./][\w./-]*/[\w./-]*", text, flags=re.ASCII):
        return text
    return QuotedString(text=text, quote=Quote.double).with_quotes()


class _FailedJob(JobReturn):
    """Raises its error like Hydra's own, without a line on stderr: the reasons have been printed."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def outcome_of(job: Job, composed: DictConfig, failed: Sequence[Job], total: int) -> JobReturn:
    """Return a job's outcome for Hydra and its sweepers; `failed` are all of the sweep that did not finish."""
    outcome = JobReturn() if job.is_done else _FailedJob()
    outcome.overrides = list(job.overrides)
    outcome.hydra_cfg = OmegaConf.create({"hydra": composed.hydra})
    with open_dict(composed):
        del composed["hydra"]
    outcome.cfg = composed
    outcome.working_dir = str(job.folder)
    outcome.task_name = "agentft"
    outcome.status = JobStatus.COMPLETED if job.is_done else JobStatus.FAILED
    if job.is_done:
        outcome.return_value = job.objective
    else:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in failed[:_EXPLAINED])
        reasons += f"; and {len(failed) - _EXPLAINED} more" if len(failed) > _EXPLAINED else ""
        outcome.return_value = RunError(f"{len(failed)} of {total} jobs failed: {reasons}")
    return outcome
