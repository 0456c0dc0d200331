"""`run_dir=<run>`: refuse another training in the folder of a run, and find one that is finished, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agentft.errors import ConfigError
from agentft.recipes.config import TrainConfig, deciding
from agentft.recipes.saved import primary_config, saved_config
from agentft.runs import RunFolder, read_json
from agentft.training.config import Resume
from agentft.training.identity import differences

_SEEN_WHEN_LOADED = (
    *("threads", "model.dtype", "model.attention", "model.kernels", "model.context", "model.learning_rate_scale"),
    *("model.source", "model.id", "model.modelscope_id", "model.huggingface_id", "model.revision", "model.path"),
    *("model.wheel", "dataset.path", "dataset.test_path", "dataset.sources", "dataset.id", "dataset.revision"),
)
"""Settings whose change may change nothing (the same files at another place): the digests of what is loaded decide."""


def objective_of_finished(config: TrainConfig) -> tuple[float | None] | None:
    """Return the objective of the run in `config.run_dir` if it is finished and `config` asks for nothing else.

    Of another state, or where there is no run yet: None.

    Raises:
        ConfigError: the folder has checkpoints of another training; the settings that differ are named.
        RunError: a process trains in it.
    """
    run = RunFolder(config.run_dir)
    if not run.has_run():
        return None
    run.require_free()
    where = f"run_dir={config.run_dir}"
    if "evaluated" in read_json(run.record_file):
        raise ConfigError(f"{where}: holds an evaluation, not a training; choose another run_dir")
    changed = changed_settings(config, run)
    if any(run.checkpoints.glob("step-*")):
        if config.training.resume is Resume.never:
            raise ConfigError(f"{where} has checkpoints; training.resume=auto goes on from the newest")
        others = [change for change in changed if not _is_of(change, (*_SEEN_WHEN_LOADED, "evaluation", "experiment"))]
        if others and not config.training.allow_changes:
            raise ConfigError(
                f"{where} belongs to another training: {'; '.join(others)}. Give another run_dir, or go on regardless "
                "with training.allow_changes=true"
            )
    status = read_json(run.status_file) if run.status_file.is_file() else {}
    if changed or status.get("state") != "finished" or not run.final.is_dir():
        return None
    return (status.get("objective"),)


def changed_settings(config: TrainConfig, run: RunFolder) -> list[str]:
    """Name the settings in which a run's own differ from `config`, but for those that change no training and no exam."""
    saved, now = deciding(primary_config(saved_config(run.path))), deciding(primary_config(config))
    return differences(dict(_own(saved, now)), dict(_own(now, saved)))


def _own(settings: dict[str, Any], others: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings, of a group that has another option only its name: the rest follows."""
    for group, values in settings.items():
        if group in ("defaults", "distributed"):  # it may go on elsewhere
            continue
        named = isinstance(values, dict) and "name" in values
        same = not named or values["name"] == others[group]["name"]
        yield group, values if same else values["name"]


def _is_of(change: str, names: tuple[str, ...]) -> bool:
    name = change.split(" was ", 1)[0]
    return any(name == each or name.startswith(f"{each}.") for each in names)
