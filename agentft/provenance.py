"""Record where a run was made: the code's revision, the versions and the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

from agentft.runtime import available_cores

DISTRIBUTION = "agentft-hydra"
"""Name of this project's package; what is imported is called `agentft`."""

_PACKAGES = (
    *(DISTRIBUTION, "torch", "transformers", "tokenizers", "peft", "safetensors", "gguf", "accelerate", "deepspeed"),
    *("flash-attn", "bitsandbytes", "modelscope", "datasets", "pyarrow", "numpy", "rouge-score"),
    *("hydra-core", "omegaconf", "wandb", "rich", "liger-kernel"),
)
_ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "LANG", "LC_ALL", "SLURM_JOB_ID"),
    *("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)


def describe_surroundings() -> dict[str, Any]:
    """Return what `run.json` records of code, versions, machine and environment."""
    return {
        "git": git_state(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": available_cores()},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "working_folder": str(Path.cwd()),
    }


def git_state() -> dict[str, Any]:
    """Revision of the agentft checkout and whether tracked files differ from it; the reason where there is none."""
    package = Path(__file__).parent
    try:
        # An installed agentft may lie inside some other project's repository: only one that tracks this file counts.
        _git(package, "ls-files", "--error-unmatch", Path(__file__).name)
        revision = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    except subprocess.CalledProcessError:
        return {"revision": None, "dirty": None, "reason": "agentft does not run from a git checkout with a commit"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"revision": None, "dirty": None, "reason": f"git cannot be asked: {type(error).__name__}"}
    return {"revision": revision, "dirty": bool(changed), "changed": changed.splitlines()[:20]}


def _git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    return done.stdout.strip("\n")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change a result; those not installed are left out."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
