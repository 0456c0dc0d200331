"""Compose a run's settings with Hydra, check them against the dataclasses of the packages, and call the recipe with these.

A configuration that cannot run is refused in one line, before torch is imported and before a run folder is made.
"""

from agentft.config.compose import compose, conf_dir, options, register_schemas, to_config, to_train_config
from agentft.config.explain import Setting, settings
from agentft.config.main import compose_and_run
from agentft.recipes.config import (
    AuditConfig,
    EvaluateConfig,
    ExportConfig,
    TrainConfig,
    config_from_yaml,
    config_to_yaml,
    saved_config,
)

__all__ = [
    "AuditConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Setting",
    "TrainConfig",
    "compose",
    "compose_and_run",
    "conf_dir",
    "config_from_yaml",
    "config_to_yaml",
    "options",
    "register_schemas",
    "saved_config",
    "settings",
    "to_config",
    "to_train_config",
]
