"""Name, lock and write the files of a run folder.

The only place that knows the layout, which docs/run_folder.md shows. Every file written here is whole or absent, strict
JSON where it is JSON, and free of the secrets of the environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import socket
import subprocess
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from agentft.errors import RunError
from agentft.runtime import available_cores
from agentft.secrets import redact_command, redact_text, redact_tree

RunState = Literal["running", "finished", "failed", "stopped", "paused"]
"""`paused`: `training.pause_at_fraction` or `training.max_hours` ended it, saved and evaluated; it resumes."""

SWEEP_FOLDER_VARIABLE = "AGENTFT_SWEEP_DIR"
"""Environment variable by which a launcher tells its jobs which sweep folder they belong to."""

_log = logging.getLogger(__name__)
_held_locks: set[int] = set()


class RunFolder:
    """The paths of one run folder. `RunFolder(path)` only names them; `create` makes and locks it, `open` checks it."""

    def __init__(self, path: str | os.PathLike[str], *, setting: str = "run_dir") -> None:
        self.path = Path(path).absolute()
        self._setting = setting
        self.config_file = self.path / "config.yaml"
        """The resolved configuration; it loads back and reruns."""
        self.record_file = self.path / "run.json"
        """Where the run comes from: command, git revision, versions, machine, sweep."""
        self.status_file = self.path / "status.json"
        """How far the run is, or how it ended."""
        self.metrics_file = self.path / "metrics.jsonl"
        """Everything that was measured, one line a time."""
        self.summary_file = self.path / "summary.json"
        """The numbers that runs are compared by."""
        self.log_file = self.path / "train.log"
        """Log lines, tracebacks included."""
        self.checkpoints = self.path / "checkpoints"
        """Folder of checkpoints to resume from."""
        self.final = self.path / "final"
        """Folder of the adapter or model at the end, with its tokenizer."""
        self.data_manifest = self.path / "data" / "manifest.json"
        """Fingerprint of the data: sources, counts, which conversations were held out."""
        self.rejected_file = self.path / "data" / "rejected.jsonl"
        """Rows that were set aside, each with file, line and reason."""
        self.wandb_dir = self.path / "wandb"
        """What Weights & Biases keeps on disk; in a sweep it lies in the sweep folder instead."""
        self.lock_file = self.path / ".lock"
        """Locked while a process trains here; holds who that is."""
        self._lock: int | None = None
        self._made_lock = False
        self.begun = False
        """True once this process writes here."""
        self._follows = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, setting: str = "run_dir") -> Self:
        """Make and lock the folder, which the setting `setting` names; in one of a run nothing changes before `begin`."""
        run = cls(path, setting=setting)
        run._take_lock()
        if not run.has_run():
            run.begin()
        return run

    @classmethod
    def follow(cls, path: str | os.PathLike[str]) -> Self:
        """Return the folder of a run that rank 0 of the same job writes: every write here is left out."""
        run = cls(path)
        run._follows = True
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Return the folder of a run that was started before; nothing in it changes and its lock is not taken."""
        run = cls(path)
        missing = [file.name for file in (run.config_file, run.record_file) if not file.is_file()]
        if missing:
            raise RunError(
                f"{run.path} is not a run folder: {' and '.join(missing)} not there; "
                "expected the folder that train.py named, for example runs/<name>"
            )
        return run

    def has_run(self) -> bool:
        """Return whether a run has written its record here."""
        return self.config_file.is_file() and self.record_file.is_file()

    def begin(self) -> None:
        """Write into `.lock` who has the folder: from here on its files change."""
        if self._lock is not None and not self.begun:
            content = json_text({"pid": os.getpid(), "host": socket.gethostname(), "started": utc_now()})
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, content.encode(), 0)
        self.begun = True

    def require_free(self) -> None:
        """Refuse a folder in which another process trains; nothing is written and no lock stays.

        Raises:
            RunError: it is in use.
        """
        import fcntl

        try:
            lock = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            # Shared: the machines of one job may all ask at once.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._in_use(lock) from None
        finally:
            os.close(lock)

    def rank_log(self, rank: int) -> Path:
        """Return the log of a rank other than 0."""
        return self.path / "ranks" / f"rank-{rank}.log"

    def predictions(self, name: str) -> Path:
        """Return the file of answers with their references, one line a step of a dialogue."""
        return self.path / "predictions" / f"{_file_name(name)}.jsonl"

    def metrics(self, name: str) -> Path:
        """Return the file of the scores of `predictions(name)`, with numerators and denominators."""
        return self.path / "metrics" / f"{_file_name(name)}.json"

    def write_text(self, path: Path, text: str) -> None:
        """Replace a file as a whole: a reader, or a crash at any moment, finds the old file or the new one."""
        if self._follows:
            return
        self.begin()
        target = self.path / path
        # A lone surrogate in a model's answer must not cost the file; inside JSON its escape means the same.
        content = redact_text(text).encode("utf-8", errors="backslashreplace")
        try:
            _replace(target, content)
        except OSError as error:
            raise RunError(f"{target}: cannot be written: {error.strerror}") from error

    def write_json(self, path: Path, value: Any) -> None:
        """Replace a JSON file as a whole; see `json_text` for what becomes of NaN."""
        self.write_text(path, json_text(value, indent=2) + "\n")

    def write_record(
        self, *, config_yaml: str, command: list[str], choices: Mapping[str, str] | None, extra: Mapping[str, Any]
    ) -> None:
        """Write `config.yaml` and `run.json`, with `extra` from the caller and the records of earlier starts."""
        self._must_be_held()
        record: dict[str, Any] = {
            "command": redact_command(command),
            "choices": choices,
            "sweep": None if (sweep := sweep_folder()) is None else str(sweep),
            "started": utc_now(),
            **describe_surroundings(),
            "pid": os.getpid(),
        }
        if taken := sorted(record.keys() & extra.keys()):
            raise ValueError(f"write_record(extra=...): {', '.join(taken)} is recorded by agentft itself")
        record |= extra
        if self.record_file.exists():
            before = read_json(self.record_file)
            record["earlier"] = [*before.pop("earlier", []), before]
        self.write_text(self.config_file, config_yaml)
        self.write_json(self.record_file, redact_tree(record))

    def was_started_before(self) -> bool:
        """Return whether `run.json` tells of an earlier start."""
        return self.record_file.exists() and bool(read_json(self.record_file).get("earlier"))

    def add_to_record(self, **fields: Any) -> None:
        """Add to `run.json` what becomes known only after the start."""
        self._must_be_held()
        self.write_json(self.record_file, redact_tree({**read_json(self.record_file), **fields}))

    def update_status(self, state: RunState, **fields: Any) -> None:
        """Replace `status.json`; fields of earlier updates of this process stay until they are given again."""
        self._must_be_held()
        process, before = {"pid": os.getpid(), "host": socket.gethostname()}, {}
        with contextlib.suppress(RunError):
            before = read_json(self.status_file)
        if process != {name: before.get(name) for name in process}:
            before = {"started": utc_now()}
        status = {"state": state, **process, "started": before["started"], "updated": utc_now()}
        self.write_json(self.status_file, {**before, **status, **fields})

    def release(self) -> None:
        """Release the lock for another process; also happens when this one ends, however it ends."""
        if self._lock is not None:
            _held_locks.discard(self._lock)
            if self._made_lock and not self.begun:
                self.lock_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take_lock(self) -> None:
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._made_lock = not self.lock_file.exists()
            lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            what = "nothing can be written there" if self.path.is_dir() else "the folder cannot be made"
            raise RunError(f"{self.path}: {what}: {error.strerror}; choose another {self._setting}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                # Some network file systems know no locks; refusing to train there would help nobody.
                _log.warning("%s cannot be locked (%s): see to it that no other run writes there", self.path, error)
            else:
                refusal = self._in_use(lock)
                os.close(lock)
                raise refusal from None
        _close_locks_in_forked_children()
        _held_locks.add(lock)
        self._lock = lock

    def _in_use(self, lock: int) -> RunError:
        holder = "another process that has only just started"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(os.pread(lock, 4096, 0))
            holder = f"process {content['pid']} on {content['host']}, started {content['started']}"
        return RunError(f"{self.path} is in use by {holder}; wait for it, end it, or choose another {self._setting}")

    def _must_be_held(self) -> None:
        if self._lock is None and not self._follows:
            raise RunError(
                f"{self.path} was opened to read; only the process that made it with RunFolder.create writes its record"
            )


def read_json(path: Path) -> Any:
    """Read what `RunFolder.write_json` wrote; RunError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; expected a file that train.py writes") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}") from error


def sweep_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the folder of the sweep that this process is a job of, if it is one."""
    named = (os.environ if environ is None else environ).get(SWEEP_FOLDER_VARIABLE)
    return Path(named).absolute() if named else None


def readable(path: Path) -> str:
    """Return `path` relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _file_name(name: str) -> str:
    if not name or name.startswith(".") or any(letter in name for letter in "/\\\0"):
        raise RunError(f"{name!r} cannot name a file of a run folder; expected a word such as heldout")
    return name


@functools.cache
def _close_locks_in_forked_children() -> None:
    """Close the locks in forks: a data worker that outlives its killed parent must not keep the folder locked."""

    def close() -> None:
        for lock in _held_locks:
            with contextlib.suppress(OSError):
                os.close(lock)
        _held_locks.clear()

    os.register_at_fork(after_in_child=close)


def _replace(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the rename survives a power cut too, where a folder can be synced
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def utc_now() -> str:
    """Return the time in ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return strict JSON that any reader takes: NaN and the infinities, unknown to JSON, become the texts nan, inf, -inf."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case enum.Enum():
            return _plain(value.value)
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            return {str(_plain(key)): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=str)
        case os.PathLike() | datetime():
            return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if callable(scalar := getattr(value, "item", None)):  # a number of numpy or torch
        return _plain(scalar())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r:.80}")


def write_out(path: Path, text: str) -> None:
    """Write `text` where the user said, also into a device or a pipe such as `/dev/stdout`; folders are made.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


# --- The surroundings of a run ---

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
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()[:1]
        reason = f"no git checkout with a commit: {said[0] if said else type(error).__name__}"
        return {"revision": None, "dirty": None, "reason": reason}
    return {"revision": revision, "dirty": bool(changed), "changed": changed.splitlines()[:20]}


def _git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A clone may be another user's: its code runs already.
    command = ["git", "-c", "safe.directory=*", "--no-optional-locks", "-C", str(folder), *arguments]
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
