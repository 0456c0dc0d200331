"""Build the W&B workspace of a project: `python -m agentft.dashboard` prints it as JSON, `--push` saves it.

Curves of training, the tool metrics of every run side by side, swept settings against the score, what differs between
runs. It names only what `recipes/train.py` logs. Needs the extra `dashboard` (wandb-workspaces).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentft.comparison.runs import AFTER
from agentft.errors import AgentftError, ConfigError, RunError
from agentft.evaluation.metrics import HEADLINE, METRICS_BY_NAME
from agentft.progress import outlive_console
from agentft.runs import write_out
from agentft.secrets import redact_text
from agentft.tracking import STEP, TrackingConfig, TrackingMode, resolve_mode

VIEW = "agentftruns"
"""Name of the workspace in its address (`?nw=...`): pushing again replaces it."""


CURVES = {
    "Training": ("train/loss", "eval/loss", "train/learning_rate", "train/grad_norm"),
    "Held-out loss by kind of token": ("eval/loss_call", "eval/loss_text", "eval/loss_stop", "eval/loss_call_syntax"),
    "Metrics during training": tuple(f"eval/{name}" for name in HEADLINE),
    "Cost": ("train/tokens", "train/tokens_per_second", "train/padding_share"),
}
"""Section -> keys of the history, one line plot each."""

SWEPT = {"sft_type.rank": True, "training.learning_rate": True, "dataset.max_samples": False}
"""Setting that is a column of the parallel coordinates -> whether its axis is logarithmic."""


def build_workspace(project: str, entity: str = "", metric: str = "arg_f1") -> Any:
    """Return a `wandb_workspaces` workspace with settings against `metric`; nothing is sent.

    `entity` is the user or team of the project; empty: that of the key.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        # By name: an optional package, unknown to the type checker.
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        panels = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ConfigError(f"wandb-workspaces is needed ({error}): pip install wandb-workspaces") from error
    columns = [
        panels.ParallelCoordinatesPlotColumn(
            metric=panels.Config(setting), display_name=setting.rpartition(".")[2], log=log
        )
        for setting, log in SWEPT.items()
    ]
    score = panels.SummaryMetric(f"{AFTER}.{metric}")
    columns.append(panels.ParallelCoordinatesPlotColumn(metric=score, display_name=metric))
    bars = dict.fromkeys((metric, *HEADLINE))
    sections = {
        "Settings against score": [panels.ParallelCoordinatesPlot(columns=columns)],
        "After training": [panels.BarPlot(title=name, metrics=[f"{AFTER}.{name}"]) for name in bars],
        **{title: [panels.LinePlot(title=key, x=STEP, y=[key]) for key in keys] for title, keys in CURVES.items()},
        "What differs": [panels.RunComparer(diff_only="split")],
    }
    for i, drawn in enumerate(sections.values()):
        for j, panel in enumerate(drawn):
            panel._id = f"agentft{i:02}{j:02}"  # of its own it is random, and the same spec would give other JSON
    return workspaces.Workspace(
        name="agentft",
        entity=entity,
        project=project,
        sections=[workspaces.Section(name=name, panels=each, is_open=True) for name, each in sections.items()],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            order=[workspaces.Ordering(workspaces.Summary(f"{AFTER}.{metric}"), ascending=False)]
        ),
    )


def workspace_json(workspace: Any) -> str:
    """Return what W&B would be sent, as JSON; the same for the same arguments."""
    # The library sends this itself and has no other way to see it.
    spec = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    named = {"name": workspace.name, "entity": workspace.entity, "project": workspace.project, "spec": spec}
    return json.dumps(named, indent=2, ensure_ascii=False) + "\n"


def push(workspace: Any) -> str:
    """Save the workspace on the W&B server, in the place of an earlier one of agentft, and return its address.

    Raises:
        RunError: the server refused.
    """
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        address = f"https://wandb.ai/{workspace.entity}/{workspace.project}?nw={VIEW}"
        # An identity of ours cannot be given publicly: each save would be a new workspace.
        with contextlib.suppress(ValueError):  # no such workspace yet
            workspace._internal_id = type(workspace).from_url(address)._internal_id
        workspace._internal_name = f"nw-{VIEW}-v"
        workspace.save()
    except Exception as error:
        where = f"{workspace.entity or '<your entity>'}/{workspace.project}"
        raise RunError(f"{where}: W&B did not take the workspace: {redact_text(str(error))[:300]}") from error
    return str(workspace.url)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    outlive_console()
    options = _parse_options(arguments)
    try:
        if options.push:
            resolve_mode(TrackingConfig(mode=TrackingMode.online), os.environ)
        if options.metric not in METRICS_BY_NAME:
            raise ConfigError(f"--metric {options.metric}: expected one of {', '.join(METRICS_BY_NAME)}")
        workspace = build_workspace(options.project, options.entity, options.metric)
        if options.json:
            write_out(Path(options.json), workspace_json(workspace))
        if options.push:
            sys.stdout.write(push(workspace) + "\n")
        elif not options.json:
            sys.stdout.write(workspace_json(workspace))
    except AgentftError as error:
        sys.stderr.write(f"dashboard: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m agentft.dashboard", description="The W&B workspace of a project, printed as JSON or saved."
    )
    parser.add_argument("--project", default=TrackingConfig().project, help="W&B project (default: agentft)")
    parser.add_argument("--entity", default="", help="W&B user or team (default: that of the key)")
    parser.add_argument("--metric", default="arg_f1", help="what settings are seen against (default: arg_f1)")
    parser.add_argument("--json", metavar="FILE", help="write the workspace as JSON")
    parser.add_argument("--push", action="store_true", help="save it on the W&B server; needs a key")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
