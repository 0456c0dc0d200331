"""Each way of measuring through `evaluate`, and what decides during training."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from agentft import entry
from agentft.compare import main as compare
from agentft.comparison.runs import read_runs
from agentft.config import compose, register_schemas, to_config, to_train_config
from agentft.config.main import with_evaluation_of_the_run
from agentft.errors import ConfigError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.recipes.config import EvaluateConfig, TrainConfig, config_to_yaml, saved_config
from agentft.recipes.evaluate import evaluate
from agentft.recipes.evaluation_run import Validator
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.tracking import read_metrics
from tests.evaluation.loopback_chat import LoopbackChat

REPOSITORY = Path(__file__).parent.parent.parent


QUICK = [
    "model=tiny",
    "dataset.conversations=12",
    "dataset.heldout=5",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=6",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.learning_rate=0.01",
    "evaluation.eval_steps=2",
    "evaluation.max_new_tokens=6",
    "evaluation.bootstrap_samples=100",
    "evaluation.before=false",
    "tracking=disabled",
    "threads=1",
]


def config(run_dir: Path, *overrides: str) -> TrainConfig:
    register_schemas()
    return to_train_config(compose("train", [*QUICK, *overrides, f"run_dir='{run_dir}'"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(config(tmp_path_factory.mktemp("runs") / "run")).run_dir


def evaluated(run: Path, **settings: object):
    saved = saved_config(run)
    values = {"bootstrap_samples": 100, "max_new_tokens": 6, **settings}
    return evaluate(EvaluateConfig(run=str(run), evaluation=EvaluationConfig(**values), tracking=saved.tracking))


def evaluations(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if name in row]


def test_each_evaluation_during_training_logs_the_loss_of_each_kind(finished):
    for name in ("loss", "loss_text", "loss_call", "loss_call_syntax", "loss_stop"):
        assert len(evaluations(finished, f"eval/{name}")) == 3
    assert len(evaluations(finished, "eval/arg_f1")) == 3, "answered too: they decide which checkpoint is the best"


def test_likelihood_gives_the_loss_that_training_ended_with(finished):
    result = evaluated(finished, mode=Mode.likelihood)
    report = read_json(result.metrics_file)
    assert result.metrics_file.name == "likelihood-final.json"
    for name in ("loss", "loss_call"):
        assert report["metrics"][name]["value"] == pytest.approx(evaluations(finished, f"eval/{name}")[-1], rel=1e-6)
    assert report["metrics"]["perplexity"]["value"] > 1
    assert result.objective == -report["metrics"]["loss"]["value"]


def test_replay_writes_where_each_conversation_left_the_record(finished):
    result = evaluated(finished, mode=Mode.replay)
    report = read_json(result.metrics_file)
    assert result.metrics_file.name == "replay-final.json"
    assert {"steps_until_divergence", "conv_replay_success"} == report["metrics"].keys()
    lines = (finished / "predictions" / "replay-final.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == report["counts"]["steps_asked"]
    assert sum(row["diverged"] is not None for row in rows) == report["counts"]["diverged"] > 0
    assert all(row["mode"] == "replay" for row in rows)
    assert (finished / "predictions" / "replay-final.html").is_file()


def test_a_served_model_sits_the_same_exam_without_weights_and_can_be_compared(finished, monkeypatch, capsys):
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("agentft.recipes.components.load_model", no_weights)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret-of-this-test")
    with LoopbackChat(lambda *_: {"content": "I do not know."}) as chat:
        settings = {"engine": Engine.openai, "base_url": chat.url, "served_model": "org/model:1"}
        result = evaluated(finished, **settings)
        assert result.metrics_file.name == "evaluate-openai-org-model-1.json"
        replayed = read_json(evaluated(finished, mode=Mode.replay, **settings).metrics_file)
    report, after = (read_json(finished / "metrics" / f"{name}.json") for name in (result.metrics_file.stem, "after"))
    assert report["counts"]["steps"] == after["counts"]["steps"]
    assert report["signature"] == after["signature"]
    assert report["metrics"]["tool_acc"]["value"] == 0
    assert report["metrics"]["rouge_l"]["value"] > 0
    assert replayed["metrics"]["conv_replay_success"]["value"] == 0
    files = (finished / "predictions" / f"{name}.jsonl" for name in ("after", result.metrics_file.stem))
    assert compare([str(file) for file in files]) == 0
    assert "rouge_l" in capsys.readouterr().out
    for file in finished.rglob("*"):
        assert file.is_dir() or b"sk-a-secret" not in file.read_bytes(), file


def test_the_best_checkpoint_is_that_of_the_metric_that_decides(tmp_path, monkeypatch):
    values = iter([0.2, 0.6, 0.4])
    original = Validator._generate
    monkeypatch.setattr(Validator, "_generate", lambda self: original(self) | {"arg_f1": next(values)})
    result = train(
        config(
            tmp_path / "run",
            "evaluation.conversations_during=2",
            "training.save_total_limit=1",
            "evaluation.after=false",
        )
    )
    assert (result.summary["best_step"], result.summary["best_value"]) == (4, 0.6)
    assert evaluations(result.run_dir, "eval/arg_f1") == [0.2, 0.6, 0.4]
    assert len(evaluations(result.run_dir, "eval/plan_acc")) == 3
    assert sorted(p.name for p in (result.run_dir / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    report = read_json(evaluated(result.run_dir, mode=Mode.likelihood).metrics_file)
    assert report["counts"]["conversations"] == 5


def test_answers_during_training_change_no_loss(finished, tmp_path):
    result = train(config(tmp_path / "run", "evaluation.conversations_during=3", "evaluation.after=false"))
    assert evaluations(result.run_dir, "train/loss") == evaluations(finished, "train/loss")


def test_patience_ends_the_training_and_holds_when_it_is_started_again(tmp_path, monkeypatch):
    values = {2: 0.5, 4: 0.6, 6: 0.1}
    original = Validator.evaluate

    class Fake(Validator):
        def _measure(self):
            found = super()._measure()
            step = len(self._ranks) * 2 + 2
            found.nats_GK[:] = found.tokens_GK * values[step]
            return found

    monkeypatch.setattr("agentft.recipes.train.Validator", Fake)
    assert Fake.evaluate is original
    by_loss = ("evaluation.best_metric=loss", "evaluation.after=false")
    quick = config(tmp_path / "run", "evaluation.patience=1", *by_loss)
    result = train(quick)
    assert result.summary["steps"] == 4, "0.6 is no better than 0.5"
    assert evaluations(result.run_dir, "eval/loss") == pytest.approx([0.5, 0.6])
    again = train(quick)
    assert again.summary["steps"] == 4, "a training that has ended early does not go on"
    patient = train(config(tmp_path / "run", "evaluation.patience=2", *by_loss))
    assert patient.summary["steps"] == 6
    assert patient.summary["best_step"] == 6


def test_metrics_that_cannot_decide_are_refused():
    for name in ("nonsense", "hallucinated_tool_rate"):
        with pytest.raises(ConfigError, match="best_metric"):
            EvaluationConfig(best_metric=name)
    assert EvaluationConfig().best_metric == "arg_f1"
    assert EvaluationConfig().generates_during_training == 16
    assert EvaluationConfig(conversations_during=5).generates_during_training == 5
    assert EvaluationConfig(conversations=3).generates_during_training == 3
    assert EvaluationConfig(best_metric="loss").generates_during_training == 0


def test_the_loss_decides_between_equal_values_and_no_value_is_below_every_value():
    rank = EvaluationConfig(best_metric="tool_precision").rank
    better_and_better = [
        {"loss": 0.2},  # 0/0: never called
        {"loss": 0.1},
        {"loss": 3.0, "tool_precision": 0.0},
        {"loss": 2.0, "tool_precision": 0.0},
        {"loss": 9.0, "tool_precision": 0.5},
    ]
    ranks = [rank(each) for each in better_and_better]
    assert ranks == sorted(ranks)
    assert len({tuple(each) for each in ranks}) == 5
    assert rank({"loss": math.nan, "tool_precision": 1.0}) is None
    by_loss = EvaluationConfig(best_metric="loss").rank
    assert by_loss({"loss": 1.0, "arg_f1": 0.0}) > by_loss({"loss": 2.0, "arg_f1": 1.0})


def test_a_metric_without_a_value_is_written_as_none_and_not_as_zero(tmp_path, monkeypatch):
    values = {2: {}, 4: {"tool_precision": 0.0}, 6: {}}
    monkeypatch.setattr(Validator, "_generate", lambda self: values[len(self._ranks) * 2 + 2])
    result = train(config(tmp_path / "run", "evaluation.best_metric=tool_precision", "evaluation.after=false"))
    assert evaluations(result.run_dir, "eval/tool_precision") == [0.0]
    assert (result.summary["best_step"], result.summary["best_value"]) == (4, 0.0)
    assert result.objective == 0.0


def test_patience_counts_again_from_the_best_when_a_training_is_started_again(tmp_path, monkeypatch):
    """Values of 0/0 in the history count as evaluations too."""
    answers = {2: {"arg_f1": 0.3}, 4: {}, 6: {"arg_f1": 0.2}}
    monkeypatch.setattr(Validator, "_generate", lambda self: answers[len(self._ranks) * 2 + 2])
    quick = config(tmp_path / "run", "evaluation.patience=1", "evaluation.after=false")
    assert train(quick).summary["steps"] == 4
    assert train(quick).summary["steps"] == 4
    patient = config(tmp_path / "run", "evaluation.patience=2", "evaluation.after=false")
    assert train(patient).summary["steps"] == 6


@pytest.mark.parametrize("setting", ["mode=replay", "mode=likelihood"])
def test_a_training_measures_its_own_model_only(tmp_path, setting):
    with pytest.raises(ConfigError, match=r"evaluate\.py"):
        train(config(tmp_path / "run", f"evaluation.{setting}"))


def test_one_setting_of_an_evaluation_is_changed_and_the_others_are_those_of_the_run(finished, monkeypatch):
    """Through the command line: 6 new tokens and 100 draws are the run's, not the defaults."""
    command = ["evaluate.py", f"run={finished}", "evaluation.conversations=2", "checkpoint=base"]
    of_training = (finished / "report.txt").read_bytes()
    monkeypatch.setattr(sys, "argv", command)
    entry.evaluate()
    report = read_json(finished / "metrics" / "evaluate-base.json")
    assert report["counts"]["conversations"] == 2
    assert report["identity"]["max_new_tokens"] == 6
    assert report["bootstrap"]["draws"] == 100
    assert (finished / "report-evaluate-base.txt").is_file()
    assert (finished / "report.txt").read_bytes() == of_training


def test_settings_of_a_run_reach_the_command_line_whatever_they_hold(finished, tmp_path):
    texts = ['{"a": "b\\"c"}', "x\\", "it's", "${here}", "null", "", 'a\\\\"', "1"]
    for text in texts:
        saved = saved_config(finished)
        saved.evaluation.auth_variable = text
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(config_to_yaml(saved), encoding="utf-8")
        arguments = with_evaluation_of_the_run([f"run={folder}", "evaluation.batch=3"])
        assert with_evaluation_of_the_run(arguments) == arguments, "a command that a run has recorded runs again"
        composed = to_config(compose("evaluate", arguments), EvaluateConfig).evaluation
        assert composed == dataclasses.replace(saved.evaluation, batch=3)
    for untouched in (["run=x"], ["run=x", "evaluation=short", "evaluation.batch=3"]):
        assert with_evaluation_of_the_run(untouched) == untouched
    assert with_evaluation_of_the_run(["run=nowhere", "evaluation.batch=3"])[-1] == "evaluation=as_trained"


def test_a_sweep_over_runs_leaves_the_settings_of_each_to_its_job(finished):
    for runs in (f"{finished},other", f"{finished}"):
        sweep = ["-m", f"run={runs}", "evaluation.batch=3,4"]
        assert with_evaluation_of_the_run(sweep) == [*sweep, "evaluation=as_trained"]
    of_a_job = with_evaluation_of_the_run(["evaluation=as_trained", "evaluation.batch=3", f"run={finished}"])
    composed = to_config(compose("evaluate", of_a_job), EvaluateConfig).evaluation
    assert composed == dataclasses.replace(saved_config(finished).evaluation, batch=3)


def test_an_evaluation_into_a_folder_of_its_own_leaves_the_run_as_it_was_and_compares_with_it(finished, tmp_path):
    saved = saved_config(finished)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    settings = dataclasses.replace(saved.evaluation, conversations=3)
    apart = EvaluateConfig(
        run=str(finished), evaluation=settings, tracking=saved.tracking, output=str(tmp_path / "apart")
    )
    result = evaluate(apart)
    assert result.metrics_file == tmp_path / "apart" / "metrics" / "after.json"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before
    (read,) = read_runs([tmp_path / "apart"])
    assert (read.state, read.number("arg_f1")) == ("finished", result.objective)
    assert saved_config(tmp_path / "apart").evaluation.conversations == 3
    ours = (tmp_path / "apart" / "predictions" / "after.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(ours) <= set((finished / "predictions" / "after.jsonl").read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_a_sweep_over_settings_of_an_evaluation_ends_in_a_table(finished, tmp_path):
    command = [sys.executable, "evaluate.py", "-m", f"run={finished}", "evaluation.max_new_tokens=2,6"]
    sweep = tmp_path / "sweep"
    quick = ["evaluation.conversations=2", f"hydra.sweep.dir={sweep}", "hydra.launcher.slots=1"]
    done = subprocess.run([*command, *quick], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (sweep / "sweep.csv").read_text(encoding="utf-8")
    assert table.count("finished") == 2
    cut = [read_json(path)["identity"]["max_new_tokens"] for path in sorted(sweep.glob("*/metrics/after.json"))]
    assert cut == [2, 6]
