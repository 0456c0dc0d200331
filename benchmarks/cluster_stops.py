"""Stops on a real SLURM: is a training saved that a time limit, scancel or Ctrl-C ends? `make cluster`

    python benchmarks/cluster_stops.py                                  one trial of each kind and shape
    python benchmarks/cluster_stops.py --trials 10 --ledger stops.jsonl ten; begun again, it goes on where it was

Kinds: `limit` is the batch script of docs/reliability.md (`--signal=USR1`, `--requeue`), whose end is moved close once it
trains; `scancel` the same script; `ctrl-c` an `srun --pty` in a terminal (without `--pty` SLURM wants the keys twice, and
kills half a second later: nobody could save). Shapes: one process, two ranks of ddp on one machine, two machines with a rank
each. A stop is saved if the newest checkpoint is whole, the run says `stopped` and which step is saved, and nothing printed a
traceback; after a limit SLURM must have the job in its queue again.

Without a SLURM on the path, or a cluster that the scripts of --cluster can start (as root), it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentft.training.checkpoint import find_damage, list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
JOB = [
    *("model=tiny", "model.shape.hidden=32", "model.shape.intermediate=64", "sft_type.dropout=0", "threads=1"),
    *(
        "dataset.conversations=12",
        "dataset.heldout=3",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=100000",
    ),
    *("training.logging_steps=1", "training.save_steps=0", "evaluation.eval_steps=0", "evaluation.before=false"),
    "tracking=disabled",
]
SHAPES = {
    "single": (["--ntasks=1", "--cpus-per-task=1"], []),
    "ranks": (["--ntasks=1", "--cpus-per-task=2"], ["distributed=ddp", "distributed.nproc=2"]),
    "machines": (["--nodes=2", "--ntasks-per-node=1"], ["distributed=ddp", "distributed.nproc=1"]),
}
KINDS = ("limit", "scancel", "ctrl-c")
WARNING = 60
"""Seconds before the limit at which SLURM sends SIGUSR1; it looks twice a minute."""
PATIENCE = 900.0


class Cluster:
    """Runs SLURM's commands, on the login machine where `folder` has the scripts of one."""

    def __init__(self, folder: Path) -> None:
        self.prefix = [str(folder / "on"), "login"] if (folder / "on").exists() else []

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False, cwd=ROOT)
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """Return SLURM's word for a job, such as `PENDING`."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        return found[1] if found else "GONE"


@contextmanager
def running(folder: Path) -> Iterator[Cluster | str]:
    """Give the cluster, started and ended here where none answers; or the reason why there is none."""
    cluster = Cluster(folder)
    if shutil.which("sinfo") is None:
        yield "no SLURM here: sinfo is not on the path"
    elif "idle" in cluster.run("sinfo", "-h", "-o", "%T"):
        yield cluster
    elif not cluster.prefix or os.geteuid() != 0:
        yield f"no idle machine by sinfo, and no scripts in {folder} that root could start one with (--cluster)"
    else:
        ups = [subprocess.run([folder / f"{name}_up.sh"], check=False).returncode for name in ("netns", "slurm")]
        try:
            yield cluster if not any(ups) else f"the scripts of {folder} could not start a SLURM"
        finally:
            for name in ("slurm", "netns"):
                subprocess.run([folder / f"{name}_down.sh"], check=False)


def trial(cluster: Cluster, kind: str, shape: str, folder: Path, draw: random.Random) -> str:
    """Start a job, stop it at a random moment of its training, and return what is wrong; empty: saved."""
    resources, settings = SHAPES[shape]
    run, said = folder / "run", folder / "said"
    program = [
        "srun",
        *(["--pty"] if kind == "ctrl-c" else []),
        *resources,
        sys.executable,
        str(ROOT / "train.py"),
        *JOB,
        *settings,
        f"run_dir={run}",
    ]
    steps = draw.randrange(1, 12)

    def trains() -> bool:
        return _count(run / "metrics.jsonl", '"train/loss"') >= steps

    if kind == "ctrl-c":
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execvp((cluster.prefix + program)[0], [*cluster.prefix, *program])
        with said.open("wb") as out:
            began, pressed = time.monotonic(), False
            while os.waitpid(pid, os.WNOHANG)[0] == 0:
                if time.monotonic() - began > PATIENCE:
                    os.kill(pid, 9)
                if _readable(terminal):
                    out.write(_read(terminal))
                if not pressed and trains():
                    pressed = True
                    os.write(terminal, b"\x03")
            while _readable(terminal) and (more := _read(terminal)):
                out.write(more)
        os.close(terminal)
        return wrong(run, said)

    script = folder / "job.sh"
    script.write_text("#!/bin/bash\n" + " ".join(program) + "\n")
    options = [
        *resources,
        "--time=60",
        f"--signal=USR1@{WARNING}",
        "--requeue",
        "--open-mode=append",
        f"--output={said}",
    ]
    job = cluster.run("sbatch", "--parsable", *options, str(script)).strip()
    try:
        if not _wait(lambda: trains() or cluster.state(job) not in ("PENDING", "RUNNING")) or not trains():
            return f"did not train: {cluster.state(job)}"
        time.sleep(draw.uniform(0, 1))
        if kind == "scancel":
            cluster.run("scancel", job)
        else:
            end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + WARNING + 60))
            cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={end}")
        _wait(lambda: cluster.state(job) not in ("RUNNING", "COMPLETING"))
        if kind == "limit" and cluster.state(job) != "PENDING":
            return f"not queued again: {cluster.state(job)}; {wrong(run, said)}"
        return wrong(run, said)
    finally:
        cluster.run("scancel", job)


def wrong(run: Path, said: Path) -> str:
    """Return what is wrong with a stopped run; empty: nothing."""
    status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
    checkpoints = list_checkpoints(run / "checkpoints")
    traces = [path.name for path in [said, *run.rglob("*.log")] if _count(path, "Traceback")]
    found = [
        "" if status.get("state") == "stopped" and "which is saved" in status.get("error", "") else f"says {status}",
        "" if checkpoints and find_damage(checkpoints[-1]) is None else "no whole checkpoint",
        f"a traceback in {', '.join(traces)}" if traces else "",
    ]
    return "; ".join(filter(None, found))


def _count(file: Path, words: str) -> int:
    return file.read_text(errors="replace").count(words) if file.exists() else 0


def _wait(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < until:
        time.sleep(0.5)
    return condition()


def _readable(terminal: int) -> bool:
    import select

    return bool(select.select([terminal], [], [], 0.2)[0])


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def main() -> int:
    """Run the trials that the ledger lacks; 1 where a stop was not saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1, help="of each kind and shape")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--ledger", type=Path, default=Path("runs/cluster_stops/ledger.jsonl"))
    parser.add_argument("--cluster", type=Path, default=ROOT.parent / "shared" / "tools" / "cluster")
    given = parser.parse_args()
    ledger = given.ledger.absolute()
    ledger.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(each["kind"], each["shape"], each["trial"]) for each in done}
    with running(given.cluster) as cluster:
        if isinstance(cluster, str):
            print(f"skipped: {cluster}")
            return 0
        # The model is made once, before several processes want it.
        first = [sys.executable, "train.py", *JOB, f"run_dir={ledger.parent / 'first'}", "training.max_steps=1"]
        subprocess.run([*first, "evaluation.after=false"], cwd=ROOT, check=True, capture_output=True)
        for number in range(given.trials):
            for kind in given.kinds.split(","):
                for shape in given.shapes.split(","):
                    if (kind, shape, number) in known:
                        continue
                    folder = ledger.parent / f"{kind}-{shape}-{number}"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    began = time.monotonic()
                    said = trial(cluster, kind, shape, folder, random.Random(f"{kind} {shape} {number}"))
                    line = {"kind": kind, "shape": shape, "trial": number, "wrong": said}
                    line["seconds"] = round(time.monotonic() - began, 1)
                    with ledger.open("a") as out:
                        out.write(json.dumps(line) + "\n")
                    done.append(line)
                    print(f"{kind} {shape} {number}: {said or 'saved'}", flush=True)
    print("| stop | shape | saved |\n|---|---|---|")
    for kind in KINDS:
        for shape in SHAPES:
            found = [not each["wrong"] for each in done if (each["kind"], each["shape"]) == (kind, shape)]
            if found:
                print(f"| {kind} | {shape} | {sum(found)} of {len(found)} |")
    return int(any(each["wrong"] for each in done))


if __name__ == "__main__":
    raise SystemExit(main())
