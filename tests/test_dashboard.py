"""What W&B is asked to show and to search for: every name in the workspace and in the W&B sweep is one that a run logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from agentft import dashboard
from agentft.config import compose, register_schemas, settings, to_train_config
from agentft.dashboard import build_workspace, workspace_json
from agentft.errors import RunError
from agentft.recipes.train import train

needs_library = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs the extra `dashboard`")

REPOSITORY = Path(__file__).parent.parent
BAYES = REPOSITORY / "sweeps" / "wandb_bayes.yaml"
TINY = [
    *(
        "model=tiny",
        "dataset.conversations=12",
        "dataset.heldout=4",
        "dataset.max_length=8192",
        "dataset.max_samples=8",
    ),
    *(
        "training.gradient_accumulation_steps=2",
        "training.logging_steps=1",
        "training.max_steps=2",
        "threads=1",
        "tracking.mode=offline",
    ),
    *(
        "evaluation.eval_steps=1",
        "evaluation.max_new_tokens=4",
        "evaluation.bootstrap_samples=100",
        "evaluation.conversations_during=2",
    ),
    "evaluation.batch=4",
]


class Logged:
    """The names in the history, the summary and the config of a run, as W&B has them."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        self.history = {name for row in rows for name in row}
        self.rows = rows
        self.summary: set[str] = set()
        for record in records:
            if record["type"] == "summary":
                self.summary |= set(_dotted(record["summary"].get("update") or {}))


def _dotted(tree: Any, key: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [key]
    return [name for part, value in tree.items() for name in _dotted(value, f"{key}.{part}" if key else part)]


@pytest.fixture(scope="module")
def bayes() -> dict[str, Any]:
    return yaml.safe_load(BAYES.read_text(encoding="utf-8"))


def overrides_of(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The arguments that `wandb agent` starts a job with, made by W&B's own code."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        match word:
            case "${env}" | "${interpreter}":
                continue
            case "${program}":
                words.append(sweep["program"])
            case "${args_no_hyphens}":
                words += macros["args_no_hyphens"]
            case _:
                words.append(word)
    assert words[0] == "train.py"
    return words[1:]


def values_of(sweep: dict[str, Any], which: int) -> dict[str, Any]:
    """One value of each parameter: the first or the last."""
    return {
        name: spec["values"][which] if "values" in spec else spec[("min", "max")[which]]
        for name, spec in sweep["parameters"].items()
    }


@pytest.fixture(scope="module")
def logged(bayes, tmp_path_factory) -> Logged:
    """A tiny run by the command of the W&B sweep."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    register_schemas()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_") or name == "AGENTFT_SWEEP_DIR"]:
            patch.delenv(name)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB__DISABLE_STATS", "true")
        words = [*overrides_of(bayes, values_of(bayes, 0)), *TINY, f"run_dir='{folder}'"]
        train(to_train_config(compose("train", words)))
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    return Logged(file)


# --- sweeps/wandb_bayes.yaml ---


def test_the_wandb_sweep_names_settings_that_exist(bayes):
    known = settings()
    assert set(bayes["parameters"]) <= known.keys()
    assert {"sft_type.rank", "training.learning_rate", "dataset.max_samples"} <= bayes["parameters"].keys()
    assert bayes["method"] == "bayes"


@pytest.mark.parametrize("which", [0, -1])
def test_the_command_of_the_wandb_sweep_composes(bayes, which):
    values = values_of(bayes, which)
    config = to_train_config(compose("train", [*overrides_of(bayes, values), "run_dir=runs/test"]))
    assert config.sft_type.rank == values["sft_type.rank"]
    assert config.sft_type.alpha == 2 * values["sft_type.rank"]
    assert config.training.learning_rate == values["training.learning_rate"]
    assert config.dataset.max_samples == values["dataset.max_samples"] <= config.dataset.conversations


def test_the_wandb_sweep_searches_for_what_a_run_logs_at_every_evaluation(bayes, logged):
    name = bayes["metric"]["name"]
    values = [row[name] for row in logged.rows if name in row]
    assert len(values) == 2, "Hyperband counts these"
    assert all(isinstance(value, (int, float)) for value in values)
    assert bayes["early_terminate"]["type"] == "hyperband"


# --- The workspace ---


def spec_of(text: str) -> list[dict[str, Any]]:
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


@needs_library
def test_the_workspace_shows_only_what_a_run_logs(logged):
    panels = spec_of(workspace_json(build_workspace("agentft")))
    kinds = {panel["viewType"] for panel in panels}
    assert kinds == {"Run History Line Plot", "Bar Chart", "Parallel Coordinates Plot", "Run Comparer"}
    for panel in panels:
        config = panel["config"]
        match panel["viewType"]:
            case "Run History Line Plot":
                assert {config["xAxis"], *config["metrics"]} <= logged.history
            case "Bar Chart":
                assert set(config["metrics"]) <= logged.summary
            case "Parallel Coordinates Plot":
                accessors = [column["accessor"] for column in config["columns"]]
                assert accessors.pop().removeprefix("summary:") in logged.summary
                # `sft_type.value.rank`: W&B keeps a config's top level as name -> value
                assert {each.removeprefix("config:").replace(".value.", ".") for each in accessors} <= settings().keys()


@needs_library
def test_the_same_spec_gives_the_same_json():
    texts = {workspace_json(build_workspace("agentft", "me")) for _ in range(2)}
    assert len(texts) == 1
    ids = [panel["__id__"] for panel in spec_of(texts.pop())]
    assert len(ids) == len(set(ids))


@needs_library
def test_the_command_prints_json_and_writes_it(tmp_path, capsys):
    assert dashboard.main(["--project", "mine", "--metric", "tool_acc"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["project"] == "mine"
    assert "summary:after.tool_acc" in printed
    file = tmp_path / "new" / "workspace.json"
    assert dashboard.main(["--project", "mine", "--metric", "tool_acc", "--json", str(file)]) == 0
    assert file.read_text() == printed
    assert dashboard.main(["--metric", "argf1"]) == 2
    assert "expected one of" in capsys.readouterr().err


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def test_pushing_without_a_key_is_refused_before_anything_is_sent(no_key, capsys):
    assert dashboard.main(["--push"]) == 2
    assert "WANDB_API_KEY" in capsys.readouterr().err


@needs_library
def test_pushing_again_replaces_the_workspace(no_key, monkeypatch):
    """The server is played: it knows one workspace, of the first push."""
    from wandb_workspaces.workspaces import internal

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    client = SimpleNamespace(app_url="https://wandb.ai", settings=lambda *_: {})
    monkeypatch.setattr("wandb.Api", lambda *_: SimpleNamespace(client=client, default_entity="me"))
    saved: list[dict[str, Any]] = []

    def execute(_: object, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "UpsertView2" in query:
            saved.append(variables)
            return {"upsertView": {"view": {"id": "id-1", "name": variables["name"]}, "inserted": len(saved) == 1}}
        nodes = [{"node": {"id": "id-1", "displayName": each["displayName"], "spec": each["spec"]}} for each in saved]
        return {"project": {"allViews": {"edges": nodes[-1:]}}}

    monkeypatch.setattr(internal, "execute_graphql", execute)
    for _ in range(2):
        address = dashboard.push(build_workspace("agentft", "me"))
    assert address.endswith(f"/me/agentft?nw={dashboard.VIEW}")
    assert [each.get("id") for each in saved] == [None, "id-1"]
    assert {each["name"] for each in saved} == {f"nw-{dashboard.VIEW}-v"}

    def refuse(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(internal, "execute_graphql", refuse)
    with pytest.raises(RunError, match="me/agentft: W&B did not take the workspace: no route"):
        dashboard.push(build_workspace("agentft", "me"))
