"""A job of SLURM that is about to lose its place asks to be queued again; it goes on where it saved."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping

log = logging.getLogger(__name__)

REQUEUED_BY_LAUNCHER = "AGENTFT_REQUEUED_WITH"
"""Set by a sweep's launcher for its jobs: the SLURM job that the launcher itself queues again, once for all of them."""


def job_id(environ: Mapping[str, str] | None = None) -> str | None:
    """Return what `scontrol` calls this job: `1234`, of a job array `1234_7`; None outside of SLURM."""
    variables = os.environ if environ is None else environ
    array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else variables.get("SLURM_JOB_ID") or None


def is_batch_job(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this is a job that SLURM can start again by itself: not a session of `salloc`."""
    variables = os.environ if environ is None else environ
    return job_id(variables) is not None and variables.get("SLURM_JOB_NAME") != "interactive"


def requeue() -> bool:
    """Ask SLURM to queue this job again, and say whether it agreed; the log tells why not.

    Only one process of a job asks: the first task, and of a sweep the launcher.
    """
    job = job_id()
    if job is None or os.environ.get(REQUEUED_BY_LAUNCHER) == job or os.environ.get("SLURM_PROCID", "0") != "0":
        return False
    if shutil.which("scontrol") is None:
        log.error("SLURM job %s is not queued again: there is no scontrol here; submit it again by hand", job)
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("SLURM job %s is not queued again: %s; submit it again by hand", job, error)
        return False
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        log.error("SLURM job %s is not queued again: scontrol says %r; submit it again by hand", job, words)
        return False
    log.warning("SLURM job %s is queued again", job)
    return True
