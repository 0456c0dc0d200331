"""The overrides of a command line, parsed, and what they are to be composed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from agentft.config.groups import conf_dir
from agentft.config.wording import first_line
from agentft.errors import ConfigError


@dataclasses.dataclass
class Scope:
    """What a command line composes, and from where."""

    config_name: str
    config_dir: str | None
    root: type
    overrides: list[Override]

    @property
    def folders(self) -> list[Path]:
        return [conf_dir()] + ([Path(self.config_dir)] if self.config_dir is not None else [])


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Each line parsed; `ConfigError` names the setting whose line cannot be read."""
    parser = OverridesParser.create()
    parsed = []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except OverrideParseException as error:
            name = line.partition("=")[0]
            reason = f" ({first_line(error)})" if "=" in line and "Lexer" not in str(error) else ""
            expected = (
                "name=value; text with spaces, brackets or letters beyond ASCII in double quotes: 'name=\"a, b\"'"
            )
            raise ConfigError(f"{name}: cannot be read{reason}; expected {expected}") from error
        except HydraException as error:
            raise ConfigError(f"{line.partition('=')[0]}: {first_line(error)}") from error
    return parsed


def values_of(override: Override) -> list[str]:
    """The values of a sweep; none for an interval, which only its sweeper can draw from."""
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
