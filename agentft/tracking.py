"""Log a run while it trains: into `metrics.jsonl` in the run folder, and to Weights & Biases.

`metrics.jsonl` is the truth that runs are compared by: it survives SIGKILL, and every mode of W&B writes it. W&B shows
the same numbers in a dashboard; an error there is a line in the log and never the end of a training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from agentft.errors import ConfigError, RunError
from agentft.runs import RunFolder, json_text, read_json, sweep_folder
from agentft.secrets import redact_command, redact_text, redact_tree
from agentft.settings import Settings, environment_variables

_log = logging.getLogger(__name__)

STEP = "train/global_step"
"""The axis of every curve: steps of the optimiser. W&B's own step starts at 0 again when an offline run is resumed."""


class TrackingMode(StrEnum):
    """Whether a run is logged to Weights & Biases; `metrics.jsonl` is written in every mode."""

    auto = "auto"
    """Online with a key (`WANDB_API_KEY` or netrc), offline without one."""
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class TrackingConfig(Settings, group="tracking", affects="nothing"):
    """Logging to Weights & Biases, besides the run's own folder."""

    name: str = field(default="wandb", metadata={"advanced": True})
    """The option of the group `tracking`."""
    project: str = "agentft"
    """The W&B project that collects the runs."""
    entity: str | None = None
    """The W&B user or team that owns the project; null: the default of the account."""
    mode: TrackingMode = TrackingMode.auto
    """Online, offline or not at all; `WANDB_MODE` in the environment decides when this is `auto`."""
    group: str | None = field(default=None, metadata={"advanced": True})
    """Runs that a dashboard shows together; null: the sweep, for a run that belongs to one."""
    run_name: str | None = field(default=None, metadata={"advanced": True})
    """Name of the run in a dashboard; null: its choices and swept values."""
    tags: list[str] = field(default_factory=list)
    """Words to filter by, besides the choices of model, sft_type, dataset and distributed."""


WandbMode = Literal["online", "offline", "disabled"]


def resolve_mode(config: TrackingConfig, environ: Mapping[str, str]) -> WandbMode:
    """Return the mode that W&B runs in.

    Refuses `online` without a key: W&B would ask for one on the terminal, and a job in a queue would wait for ever.
    """
    wanted, source = str(config.mode), f"tracking.mode={config.mode}"
    if config.mode == TrackingMode.auto and (named := environ.get("WANDB_MODE")):
        wanted, source = {"run": "online", "dryrun": "offline"}.get(named, named), f"WANDB_MODE={named}"
    match wanted:
        case "disabled" | "offline":
            return wanted
        case "auto":
            return "online" if _has_key(environ) else "offline"
        case "online" if _has_key(environ):
            return "online"
        case "online":
            raise ConfigError(
                f"{source}, but there is no key for {_base_url(environ)}: "
                "set WANDB_API_KEY, run `wandb login`, or choose tracking.mode=offline and `wandb sync` later"
            )
    raise ConfigError(f"{source}: expected online, offline or disabled")


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environ.get("HOME") or Path.home())
    files = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    host = urllib.parse.urlsplit(_base_url(environ)).netloc
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            entry = netrc.netrc(str(file)).hosts.get(host)
            if entry is not None and entry[2]:
                return True
    return False


def _base_url(environ: Mapping[str, str]) -> str:
    """Return the address of the W&B server: the environment's, else what `wandb login --host` noted, else the public one."""
    if environ.get("WANDB_BASE_URL"):
        return environ["WANDB_BASE_URL"]
    home = Path(environ.get("HOME") or Path.home())
    settings = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings"
    parser = ConfigParser()
    with contextlib.suppress(OSError, ConfigParserError, UnicodeDecodeError):
        parser.read(settings, encoding="utf-8")
        return parser.get("default", "base_url")
    return "https://api.wandb.ai"


_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, also of a running or killed run, with nan and inf as numbers again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; expected the metrics of a run") from None
    *lines, unfinished = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}") from error
        rows.append({key: _NUMBERS.get(each, each) if isinstance(each, str) else each for key, each in row.items()})
    if unfinished:
        _log.warning("%s: the last line is unfinished and left out", path)
    return rows


def _open_metrics(path: Path) -> int:
    """Open the file to append to, without the half line that a full disk or a power cut may have left at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    size = os.fstat(handle).st_size
    tail = os.pread(handle, 1 << 20, max(0, size - (1 << 20)))
    unfinished = len(tail) - (tail.rfind(b"\n") + 1)
    if unfinished:
        _log.warning("%s: an unfinished last line of %d bytes is cut off", path, unfinished)
        os.ftruncate(handle, size - unfinished)
    return handle


class Tracker:
    """Writes `metrics.jsonl` and `summary.json`, and logs the same to W&B; a context manager around the training.

    Only rank 0 has `enabled=True`; the others call the same methods, which then do nothing.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run: RunFolder,
        *,
        config_tree: Mapping[str, Any],
        run_id: str,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        enabled: bool = True,
    ) -> None:
        """`config_tree` is the resolved configuration, cleaned of secrets here. `run_id` is the same on every resume.

        `config.group` and `config.run_name` win over `group` and `name`, and `config.tags` come after `tags`.
        """
        self._run = run
        self._enabled = enabled
        self._sweep = sweep_folder()
        self.mode: WandbMode = resolve_mode(config, os.environ) if enabled else "disabled"
        self._config_tree = config_tree
        self._identity: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            # An agent of `wandb sweep` has already named the run.
            "id": None if os.environ.get("WANDB_SWEEP_ID") else run_id,
            "group": config.group or (self._sweep.name if self._sweep else group),
            "name": _cut(redact_text(config.run_name or name or ""), 128) or None,
            "tags": [_cut(redact_text(tag), 64) for tag in dict.fromkeys([*tags, *config.tags]) if tag],
            "job_type": "train",
        }
        self._wandb: Any = None
        self._failures = 0
        self._defined: set[str] = set()
        self._step = 0
        self._metrics: int | None = None
        self._cleanup = contextlib.ExitStack()

    @property
    def wandb_folder(self) -> Path:
        """The folder that W&B writes into: one folder for all jobs of a sweep, so that one `wandb sync` sees them all."""
        return self._sweep / "wandb" if self._sweep else self._run.wandb_dir

    def __enter__(self) -> Self:
        if self._enabled:
            self._metrics = _open_metrics(self._run.metrics_file)
            if self.mode != "disabled":
                self._start_wandb()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._try("finish", lambda: self._wandb.finish(exit_code=exit_code(kind, error)))
        finally:
            self._wandb = None
            self._cleanup.close()
            if self._metrics is not None:
                os.close(self._metrics)
                self._metrics = None

    def log(self, values: Mapping[str, float | int | None], *, step: int) -> None:
        """Write one line of `metrics.jsonl`, on disk before this returns when it holds a score (`eval/...`)."""
        if not self._enabled:
            return
        if self._metrics is None:
            raise RuntimeError("Tracker.log: the tracker is open only inside its `with` block")
        self._step = step
        line = (json_text({"step": step, "time": round(time.time(), 3), **values}) + "\n").encode()
        try:
            # One write a line, as far as the system takes it: a killed process leaves whole lines.
            while line:
                line = line[os.write(self._metrics, line) :]
            if any(key.startswith("eval/") for key in values):
                os.fsync(self._metrics)
        except OSError as error:
            raise RunError(f"{self._run.metrics_file}: cannot be written: {error.strerror}") from error
        self._try("log", lambda: self._log_to_wandb(values, step))

    def rewind(self, step: int) -> None:
        """Move the lines after `step`, which a run resumed there measures again, to `metrics.jsonl.rewound`."""
        if self._metrics is None:
            return
        file = self._run.metrics_file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        later = [line for line in lines if json.loads(line)["step"] > step]
        if not later:
            return
        rewound = file.with_name(f"{file.name}.rewound")
        with rewound.open("a", encoding="utf-8") as kept:
            kept.writelines(later)
        os.close(self._metrics)
        self._run.write_text(file, "".join(line for line in lines if json.loads(line)["step"] <= step))
        self._metrics = _open_metrics(file)
        _log.info("resumed at step %d: %d later lines of metrics.jsonl moved to %s", step, len(later), rewound.name)

    def log_predictions(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log predictions as a W&B table; the file that counts is `RunFolder.predictions(name)`."""

        def log() -> None:
            import wandb

            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
            self._wandb.log({f"predictions/{name}": table, STEP: self._step})

        self._try("log_predictions", log)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add to what runs are compared and sorted by: `summary.json` and the summary of W&B."""
        if not self._enabled:
            return
        file = self._run.summary_file
        clean = json.loads(json_text(redact_tree(values)))
        self._run.write_json(file, {**(read_json(file) if file.exists() else {}), **clean})
        self._try("summary", lambda: self._wandb.summary.update(clean))

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Register a file or folder (data manifest, adapter) in W&B by address and checksums; its content stays here."""

        def log() -> None:
            import wandb

            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128], type=kind)
            # Not Path.as_uri(): W&B takes the address as it stands and would look for a file with %20 in its name.
            artifact.add_reference(f"file://{path.absolute()}")
            self._wandb.log_artifact(artifact)

        self._try("artifact", log)

    def _start_wandb(self) -> None:
        self._cleanup.enter_context(environment_variables(self._variables(self.wandb_folder)))
        modes: list[WandbMode] = ["online", "offline"] if self.mode == "online" else [self.mode]
        for mode in modes:
            try:
                self.wandb_folder.mkdir(parents=True, exist_ok=True)
                self._wandb = self._init(mode)
                break
            except Exception as error:
                _log.warning("W&B did not start (%s): %s; metrics.jsonl is written", mode, _short(error))
                _forget_service()  # it would still count the run id as in use
        if self._wandb is not None and mode != self.mode:
            self.mode = "offline"
            _log.warning("W&B logs offline from here; upload later with: wandb sync %s", self._wandb.settings.sync_dir)
        self._try("define_metric", self._define_axes)

    def _variables(self, folder: Path) -> dict[str, str | None]:
        """Return the environment of W&B for this run. Artifacts staged in the user's own folder would stay behind on a move."""
        own = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_SILENT": "true"}
        if self.mode == "offline":
            # Online this stays the user's: it may name the W&B server, to which alone the key belongs.
            own["WANDB_CONFIG_DIR"] = str(folder / "config")
        # W&B's own crash reports go out even of offline runs; whoever wants them sets the variable.
        return {"WANDB_ERROR_REPORTING": os.environ.get("WANDB_ERROR_REPORTING", "false"), **own}

    def _init(self, mode: WandbMode) -> Any:
        import wandb

        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_code": True,  # a copy of code or of a diff can hold anything
            "disable_git": True,  # the revision is in the configuration, below
            "disable_job_creation": True,
            "x_save_requirements": False,
        }
        # Seconds for a lost network, after which the data waits for `wandb sync`.
        for name, seconds in (("init_timeout", 60.0), ("finish_timeout", 300.0)):
            if f"WANDB_{name.upper()}" not in os.environ:
                settings[name] = seconds
        about: dict[str, Any] = {"run_dir": str(self._run.path)}
        with contextlib.suppress(RunError):
            record = read_json(self._run.record_file)
            about |= {key: record[key] for key in ("git", "choices", "sweep", "command", "packages") if record.get(key)}
        with _process_left_alone():
            return wandb.init(
                **self._identity,
                mode=mode,
                dir=str(self.wandb_folder.parent),
                resume="allow",
                reinit="finish_previous",
                config=json.loads(json_text(redact_tree({**self._config_tree, "_agentft": about}))),
                settings=wandb.Settings(**settings),
            )

    def _define_axes(self) -> None:
        self._wandb.define_metric(STEP)
        self._wandb.define_metric("*", step_metric=STEP)

    def _log_to_wandb(self, values: Mapping[str, float | int | None], step: int) -> None:
        known = {key: value for key, value in values.items() if value is not None}
        for key in known.keys() - self._defined:
            if key.startswith("eval/"):
                self._defined.add(key)
                least = re.search("loss|perplexity|error|fail|invalid|missed|false|seconds", key) is not None
                self._wandb.define_metric(key, step_metric=STEP, summary="min,last" if least else "max,last")
        self._wandb.log({**known, STEP: step})

    def _try(self, what: str, call: Callable[[], object]) -> None:
        """Call W&B, if it logs: an error there is a warning, and after three of them W&B logging is disabled."""
        if self._wandb is None:
            return
        try:
            call()
        except Exception as error:
            self._failures += 1
            _log.warning("W&B: %s failed: %s; metrics.jsonl is still written", what, _short(error))
            if isinstance(error, ConnectionError) or self._failures >= 3:
                _log.warning("W&B logging disabled; what it has is in %s", self.wandb_folder)
                self._wandb = None
                _forget_service()


def exit_code(kind: type[BaseException] | None, error: BaseException | None) -> int:
    """Return the exit status of the process: 0 finished, 130 by Ctrl-C, what `sys.exit` was given, else 1."""
    if kind is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if issubclass(kind, KeyboardInterrupt) else 1


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(value if isinstance(value, str) else json_text(value))


def _cut(text: str, length: int) -> str:
    """Return `text`, cut to what the W&B server takes."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _short(error: BaseException) -> str:
    return redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _forget_service() -> None:
    """End the helper process of W&B, or what is left of it; its own clean-up at exit would fail on that."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


@contextlib.contextmanager
def _process_left_alone() -> Iterator[None]:
    """Keep W&B from recording `sys.argv` and from printing each traceback once more, secrets and all.

    It has no setting for either. Its hooks only learn the exit code, which `Tracker` gives it.
    """
    before = sys.argv, sys.excepthook, sys.exit
    sys.argv = redact_command(sys.argv)
    try:
        yield
    finally:
        sys.argv, sys.excepthook, sys.exit = before
