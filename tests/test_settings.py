"""Every number of the settings has a range, and a value outside of it is refused in one line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentft.config import (
    AuditConfig,
    EvaluateConfig,
    ExportConfig,
    TrainConfig,
    compose,
    compose_and_run,
    settings,
    to_train_config,
)
from agentft.data.config import DatasetConfig
from agentft.errors import ConfigError
from agentft.evaluation.config import EvaluationConfig
from agentft.recipes.config import AFFECT_NOTHING, ROOTS, SCHEMAS
from agentft.recipes.train import run_id
from agentft.settings import Affects, Number, Settings, affects, numbers
from agentft.sweeping.jobs import config_hash
from agentft.sweeping.launcher import LocalOptions, RayOptions, SlurmOptions


def schemas() -> list[type]:
    """Return every dataclass of settings, those inside others too."""
    found = [*ROOTS.values(), *(schema for group in SCHEMAS.values() for schema in group.values())]
    found += [LocalOptions, RayOptions, SlurmOptions]
    for schema in found:  # grows as it goes
        for hint in typing.get_type_hints(schema).values():
            parts = (hint, *typing.get_args(hint))
            found += [part for part in parts if dataclasses.is_dataclass(part) and part not in found]
    return found


FIELDS = [(schema, name, number) for schema in schemas() for name, number in numbers(schema).items()]
KEYS = {key for root in (TrainConfig, EvaluateConfig, AuditConfig, ExportConfig) for key in settings(root)}


@functools.cache
def example(schema: type) -> Any:
    """Return an instance: of a root what its defaults compose to, of another class its own defaults."""
    for name, root in ROOTS.items():
        if schema is root:
            given = ["run_dir=x"] if schema is TrainConfig else ["run=x"] if schema is not AuditConfig else []
            return OmegaConf.to_object(compose(name.removeprefix("schema_"), given))
    required = {"name": "x", "id": "x", "path": "x", "learning_rate": 1e-3, "default_learning_rate": 1e-3}
    names = {field.name for field in dataclasses.fields(schema)}
    return schema(**{name: value for name, value in required.items() if name in names})


def ends(number: Number) -> tuple[list[float], list[float]]:
    """Return the outermost values of a range, and the nearest ones that are outside of it."""
    limits = number.range
    if "one_of" in limits:
        return list(limits["one_of"]), [min(limits["one_of"]) - 1, max(limits["one_of"]) + 1]
    inside, outside = [], []
    for closed, opened, direction in (("minimum", "above", -1), ("maximum", "below", 1)):
        assert (closed in limits) != (opened in limits), f"one {closed} or {opened} is needed"
        end = limits.get(closed, limits.get(opened))
        beyond = end + direction if number.whole else math.nextafter(end, direction * math.inf)
        before = end - direction if number.whole else math.nextafter(end, -direction * math.inf)
        inside.append(end if closed in limits else before)
        outside.append(beyond if closed in limits else end)
    also = [limits["also"]] if "also" in limits else []
    return inside + also, [*outside, *(value - 1 for value in also)]


@pytest.mark.parametrize(
    ("schema", "name", "number"), FIELDS, ids=[f"{schema.__name__}.{name}" for schema, name, _ in FIELDS]
)
def test_a_number_is_taken_at_the_ends_of_its_range_and_refused_beyond(schema: type, name: str, number: Number) -> None:
    inside, outside = ends(number)
    wrong: list[Any] = [*outside, math.nan, math.inf, -math.inf, 10**30, "many", True, [1]]
    wrong += [] if number.optional else [None]
    wrong += [inside[0] + 0.5] if number.whole else []
    for value in wrong:
        with pytest.raises(ConfigError) as refused:
            dataclasses.replace(example(schema), **{name: value})
        line = str(refused.value)
        assert line.endswith(f"{name}={value}: expected {number}")
        assert "\n" not in line
        key = line.partition("=")[0]
        assert key in KEYS or key.startswith("hydra.launcher."), "the name that one types"
    taken = copy.copy(example(schema))
    for value in [*inside, *([None] if number.optional else [])]:
        setattr(taken, name, value)
        Settings.__post_init__(taken)  # without what a schema asks of several settings together


def test_every_number_is_seen() -> None:
    """A field that holds a number in another way would be in no table and have no range."""
    for schema in schemas():
        hints = typing.get_type_hints(schema)
        mentions = {name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}}
        assert mentions == numbers(schema).keys(), schema


NOTHING = {
    "dataset": "cache cache_dir cache_limit_gb max_rejected workers",
    "distributed": "elastic.grace elastic.max_restarts rdzv_endpoint timeout",
    "evaluation": "auth_variable batch examples request_timeout retries speculation",
    "model": "allow_pickle cache_dir notes offline trust_remote_code",
    "tracking": "entity group mode name project run_name tags",
    "training": "allow_changes fallback logging_steps max_hours memory_check pause_at_fraction resume save_steps "
    "save_total_limit",
}
"""Settings that no checkpoint, cache, job or W&B run asks for; for another list, other checkpoints would be refused."""


def test_every_setting_says_what_it_affects() -> None:
    for schema in schemas():
        found = affects(schema)
        assert {field.name for field in dataclasses.fields(schema)} <= {name.partition(".")[0] for name in found}
        assert set(found.values()) <= set(typing.get_args(Affects))
    names = {f"{group}.{name}" for group, names in NOTHING.items() for name in names.split()}
    assert names | {"experiment", "out", "output", "other_data", "output_dir", "run_dir"} == AFFECT_NOTHING
    for root in ROOTS.values():
        assert {name for name, what in affects(root).items() if what != "nothing"}.isdisjoint(AFFECT_NOTHING), root
    assert set(affects(LocalOptions).values()) | set(affects(SlurmOptions).values()) == {"nothing"}
    answers = {name for name, what in affects(EvaluationConfig).items() if what == "answers"}
    assert answers == {"engine", "max_new_tokens", "base_url", "served_model", "request"}
    assert set(affects(DatasetConfig).values()) == {"data", "nothing"}


@pytest.mark.parametrize(
    ("override", "is_the_same"),
    [
        *((override, True) for override in ("training.logging_steps=5", "dataset.workers=1", "training.save_steps=7")),
        *(
            (override, True)
            for override in ("tracking.project=other", "training.resume=must", "training.pause_at_fraction=0.5")
        ),
        *(
            (override, False)
            for override in ("training.learning_rate=0.5", "dataset.max_samples=9", "evaluation.bootstrap_samples=7")
        ),
    ],
)
def test_a_run_is_the_same_to_wandb_and_to_a_sweep_whatever_affects_nothing(override: str, is_the_same: bool) -> None:
    before, after = (compose("train", ["model=tiny", "run_dir=x", *more]) for more in ([], [override]))
    ids = [
        (run_id(to_train_config(each)), config_hash(OmegaConf.to_container(each, enum_to_str=True)))
        for each in (before, after)
    ]
    assert [before == after for before, after in zip(*ids, strict=True)] == [is_the_same] * 2


@pytest.mark.slow
def test_the_command_line_refuses_each_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = settings(TrainConfig, {"sft_type": "schema_qlora", "dataset": "schema_synthetic"})
    typed = {key: setting.number for key, setting in shown.items() if setting.number is not None}
    launcher = {f"hydra.launcher.{name}": number for name, number in numbers(LocalOptions).items()}
    for key, number in (typed | launcher).items():
        several = ["-m"] if key in launcher else []
        for value in (ends(number)[1][0], math.nan):
            monkeypatch.setattr("sys.argv", ["train.py", *several, "model=tiny", "sft_type=qlora", f"{key}={value}"])
            with pytest.raises(SystemExit) as stop:
                compose_and_run("train", TrainConfig, lambda config: 0.0)
            said = capsys.readouterr()
            assert (stop.value.code, said.out) == (2, "")
            assert said.err.count("\n") == 1
            assert f"{key}={value}" in said.err
            assert key in launcher or str(number) in said.err
    assert list(tmp_path.iterdir()) == []
