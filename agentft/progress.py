"""Show a person how far long work is: one bar on a terminal, nothing but log lines elsewhere.

The console may go away at any time (`| head`, a closed terminal, a full disk under a redirection): that ends no work.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.secrets import install_log_redaction

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Bar:
    """A running bar; without `progress` one that nobody sees."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **shown: str) -> None:
        """Move on by `amount`; `shown` replaces the words beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, words="  ".join(shown.values()))


class _Console(io.FileIO):
    """Standard output or error, until a write fails: from then on everything is taken and nothing written."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write to the descriptor, and raise nothing where that is impossible."""
        if self.lost is None:
            try:
                while (written := super().write(data)) is None:  # full, and set not to block by another program
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.lost = error
                _tell_of_lost_consoles()
        return len(data)


FILE_ONLY = "agentft_file_only"
"""A log record with this attribute true goes to the log file and not to the console."""

_IN_FILE = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
_consoles: dict[str, _Console] = {}
_log_file: Path | None = None


def outlive_console() -> None:
    """From here on no write to standard output or error fails; streams that a notebook has put in their place stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            with suppress(OSError):
                stream.flush()
            _consoles[name] = console = _Console(stream.fileno(), "w", closefd=False)
            lasting = io.TextIOWrapper(
                io.BufferedWriter(console),
                encoding=stream.encoding,
                errors="backslashreplace",  # letters that a terminal lacks
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lasting)


def _tell_of_lost_consoles() -> None:
    """Write a line for each into the log file, where there is one by now, and send to nowhere what libraries and child
    processes write to its descriptor. Not by `logging`: this may run in the middle of a record's way to the console."""
    for name, console in list(_consoles.items()):
        if console.lost is not None and _log_file is not None:
            del _consoles[name]
            reason = console.lost.strerror or str(console.lost)
            words = f"{name} is gone ({reason}): the work continues"
            record = logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": words})
            with suppress(OSError), _log_file.open("a", encoding="utf-8") as log:
                log.write(_IN_FILE.format(record) + "\n")
            with suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), console.fileno())


@cache
def console() -> Console:
    """Return the one console on standard error, shared by bars and log lines so that they do not overwrite each other."""
    from rich.console import Console

    outlive_console()
    # Where there is no terminal rich would wrap lines at 80 columns, in the middle of paths.
    return Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=160)


def set_up_logging(log_file: Path, *, held: bool = False) -> None:
    """Send log lines to the console, and to `log_file` with time and module; held, they wait for `open_log_file`."""
    from rich.logging import RichHandler

    global _log_file
    _log_file = None
    screen = RichHandler(console=console(), show_path=False, show_level=False, omit_repeated_times=False, markup=False)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.INFO)
    # Warnings of libraries are for whoever searches a fault: they go to the file.
    logging.captureWarnings(True)
    screen.addFilter(lambda record: record.name != "py.warnings" and not getattr(record, FILE_ONLY, False))
    # With no target, nothing is written at the exit either.
    waiting = MemoryHandler(10**9, flushLevel=logging.CRITICAL + 1)
    waiting.name = str(log_file)
    logging.basicConfig(level=logging.WARNING, handlers=[screen, waiting], force=True)
    logging.getLogger("agentft").setLevel(logging.INFO)
    if not held:
        open_log_file()
    install_log_redaction()


def open_log_file() -> None:
    """Write the lines that were held to their file, and all later ones at once."""
    global _log_file
    root = logging.getLogger()
    for waiting in [each for each in root.handlers if isinstance(each, MemoryHandler)]:
        _log_file = Path(str(waiting.name))
        _log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(_log_file, encoding="utf-8")
        file.setFormatter(_IN_FILE)
        waiting.setTarget(file)
        waiting.flush()
        root.removeHandler(waiting)
        root.addHandler(file)
        _tell_of_lost_consoles()


def duration(seconds: float | None) -> str:
    """Return a time as people say it: `95 s`, `12.5 min`, `3.0 h`; of None nothing."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress_bar(title: str, total: float | None, done: float = 0) -> Iterator[Bar]:
    """Show a bar with share, speed words, elapsed time and time left while the body runs; None: the end is not known."""
    # rich looks closer whether there is a terminal, but takes a fifth of a second to be imported.
    if not (sys.stderr.isatty() or "FORCE_COLOR" in os.environ or "ipykernel" in sys.modules):
        yield Bar()
        return
    from rich import progress as rich

    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TextColumn("{task.fields[words]}"), rich.TimeElapsedColumn()]
    columns += [rich.TextColumn("left"), rich.TimeRemainingColumn()]
    with rich.Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=int(done), words=""))
