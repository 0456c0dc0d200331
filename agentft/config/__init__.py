"""Compose a run's settings with Hydra and check them.

`train.py` and `evaluate.py` call `compose_and_run`. It composes `conf/` and the command line, checks the result against the
dataclasses of the packages, and only then calls the recipe, with plain dataclasses. A configuration that cannot run is refused
in one line, before torch is imported and before a run folder is made; `HYDRA_FULL_ERROR=1` gives the traceback instead.
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
