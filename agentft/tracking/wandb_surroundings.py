"""What W&B must be kept from, and what it must be told: the process around a W&B run."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from agentft.secrets import redact_command, redact_text
from agentft.strict_json import json_text


def lower_is_better(key: str) -> bool:
    return re.search(r"loss|perplexity|error|fail|invalid|missed|false|seconds", key.rpartition("/")[2]) is not None


def exit_code(kind: type[BaseException] | None, error: BaseException | None) -> int:
    """What the process will end with: 0 finished, 130 by Ctrl-C, what `sys.exit` was given, else 1."""
    if kind is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if issubclass(kind, KeyboardInterrupt) else 1


def cell(value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(value)
    return value if value is None or isinstance(value, bool | int | float) else redact_text(json_text(value))


def cut(text: str, length: int) -> str:
    """The longest name that the W&B server takes."""
    return text if len(text) <= length else text[: length - 1] + "…"


def short(error: BaseException) -> str:
    return redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def forget_service() -> None:
    """Ends the helper process of W&B, or what is left of it; its own clean-up at exit would stumble over that."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside the block: the next run of this process has its own folders."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def process_left_alone() -> Iterator[None]:
    """W&B records `sys.argv`, and takes over `sys.excepthook` to print each traceback once more, secrets and all.

    It can be told neither. Its hooks only learn the exit code, which `Tracker` gives it.
    """
    before = sys.argv, sys.excepthook, sys.exit
    sys.argv = redact_command(sys.argv)
    try:
        yield
    finally:
        sys.argv, sys.excepthook, sys.exit = before
