"""What a person sees during long work: one bar on a terminal, nothing but log lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from agentft.secrets import install_log_redaction

if TYPE_CHECKING:
    from rich.console import Console


class Bar(Protocol):
    """A running bar."""

    def advance(self, amount: float = 1, **shown: str) -> None:
        """Move on by `amount`; `shown` replaces the words beside the bar."""


class _NoBar:
    def advance(self, amount: float = 1, **shown: str) -> None:
        pass


def _may_show() -> bool:
    """Whether there may be a terminal: rich looks closer, but takes a fifth of a second to be imported."""
    return sys.stderr.isatty() or "FORCE_COLOR" in os.environ or "ipykernel" in sys.modules


@cache
def console() -> Console:
    """Return the one console on standard error, shared by bars and log lines so that they do not overwrite each other."""
    from rich.console import Console

    # Where there is no terminal rich would wrap lines at 80 columns, in the middle of paths.
    return Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=160)


def set_up_logging(log_file: Path) -> None:
    """Send log lines to the console in short form, and to `log_file` with time and module."""
    from rich.logging import RichHandler

    screen = RichHandler(console=console(), show_path=False, show_level=False, omit_repeated_times=False, markup=False)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.INFO)
    # Warnings of libraries are for whoever searches a fault: they go to the file.
    logging.captureWarnings(True)
    screen.addFilter(lambda record: record.name != "py.warnings")
    file = logging.FileHandler(log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(screen)
    root.addHandler(file)
    root.setLevel(logging.WARNING)
    logging.getLogger("agentft").setLevel(logging.INFO)
    install_log_redaction()


@contextmanager
def progress_bar(title: str, total: float | None, done: float = 0) -> Iterator[Bar]:
    """Show a bar with share, speed words, elapsed time and time left while the body runs; None: the end is not known."""
    if not _may_show():  # and spare the import
        yield _NoBar()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=int(done), words="")

        class _Bar:
            def advance(self, amount: float = 1, **shown: str) -> None:
                progress.update(task, advance=amount, words="  ".join(shown.values()))

        yield _Bar()
