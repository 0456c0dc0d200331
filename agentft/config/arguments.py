"""The words of a command line: Hydra's flags, and in our own words what is wrong with them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal import utils as hydra_utils

from agentft.config.groups import conf_dir
from agentft.config.old_options import OLD_OPTIONS
from agentft.errors import ConfigError


def parse_arguments() -> argparse.Namespace:
    """The flags and overrides of `sys.argv`, read by Hydra's parser; `ConfigError` for what agentft does not take."""
    parser = hydra_utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        # Values stay out of the message: one of them could be a key.
        raise ConfigError(re.sub(r"=\S*", "=...", message) + _hint_for_flags(message))

    parser.error = refuse  # type: ignore[method-assign]
    sys.argv[1:] = _with_packaged_folder(sys.argv[1:])
    arguments = parser.parse_args()
    if arguments.config_path is not None:
        raise ConfigError("--config-path: not supported; --config-dir adds a folder to conf/")
    if arguments.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun: not supported; use --config-dir <run folder> --config-name config")
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise ConfigError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


def _with_packaged_folder(words: Sequence[str]) -> list[str]:
    """`--config-dir sweeps` where no such folder is here: the one that came with agentft."""
    found = list(words)
    for i, word in enumerate(found[:-1]):
        folder = conf_dir().parent / found[i + 1]
        if word in ("--config-dir", "-cd") and not Path(found[i + 1]).is_dir() and folder.is_dir():
            found[i + 1] = str(folder)
    return found


def _hint_for_flags(message: str) -> str:
    found = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    if found is None:
        return "; see --help"
    if found[1] in OLD_OPTIONS and "--" in message:
        return f"; --{found[1]} is now {OLD_OPTIONS[found[1]]}=..."
    if "--" not in message:
        return "; put flags such as --cfg or -m before all settings"
    return "; settings are written name=value, see --help"
