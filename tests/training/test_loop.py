"""Laws of the loop: micro-batches do not matter, equal seeds give equal runs, resumed equals uninterrupted."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from agentft.data.batches import StepPlan
from agentft.data.tokens import IGNORE_INDEX
from agentft.errors import CheckpointError, TrainingError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.adapters import prepare_for_training, trained_state
from agentft.model.config import FullConfig, LoraConfig, ModelConfig
from agentft.model.labelled_loss import LabelledLoss
from agentft.training.checkpoint import list_checkpoints
from agentft.training.config import Resume, TrainingConfig
from agentft.training.engine import SingleEngine
from agentft.training.loop import Job, step_batches, train_model

LORA = LoraConfig(name="lora", default_learning_rate=1e-2, rank=4, dropout=0.1)
FULL = FullConfig(name="full", default_learning_rate=1e-3)


def _job(folder, model, examples, *, sft=LORA, steps=6, micro=1, accumulation=2, **changes) -> tuple[Job, list]:
    losses: list[tuple[int, float]] = []
    torch.manual_seed(11)
    trainable = prepare_for_training(model, sft, ModelConfig(name="tiny"))
    torch.manual_seed(12)
    training = TrainingConfig(
        learning_rate=sft.default_learning_rate,
        per_device_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=1,
        save_steps=2,
        save_total_limit=5,
    )
    job = Job(
        engine=SingleEngine(LabelledLoss(trainable), training),
        examples=examples,
        plan=StepPlan(
            examples=len(examples), examples_per_step=micro * accumulation, epochs=1, max_steps=steps, seed=5
        ),
        config=dataclasses.replace(training, **changes.pop("training", {})),
        pad_id=0,
        device=torch.device("cpu"),
        checkpoints=folder / "checkpoints",
        fingerprint={"data": "x"},
        evaluate=lambda step: {"loss": 1.0 / step},
        evaluation_steps=0,
        best_metric="loss",
        rank=EvaluationConfig(best_metric="loss").rank,
        log=lambda values, step: losses.append((step, values["train/loss"])) if "train/loss" in values else None,
    )
    return dataclasses.replace(job, **changes), losses


@pytest.mark.parametrize("sft", [LORA, FULL], ids=["lora", "full"])
def test_two_identical_runs_give_identical_losses(tmp_path, tiny_model, examples, sft):
    first, losses = _job(tmp_path / "a", tiny_model(), examples, sft=sft)
    train_model(first)
    second, again = _job(tmp_path / "b", tiny_model(), examples, sft=sft)
    train_model(second)
    assert losses == again
    assert len(losses) == 6
    assert losses[-1][1] < losses[0][1]


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((4, 2), marks=pytest.mark.slow), (8, 1)])
def test_micro_batches_do_not_change_the_update(tmp_path, tiny_model, examples, shape):
    """8 x 1 equals 2 x 4: equal losses within float tolerance, though lengths and label counts differ."""
    still = dataclasses.replace(LORA, dropout=0.0)
    reference, losses = _job(tmp_path / "a", tiny_model(), examples, sft=still, micro=1, accumulation=8)
    other, again = _job(tmp_path / "b", tiny_model(), examples, sft=still, micro=shape[0], accumulation=shape[1])
    train_model(reference)
    train_model(other)
    for (_, left), (_, right) in zip(losses, again, strict=True):
        assert right == pytest.approx(left, rel=2e-5)


@pytest.mark.parametrize("row_tokens", [None, 1200], ids=["padded", "packed"])
def test_a_step_is_given_its_examples_ids_and_labels_and_no_others(tmp_path, tiny_model, examples, row_tokens):
    job, _ = _job(tmp_path, tiny_model(), examples, micro=2, accumulation=3, row_tokens=row_tokens)
    for step in range(job.plan.total_steps):
        batches = step_batches(job, step, 2)
        wanted = [examples[index] for index in job.plan.step(step)]
        assert sorted(name for batch in batches for name in batch.ids) == sorted(example.id for example in wanted)
        labels = [label for batch in batches for label in batch.labels_BT.flatten().tolist() if label != IGNORE_INDEX]
        assert sorted(labels) == sorted(int(i) for e in wanted for i in e.labels if i != IGNORE_INDEX)
        assert sum(batch.targets for batch in batches) == sum(example.trained_tokens for example in wanted)


@pytest.mark.parametrize("sft", [LORA, FULL], ids=["lora", "full"])
def test_packing_does_not_change_the_update(tmp_path, tiny_model, examples, sft):
    still = dataclasses.replace(sft, dropout=0.0) if sft is LORA else sft
    more = {"sft": still, "steps": 3, "accumulation": 5}
    reference, losses = _job(tmp_path / "a", tiny_model(), examples, **more)
    packed, again = _job(tmp_path / "b", tiny_model(), examples, **more, row_tokens=1200)
    train_model(reference)
    train_model(packed)
    for (_, left), (_, right) in zip(losses, again, strict=True):
        assert right == pytest.approx(left, rel=2e-5)


@pytest.mark.parametrize("sft", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("row_tokens", [None, 1000], ids=["padded", "packed"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, tiny_model, examples, sft, row_tokens):
    more = {"sft": sft, "steps": 7, "accumulation": 2 if row_tokens is None else 3, "row_tokens": row_tokens}
    whole, losses = _job(tmp_path / "whole", tiny_model(), examples, **more)
    train_model(whole)
    first, part_one = _job(tmp_path / "cut", tiny_model(), examples, **more)
    stops = iter([False, False, True])
    outcome = train_model(dataclasses.replace(first, stop_requested=lambda: next(stops)))
    assert outcome.counters.step == 3
    torch.manual_seed(999)  # a new process starts with other random streams
    second, part_two = _job(tmp_path / "cut", tiny_model(), examples, **more)
    train_model(second)
    assert part_one + part_two == losses
    final = trained_state(whole.engine.model)
    for name, tensor in trained_state(second.engine.model).items():
        assert torch.equal(tensor, final[name]), name


class _Drawing(torch.nn.Module):
    """An objective whose model's own code draws from every generator."""

    def __init__(self, objective):
        super().__init__()
        self.inner, self.model = objective, objective.model

    def forward(self, batch):
        return self.inner(batch) * (1 + random.random() + np.random.random() + float(torch.rand(())))


def test_what_a_models_own_code_draws_is_the_same_after_a_resume_and_whatever_an_evaluation_draws(
    tmp_path, tiny_model, examples
):
    def run(name, *, until=6, **changes):
        job, losses = _job(tmp_path / name, tiny_model(), examples, **changes)
        job.engine.objective = _Drawing(job.engine.objective)
        stops = iter([step == until for step in range(1, 7)])
        train_model(dataclasses.replace(job, stop_requested=lambda: next(stops)))
        return losses

    def evaluate(step):
        return {"loss": random.random() + np.random.random() + float(torch.rand(()))}

    whole = run("whole")
    assert whole == run("evaluated", evaluation_steps=1, evaluate=evaluate)
    first = run("cut", until=3)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert first + run("cut") == whole


def test_resume_must_refuses_an_empty_folder(tmp_path, tiny_model, examples):
    job, _ = _job(tmp_path, tiny_model(), examples, training={"resume": Resume.must})
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        train_model(job)


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path, tiny_model, examples):
    train_model(_job(tmp_path, tiny_model(), examples, steps=2)[0])
    job, _ = _job(tmp_path, tiny_model(), examples, training={"resume": Resume.never})
    with pytest.raises(CheckpointError, match="has checkpoints"):
        train_model(job)


def test_a_checkpoint_of_other_data_is_refused_by_name(tmp_path, tiny_model, examples):
    train_model(_job(tmp_path, tiny_model(), examples, steps=2)[0])
    job, _ = _job(tmp_path, tiny_model(), examples, fingerprint={"data": "y"})
    with pytest.raises(CheckpointError, match="data: 'x' -> 'y'"):
        train_model(job)


def test_a_loss_that_is_not_finite_never_reaches_the_optimiser(tmp_path, tiny_model, examples):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    job, _ = _job(tmp_path, model, examples)
    before = {name: tensor.clone() for name, tensor in trained_state(job.engine.model).items()}
    with pytest.raises(
        TrainingError, match=r"loss nan in the micro-batches of conversations .*The weights are not finite before"
    ):
        train_model(job)
    for name, tensor in trained_state(job.engine.model).items():
        assert torch.equal(tensor, before[name]), name


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path, tiny_model, examples):
    values = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    job, _ = _job(
        tmp_path,
        tiny_model(),
        examples,
        steps=6,
        training={"save_steps": 1, "save_total_limit": 2},
        evaluation_steps=1,
        evaluate=lambda step: {"loss": next(values)},
    )
    outcome = train_model(job)
    assert outcome.counters.best_step == 2
    assert [path.name for path in list_checkpoints(job.checkpoints)] == ["step-000002", "step-000005", "step-000006"]


def test_only_the_adapter_learns_under_lora(tmp_path, tiny_model, examples):
    job, _ = _job(tmp_path, tiny_model(), examples, steps=2)
    frozen = {n: p.clone() for n, p in job.engine.model.named_parameters() if not p.requires_grad}
    train_model(job)
    assert frozen
    for name, parameter in job.engine.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
