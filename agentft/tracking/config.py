"""Choose where the numbers of a run go, and whether W&B is online: settings, environment and keys, in that order."""

from __future__ import annotations

import contextlib
import netrc
import urllib.parse
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from agentft.errors import ConfigError
from agentft.settings import Settings


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


def resolve_mode(config: TrackingConfig, environ: Mapping[str, str]) -> tuple[WandbMode, str]:
    """Return the mode that W&B runs in, and one sentence saying why.

    Refuses `online` without a key: W&B would ask for one on the terminal, and a job in a queue would wait for ever.
    """
    key = _key_found(environ)
    wanted, source = str(config.mode), f"tracking.mode={config.mode}"
    if config.mode == TrackingMode.auto and (named := environ.get("WANDB_MODE")):
        wanted, source = {"run": "online", "dryrun": "offline"}.get(named, named), f"WANDB_MODE={named}"
    match wanted:
        case "disabled":
            return "disabled", f"{source}; only metrics.jsonl is written"
        case "offline":
            return "offline", f"{source}; upload later with `wandb sync`"
        case "online" if key is not None:
            return "online", f"{source}, with the key of {key}"
        case "online":
            raise ConfigError(
                f"{source}, but there is no key for {_base_url(environ)}: "
                "set WANDB_API_KEY, run `wandb login`, or choose tracking.mode=offline and `wandb sync` later"
            )
        case "auto" if key is not None:
            return "online", f"tracking.mode=auto found a key: {key}"
        case "auto":
            return "offline", "tracking.mode=auto found no key (WANDB_API_KEY or netrc); upload later with `wandb sync`"
    raise ConfigError(f"{source}: expected online, offline or disabled")


def _key_found(environ: Mapping[str, str]) -> str | None:
    """Return where the key for the W&B server is kept, never the key."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environ.get(name):
            return name
    home = Path(environ.get("HOME") or Path.home())
    files = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    host = urllib.parse.urlsplit(_base_url(environ)).netloc
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            entry = netrc.netrc(str(file)).hosts.get(host)
            if entry is not None and entry[2]:
                return f"{file} for {host}"
    return None


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
