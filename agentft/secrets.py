"""Keep keys and tokens out of every file, log and traceback: by the name of a setting, by a value in the environment.

A secret enters agentft through the environment (or netrc) only, so each one has a name there and a value to look for.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HIDDEN = "<redacted>"
"""What stands where a value was hidden for the name of its setting."""

MIN_SECRET_LENGTH = 8
"""Shorter values are not looked for: `1` or `true` would blank out half of a log."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALWAYS = _words("""
    password passwd passphrase passcode secret secrets credential credentials apikey accesskey secretkey
    privatekey apitoken accesstoken authtoken authorization bearer
""")
_QUALIFIERS = _words("""
    api access auth secret private refresh session bearer hub hf sdk ssh signing encryption service account
    license wandb openai huggingface modelscope github
""")
_PLAIN_KEYS = _words("""
    sort group cache primary foreign public metric step column row dict json index map lookup partition hot
    unique merge join partial num input label text source
""")
_PLAIN_TOKENS = _words("""
    stop pad padding eos bos unk sep cls mask start end first last next new special image video audio think tool
    per each text prompt role fill prefix suffix middle ignore boundary begin blank decoder forced response
    observation
""")
_ABOUT = _words("""
    file path dir directory folder sock socket host url length len size count limit timeout expiry name type
    accuracy rate loss ids enabled required
""")


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a secret: `WANDB_API_KEY`, `hub.token`; not `stop_token`, `sort_key`."""
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    while words and words[-1].isdigit():  # OPENAI_KEY_2
        words.pop()
    if not words or words[-1] in _ABOUT:
        return False
    if _ALWAYS.intersection(words) or (len(words) > 1 and words[-1] == "pwd"):
        return True
    for before, word in zip(["", *words], words, strict=False):
        if before in _QUALIFIERS and word in {"key", "keys", "token", "tokens"}:
            return True
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] == "key" and before not in _PLAIN_KEYS) or (words[-1] == "token" and before not in _PLAIN_TOKENS)


def redact_text(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return `text` with every value of a secret-named environment variable replaced by `<redacted:NAME>`.

    Also found: the value as it stands inside JSON, YAML, a Python repr and an address (percent-encoded).
    """
    for value, name in _secrets(os.environ if environ is None else environ):
        if value in text:
            text = text.replace(value, f"<redacted:{name}>")
    return text


def redact_tree(tree: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of nested mappings and lists: every value under a secret name hidden, every text through `redact_text`."""
    match tree:
        case str():
            return redact_text(str(tree), environ)
        case Mapping():
            clean = {key: redact_tree(value, environ) for key, value in tree.items()}
            shown = {key: _hidden(value) if is_secret_name(str(key)) else value for key, value in clean.items()}
            return {redact_tree(key, environ): value for key, value in shown.items()}
        case list() | tuple():
            return [redact_tree(value, environ) for value in tree]
    return tree


def _hidden(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _hidden(item) for key, item in value.items()}
        case list() | tuple():
            return [_hidden(item) for item in value]
        case None | bool() | "":
            return value
    return HIDDEN


def redact_command(command: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """Return a command line to show: the values of `api_key=...` and `--api-key ...` and of the environment are hidden."""
    shown = []
    hide_next = False
    for argument in command:
        name, equals, value = argument.partition("=")
        if hide_next:
            shown.append(HIDDEN)
        elif equals and value and is_secret_name(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redact_text(argument, environ))
        hide_next = not hide_next and argument.startswith("-") and not equals and is_secret_name(argument)
    return shown


def _secrets(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (spelling of a value, name of its variable), longest first, so that no secret is cut in two by a shorter one."""
    found = {
        spelling: name
        for name in sorted(filter(is_secret_name, environ), reverse=True)  # of two with one value, the first counts
        for value in (environ[name], environ[name].strip())
        if len(value) >= MIN_SECRET_LENGTH
        for spelling in _spellings(value)
    }
    return sorted(found.items(), key=lambda item: (-len(item[0]), item[0]))


@functools.lru_cache(maxsize=256)
def _spellings(value: str) -> tuple[str, ...]:
    quoted = (
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        value.replace("'", "''"),  # YAML
        urllib.parse.quote(value, safe=""),
        urllib.parse.quote_plus(value),
    )
    return tuple(dict.fromkeys((value, *quoted)))


def redact_record(record: logging.LogRecord) -> None:
    """Take secrets out of a log record: its message, its arguments and its traceback. One without secrets is not changed."""
    try:
        message = record.getMessage()
    except Exception:  # a wrong format string is reported by logging itself; its arguments are shown there
        record.msg, record.args = redact_text(f"{record.msg} {record.args!r}"), None
        return
    if (clean := redact_text(message)) != message:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[0] is not None:
        shown = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if (clean := redact_text(shown)) != shown:
            # Formatters print exc_text; those that read exc_info (rich) would print the secret from its source.
            record.exc_text, record.exc_info = clean, None
    if record.stack_info:
        record.stack_info = redact_text(record.stack_info)


@functools.cache
def install_log_redaction() -> None:
    """Hide secrets in every log record and traceback of this process, whoever adds handlers afterwards.

    Records are cleaned where they are made, because a filter on a logger misses what its children pass up.
    Also covered: uncaught exceptions, of threads too, and the warnings of `Exception ignored in`.
    """
    make_record = logging.getLogRecordFactory()

    def make_clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        redact_record(record)
        return record

    logging.setLogRecordFactory(make_clean_record)
    sys.excepthook = _redacting(sys.excepthook)
    threading.excepthook = _redacting(threading.excepthook)
    sys.unraisablehook = _redacting(sys.unraisablehook)


def _redacting(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return an exception hook that prints a traceback with a secret itself, and leaves any other to `hook`."""

    def redacted(*args: Any) -> None:
        # Python's own hook takes three arguments, those of threads and destructors one that holds them.
        kind, error, trace = args if len(args) == 3 else (args[0].exc_type, args[0].exc_value, args[0].exc_traceback)
        shown = "" if error is None else "".join(traceback.format_exception(kind, error, trace))
        clean = redact_text(shown)
        if clean == shown:
            hook(*args)
        elif sys.stderr is not None:
            sys.stderr.write(clean)
            sys.stderr.flush()

    return redacted
