"""What Hydra must know before it composes: the schemas, the launcher's folder, and the resolvers that name run folders."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agentft import slurm
from agentft.recipes.saved import ROOTS, SCHEMAS


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as `schema_train`, `model/schema_model`, `sft_type/schema_lora`, ..."""
    plugins = str(Path(__file__).resolve().parent.parent / "plugins")
    if plugins not in sys.path:  # Hydra finds our launcher in the namespace package `hydra_plugins` there.
        sys.path.append(plugins)
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=name, node=root, provider="agentft")
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=name, node=schema, provider="agentft")
    register_resolvers(swept=None)


def register_resolvers(swept: frozenset[str] | None) -> None:
    """The resolvers that YAML files use; `swept` names the settings of a sweep, None where all overrides count."""
    OmegaConf.register_new_resolver("start_stamp", _start_stamp, replace=True)
    OmegaConf.register_new_resolver("run_slug", _run_slug, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("sweep_slug", functools.partial(_sweep_slug, swept), replace=True)
    # As text and back, 1e-4 x 10 is 0.001 and not 0.0010000000000000002.
    OmegaConf.register_new_resolver("product", lambda a, b: float(f"{a * b:.12g}"), replace=True)


def _start_stamp(now: str) -> str:
    """The time of the start; in a batch job of SLURM its id, which stays when the job is queued again."""
    return f"slurm-{slurm.job_id()}" if slurm.is_batch_job() else now


_NOT_IN_NAMES = {"output_dir", "run_dir", "tracking", "experiment", "hydra"}


def _run_slug(*, _root_: DictConfig) -> str:
    """Choices and overridden values, `smollm2-135m_lora_synthetic_rank-4`: what tells one run folder from the next."""
    names = [str(_root_[group]["name"]) for group in ("model", "sft_type", "dataset")]
    return _slug(names + _overridden(_root_, None))


def _sweep_name(*, _root_: DictConfig) -> str:
    """The program and, where one was chosen for all jobs, the experiment: `train_msagent_7b_lora`."""
    chosen = _root_.hydra.runtime.choices.get("experiment")
    return _slug([str(_root_.hydra.job.config_name), *([str(chosen)] if chosen else [])])


def _sweep_slug(swept: frozenset[str] | None, *, _root_: DictConfig) -> str:
    """The swept values of one job, `rank-4_learning_rate-0.001`."""
    return _slug(_overridden(_root_, swept))


def _overridden(composed: DictConfig, only: frozenset[str] | None) -> list[str]:
    """`name-value` of each override in the order given; choices of groups only where `only` names them as swept."""
    if "hydra" in composed:
        hydra_node = composed.hydra
    elif HydraConfig.initialized():
        hydra_node = HydraConfig.get()
    else:
        return []
    parts = []
    for text in hydra_node.overrides.task:
        key, _, value = str(text).lstrip("+~").partition("=")
        if key.split(".")[0] in _NOT_IN_NAMES or (only is not None and key not in only):
            continue
        if key not in hydra_node.runtime.choices:
            # A path says little, and its slashes would make folders.
            parts.append(f"{key.split('.')[-1]}-{value.rstrip('/').split('/')[-1]}")
        elif only is not None:
            parts.append(value)
    return parts


def _slug(parts: Sequence[str]) -> str:
    clean = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in parts]
    return "_".join(part for part in clean if part)[:100].rstrip("-._") or "defaults"
