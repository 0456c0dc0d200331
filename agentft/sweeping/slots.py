"""The places where jobs run: which GPUs and how many CPU threads each may use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentft.errors import ConfigError
from agentft.runtime import available_cores


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the places; it holds one job at a time."""

    number: int
    gpus: tuple[str, ...] | None
    """As `CUDA_VISIBLE_DEVICES` names them; none of them: no GPU; None: nothing is said to the job."""
    threads: int

    def environment(self, threads: int | None = None) -> dict[str, str]:
        """The variables that keep a job inside its slot."""
        count = str(threads or self.threads)
        devices = {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        # NumPy's pool would start at its import, where jobs are forked; nothing heavy is left to it.
        numpy = {"OPENBLAS_NUM_THREADS": "1"}
        return devices | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "RAYON_NUM_THREADS": count} | numpy


def make_slots(
    slots: int | None, gpus_per_job: int, threads_per_job: int | None, gpus: list[str], cores: int | None = None
) -> list[Slot]:
    """Share GPUs and cores out; no two slots have a GPU in common.

    Raises:
        ConfigError: more is asked for than there is.
    """
    cores = cores or available_cores()
    on_gpu = bool(gpus) and gpus_per_job > 0
    if not on_gpu and gpus_per_job > 1:
        raise ConfigError(f"hydra.launcher.gpus_per_job={gpus_per_job}: no GPU is visible")
    if on_gpu:
        most = len(gpus) // gpus_per_job
        if most == 0 or (slots or 0) > most:
            raise ConfigError(
                f"hydra.launcher: {slots or 1} slot(s) with {gpus_per_job} GPU(s) each, but {len(gpus)} GPU(s) are visible"
            )
        slots = slots or most
    slots = slots or (max(1, cores // threads_per_job) if threads_per_job else 1)
    threads = threads_per_job or max(1, cores // slots)

    def share(i: int) -> tuple[str, ...] | None:
        if on_gpu:
            return tuple(gpus[i * gpus_per_job : (i + 1) * gpus_per_job])
        # Where no GPU was found, one may be there all the same: only `gpus_per_job=0` hides it.
        return () if gpus_per_job == 0 else None

    return [Slot(i, share(i), threads) for i in range(slots)]


def visible_gpus(environ: Mapping[str, str] | None = None) -> list[str]:
    """The GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` takes; asked without torch."""
    named = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found = []
        for name in (part.strip() for part in named.split(",")):
            if not name or name.startswith("-"):  # CUDA ignores the rest
                break
            found.append(name)
        return found
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    parts = re.findall(r"UUID: (MIG-[^)\s]+)", listed)
    return parts or re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)
