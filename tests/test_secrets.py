"""No secret in any text: by name, by value, in logs and in tracebacks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentft.secrets import (
    HIDDEN,
    is_secret_name,
    redact_command,
    redact_record,
    redact_text,
    redact_tree,
)

KEY = "sentinel-0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "HF_TOKEN", "GITHUB_TOKEN", "OPENAI_KEY_2", "AWS_ACCESS_KEY_ID"),
        *(
            "AWS_SECRET_ACCESS_KEY",
            "DB_PASSWORD",
            "DB_PWD",
            "client_secret",
            "apiKey",
            "accessToken",
            "apikey",
            "token",
        ),
        *("key", "hub.token", "tracking.api-key", "--api-key", "api_keys", "GOOGLE_CREDENTIALS", "SSH_PASSPHRASE"),
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "stop_token",
            "eos_token",
            "pad_token_id",
            "stop_token_ids",
            "max_new_tokens",
            "tokens",
            "tokenizer",
            "keyword",
        ),
        *(
            "keywords",
            "keys",
            "tokens_per_second",
            "sort_key",
            "num_key_value_heads",
            "key_proj",
            "monkey",
            "PWD",
            "OLDPWD",
        ),
        *("SSH_AUTH_SOCK", "token_accuracy", "tokenizers", "TOKENIZERS_PARALLELISM", "secretary", "api_name", "author"),
        *("password_file", "WANDB_IDENTITY_TOKEN_FILE", "", "model", "learning_rate", "KEYBOARD", "per_token", "工具"),
    ],
)
def test_names_of_settings_are_left_alone(name):
    assert not is_secret_name(name)


def test_no_setting_of_agentft_has_a_secret_name():
    """Then redacting by name never damages a configuration, and a key in one is always refused as unknown."""
    import dataclasses

    from agentft.recipes.config import EvaluateConfig, TrainConfig

    def names(kind):
        for each in dataclasses.fields(kind):
            yield each.name

    import agentft.data.config
    import agentft.evaluation.config
    import agentft.model.config
    import agentft.tracking
    import agentft.training.config

    modules = [
        agentft.data.config,
        agentft.evaluation.config,
        agentft.model.config,
        agentft.tracking,
        agentft.training.config,
    ]
    kinds = [kind for module in modules for kind in vars(module).values() if dataclasses.is_dataclass(kind)]
    found = [name for kind in [*kinds, TrainConfig, EvaluateConfig] for name in names(kind)]
    assert len(found) > 60
    assert [name for name in found if is_secret_name(name)] == []


def test_values_under_secret_names_are_hidden_at_any_depth():
    tree = {"hub": {"token": "abc", "model": "m"}, "jobs": [{"password": 1234, "stop_token": "<end>"}], "api_key": None}
    assert redact_tree(tree) == {
        "hub": {"token": HIDDEN, "model": "m"},
        "jobs": [{"password": HIDDEN, "stop_token": "<end>"}],
        "api_key": None,
    }
    assert redact_tree({"credentials": {"user": "a", "pins": [1, 2], "on": True}}) == {
        "credentials": {"user": HIDDEN, "pins": [HIDDEN, HIDDEN], "on": True}
    }


def test_the_longest_value_is_replaced_first():
    environ = {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-ijkl", "MODEL": "abcdefgh"}
    assert redact_text("x abcdefgh-ijkl y abcdefgh", environ) == "x <redacted:B_TOKEN> y <redacted:A_TOKEN>"


def test_short_values_and_plain_names_are_not_looked_for():
    assert (
        redact_text("true 1234567 runs", {"USE_TOKEN": "true", "PIN_KEY": "1234567", "FOLDER": "runs"})
        == "true 1234567 runs"
    )


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=8, max_size=40))
def test_a_value_is_found_in_every_spelling(value):
    environ = {"X_API_KEY": value}
    stripped = value.strip()
    for shown in (
        value,
        json.dumps(value),
        json.dumps({"a": value}, ensure_ascii=False),
        repr(value),
        urllib.parse.quote(value, safe=""),
    ):
        clean = redact_text(shown, environ)
        if len(stripped) >= 8:
            assert clean != shown
            assert stripped not in clean or stripped in "<redacted:X_API_KEY>"


def test_texts_and_keys_inside_a_tree_are_cleaned():
    environ = {"X_TOKEN": KEY}
    tree = {"note": f"used {KEY}", KEY: [1, (KEY,)]}
    assert redact_tree(tree, environ) == {
        "note": "used <redacted:X_TOKEN>",
        "<redacted:X_TOKEN>": [1, ["<redacted:X_TOKEN>"]],
    }


def test_a_command_line_is_shown_without_its_secrets():
    command = [
        "train.py",
        "+hub.token=abc",
        "--api-key",
        "abc",
        "--token=abc",
        "model.stop_token=<end>",
        f"run_dir={KEY}",
    ]
    assert redact_command(command, {"A_KEY": KEY}) == [
        *("train.py", f"+hub.token={HIDDEN}", "--api-key", HIDDEN, f"--token={HIDDEN}", "model.stop_token=<end>"),
        "run_dir=<redacted:A_KEY>",
    ]


def test_a_record_without_a_secret_is_not_touched():
    record = logging.LogRecord("a", logging.INFO, "f.py", 1, "%d of %s", (3, "many"), None)
    before = dict(vars(record))
    redact_record(record)
    assert vars(record) == before


SCRIPT = """
import logging, os, sys, threading
from agentft.secrets import install_log_redaction
install_log_redaction()
install_log_redaction()
logging.basicConfig(filename=sys.argv[1], level=logging.INFO)  # a handler that comes after
key, token = os.environ["WANDB_API_KEY"], os.environ["MODELSCOPE_API_TOKEN"]
log = logging.getLogger("agentft.deep.below")
log.info("key %s token %r", key, {"t": token})
log.warning(f"key {key}", stack_info=True)
log.info("plain %d", 7)
log.error("wrong format %d", key)
def fail(value):
    raise ValueError(f"refused {value}")
try:
    try:
        fail(token)
    except ValueError as error:
        raise RuntimeError("outer " + key) from error
except RuntimeError:
    log.exception("failed with %s", key)
class Bad:
    def __del__(self):
        raise ValueError(key)
bad = Bad(); del bad
thread = threading.Thread(target=fail, args=(token,)); thread.start(); thread.join()
if len(sys.argv) > 2:
    raise KeyError("nothing to hide")
fail(key)
"""


def _run(log: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"WANDB_API_KEY": KEY, "MODELSCOPE_API_TOKEN": "tok'en\"" + KEY[::-1]}
    command = [sys.executable, "-c", SCRIPT, str(log), *more]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_neither_log_nor_tracebacks_show_a_secret(tmp_path):
    done = _run(tmp_path / "a.log")
    log = (tmp_path / "a.log").read_text()
    assert done.returncode == 1
    for text in (done.stdout, done.stderr, log):
        assert KEY not in text
        assert KEY[::-1] not in text
    assert "ValueError: refused <redacted:WANDB_API_KEY>" in done.stderr
    assert "refused <redacted:MODELSCOPE_API_TOKEN>" in done.stderr
    assert "in fail" in done.stderr
    assert "RuntimeError: outer <redacted:WANDB_API_KEY>" in log
    assert "ValueError: refused <redacted:MODELSCOPE_API_TOKEN>" in log
    assert "plain 7" in log


def test_a_traceback_without_a_secret_is_printed_as_usual(tmp_path):
    done = _run(tmp_path / "a.log", "plain")
    assert done.stderr.rstrip().endswith("KeyError: 'nothing to hide'")
    assert done.returncode == 1
