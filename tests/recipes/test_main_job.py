"""The main job, whole, on a tiny random model: what a run folder holds, and that it can be trusted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from agentft.config import compose, register_schemas, to_train_config
from agentft.errors import ConfigError, RunError
from agentft.recipes.config import EvaluateConfig, TrainConfig, saved_config
from agentft.recipes.evaluate import evaluate
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.tracking import read_metrics

QUICK = [
    "model=tiny",
    "dataset.conversations=12",
    "dataset.heldout=4",
    "training.gradient_accumulation_steps=4",
    "training.max_steps=4",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.learning_rate=0.01",
    "evaluation.eval_steps=2",
    "evaluation.max_new_tokens=8",
    "evaluation.bootstrap_samples=200",
    "tracking=disabled",
    "threads=1",
]


def quick_config(run_dir: Path, *overrides: str) -> TrainConfig:
    register_schemas()
    return to_train_config(compose("train", [*QUICK, *overrides, f"run_dir='{run_dir}'"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("runs") / "a run with spaces"
    return train(quick_config(folder))


def test_the_run_folder_documents_itself(finished, golden_folder, update_golden):
    """To renew the list of its files where a change is meant: `pytest tests/recipes/test_main_job.py --update-golden`."""
    run = finished.run_dir
    if update_golden:
        (golden_folder / "run_folder.txt").write_text(_files(run))
    assert _files(run) == (golden_folder / "run_folder.txt").read_text()
    for name in ("config.yaml", "run.json", "status.json", "metrics.jsonl", "summary.json", "train.log", "report.txt"):
        assert (run / name).stat().st_size, name
    record = read_json(run / "run.json")
    assert {"git", "packages", "data_fingerprint", "model_fingerprint", "threads", "command"} <= record.keys()
    assert read_json(run / "status.json")["state"] == "finished"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert (run / "final" / "adapter_model.safetensors").is_file()
    for name in ("before", "after"):
        lines = (run / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = read_json(run / "metrics" / f"{name}.json")
        assert len(lines) == metrics["counts"]["steps"] > 4
        assert {"value", "numerator", "denominator", "low", "high"} <= metrics["metrics"]["tool_acc"].keys()


def test_the_saved_config_loads_back_and_reruns_to_the_same_losses(finished, tmp_path):
    saved = saved_config(finished.run_dir)
    again = train(dataclasses.replace(saved, run_dir=str(tmp_path / "again")))
    first, second = (_losses(run) for run in (finished.run_dir, again.run_dir))
    assert first == second
    assert len(first) == 4


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def test_training_learns(finished):
    losses = [loss for _, loss in _losses(finished.run_dir)]
    assert losses[-1] < losses[0] - 0.1


def test_evaluate_gives_the_numbers_that_training_ended_with(finished):
    config = EvaluateConfig(
        run=str(finished.run_dir),
        evaluation=saved_config(finished.run_dir).evaluation,
        tracking=saved_config(finished.run_dir).tracking,
    )
    result = evaluate(config)
    after = read_json(finished.run_dir / "metrics" / "after.json")
    assert read_json(result.metrics_file)["metrics"] == after["metrics"]
    assert result.objective == finished.objective


def test_predictions_can_be_scored_alone(finished):
    import subprocess
    import sys

    file = finished.run_dir / "predictions" / "after.jsonl"
    command = [sys.executable, "-m", "agentft.score", str(file), "--json", "--bootstrap-samples", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scored = json.loads(done.stdout)["metrics"]
    expected = read_json(finished.run_dir / "metrics" / "after.json")["metrics"]
    assert {name: scored[name]["value"] for name in expected} == {name: m["value"] for name, m in expected.items()}


def test_the_adapter_loads_without_agentft_and_carries_the_training(finished):
    """peft and transformers alone give the weights that the last checkpoint holds."""
    from safetensors.torch import load_file

    adapter = load_file(finished.run_dir / "final" / "adapter_model.safetensors")
    trained = load_file(finished.run_dir / "checkpoints" / "step-000004" / "trained.safetensors")
    by_suffix = {name.replace(".default", ""): tensor for name, tensor in trained.items()}
    assert adapter.keys() == by_suffix.keys()
    assert all(tensor.equal(by_suffix[name]) for name, tensor in adapter.items())


def test_a_run_cut_short_goes_on_in_its_folder_to_the_same_end(finished, tmp_path, golden_folder):
    """Resumed through the whole recipe: same losses, same files, and metrics.jsonl holds each step once."""
    cut = tmp_path / "cut"
    config = quick_config(cut)
    import agentft.recipes.train as recipe

    calls = iter([False, True])
    original = recipe.train_model
    try:
        recipe.train_model = lambda job: original(dataclasses.replace(job, stop_requested=lambda: next(calls)))
        train(config)
    finally:
        recipe.train_model = original
    assert max(step for step, _ in _losses(cut)) == 2
    first = read_json(cut / "run.json")["run_id"]
    train(quick_config(cut, "dataset.workers=1", "training.memory_check=warn", "evaluation.batch=4"))
    assert read_json(cut / "run.json")["run_id"] == first
    assert _losses(cut) == _losses(finished.run_dir)
    assert _files(cut) == (golden_folder / "run_folder.txt").read_text()


def _files(run: Path) -> str:
    return "".join(sorted(f"{path.relative_to(run).as_posix()}\n" for path in run.rglob("*") if path.is_file()))


def test_a_run_does_not_go_on_with_another_attention_unless_allowed(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.run_dir, folder)
    others = [name for name in ("eager", "sdpa") if name not in (finished.run_dir / "train.log").read_text("utf-8")]
    with pytest.raises(ConfigError, match=f"attention: '.*' -> '{others[0]}'"):
        train(quick_config(folder, f"model.attention={others[0]}"))


def test_two_runs_into_one_folder_are_refused(tmp_path):
    from agentft.runs import RunFolder

    with RunFolder.create(tmp_path / "run"), pytest.raises(RunError, match="in use"):
        train(quick_config(tmp_path / "run"))


def test_full_fine_tuning_runs_and_saves_a_whole_model(tmp_path):
    result = train(quick_config(tmp_path / "full", "sft_type=full", "training.learning_rate=0.003"))
    losses = [loss for _, loss in _losses(result.run_dir)]
    assert losses[-1] < losses[0]
    assert (result.run_dir / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("sft", ["lora", "full"])
def test_precisions_train(tmp_path, precision, sft):
    result = train(
        quick_config(
            tmp_path / "run",
            f"sft_type={sft}",
            f"model.dtype={precision}",
            "training.gradient_checkpointing=true",
            "training.max_steps=2",
            "evaluation.before=false",
            "evaluation.after=false",
        )
    )
    assert len(_losses(result.run_dir)) == 2


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    plain, checkpointed = (
        _losses(
            train(
                quick_config(
                    tmp_path / name,
                    f"training.gradient_checkpointing={name}",
                    "sft_type.dropout=0",
                    "evaluation.before=false",
                    "evaluation.after=false",
                )
            ).run_dir
        )
        for name in ("false", "true")
    )
    assert [round(loss, 5) for _, loss in plain] == [round(loss, 5) for _, loss in checkpointed]


def test_bad_rows_are_set_aside_listed_and_counted(tmp_path, golden_folder):
    good = (golden_folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [*good, "{not json", json.dumps({"id": "odd", "conversations": []}), good[0]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = train(dataclasses.replace(quick_config(tmp_path / "run"), dataset=_local(data)))
    manifest = read_json(result.run_dir / "data" / "manifest.json")
    rejected = [json.loads(line) for line in (result.run_dir / "data" / "rejected.jsonl").read_text().splitlines()]
    assert sum(manifest["set_aside"].values()) == len(rejected) == 3
    assert {row["line"] for row in rejected} == {len(good) + 1, len(good) + 2, len(good) + 3}
    assert all(row["reason"] and row["detail"] for row in rejected)


def _local(path: Path):
    from agentft.data.config import LocalConfig

    return LocalConfig(name="local", path=str(path), test_ratio=0.3, max_rejected=0.5)


def test_a_failed_run_says_so_in_its_folder(tmp_path):
    from agentft.errors import DataError

    config = dataclasses.replace(quick_config(tmp_path / "run"), dataset=_local(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        train(config)
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert "none.jsonl" in status["error"]
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


def test_what_wandb_holds_offline_is_what_the_run_measured(tmp_path):
    """Read back by W&B's own reader: the losses of metrics.jsonl, the summary, the config, and nothing secret."""
    import subprocess
    import sys

    config = quick_config(tmp_path / "run", "tracking=wandb", "tracking.mode=offline", "evaluation.before=false")
    run = train(config).run_dir
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect"]
    lines = subprocess.run([*inspect, "--json", str(file)], capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in lines.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = [(row["train/global_step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert logged == _losses(run)
    evaluated = [row["eval/loss"] for row in history if "eval/loss" in row]
    assert evaluated == [row["eval/loss"] for row in read_metrics(run / "metrics.jsonl") if "eval/loss" in row]
    assert list((run / "wandb").rglob("after*.table.json")), "the predictions are there as a table"
    overview = subprocess.run([*inspect, "--summary", "--json", str(file)], capture_output=True, text=True, check=True)
    assert "arg_f1" in overview.stdout
    assert '"rank"' in overview.stdout
