"""Numbers that are not finite never reach the optimiser, and a step that does not fit into memory changes nothing else."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agentft.errors import TrainingError
from agentft.model.adapters import trained_state
from agentft.training.config import NonFinite
from agentft.training.loop import accumulate_within_memory, is_out_of_memory, train_model
from tests.training.test_loop import FULL, LORA
from tests.training.test_loop import _job as make_job

SKIP = {"nonfinite": NonFinite.skip}


class _Spoiled(torch.nn.Module):
    """An objective whose loss, or the gradient behind a finite loss, is not finite for one conversation."""

    def __init__(self, objective, conversation: str, spoil: str):
        super().__init__()
        self.inner = objective
        self.conversation, self.spoil = conversation, spoil

    @property
    def model(self):
        return self.inner.model

    def forward(self, batch):
        loss = self.inner(batch)
        if self.conversation not in batch.ids:
            return loss
        if self.spoil == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def _spoiled(folder, tiny_model, examples, spoil, *, sft=LORA, every=False, **training):
    job, losses = make_job(folder, tiny_model(), examples, sft=sft, training=training)
    spoiled = examples[job.plan.step(2)[0]].id if not every else examples[0].id
    whole = job.engine.objective
    job.engine.objective = _Spoiled(whole, spoiled, spoil)
    if every:
        job.engine.objective.forward = lambda batch: whole(batch) * float("nan")
    return job, losses, spoiled


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_stop_names_step_conversation_and_reason_and_leaves_the_weights(tmp_path, tiny_model, examples, spoil):
    job, losses, conversation = _spoiled(tmp_path, tiny_model, examples, spoil)
    with pytest.raises(TrainingError, match=rf"step \d+: .*(nan|inf).*{conversation}.*were not changed") as error:
        train_model(job)
    first = int(str(error.value).split(":")[0].removeprefix("step "))
    assert [step for step, _ in losses] == list(range(1, first))
    assert all(torch.isfinite(tensor).all() for tensor in trained_state(job.engine.model).values())
    again, _, _ = _spoiled(tmp_path / "again", tiny_model, examples, spoil)
    with pytest.raises(TrainingError) as repeated:
        train_model(again)
    assert str(repeated.value) == str(error.value)


@pytest.mark.parametrize("sft", [LORA, FULL], ids=["lora", "full"])
def test_skip_leaves_out_the_step_and_is_reproducible(tmp_path, tiny_model, examples, caplog, sft):
    job, losses, conversation = _spoiled(tmp_path / "a", tiny_model, examples, "loss", sft=sft, **SKIP)
    outcome = train_model(job)
    assert outcome.counters.step == 6
    left_out = [step for step, loss in losses if loss != loss]
    assert left_out, "the logged loss must show the NaN"
    assert outcome.counters.skipped == len(left_out)
    for step in left_out:
        assert f"step {step} left out" in caplog.text
    assert conversation in caplog.text
    again, repeated, _ = _spoiled(tmp_path / "b", tiny_model, examples, "loss", sft=sft, **SKIP)
    train_model(again)
    assert [float(loss).hex() for _, loss in repeated] == [float(loss).hex() for _, loss in losses]
    final = trained_state(job.engine.model)
    for name, tensor in trained_state(again.engine.model).items():
        assert torch.equal(tensor, final[name]), name
        assert torch.isfinite(tensor).all()


def test_a_skipped_step_does_not_move_the_weights(tmp_path, tiny_model, examples):
    job, _, _ = _spoiled(tmp_path, tiny_model, examples, "gradient", every=True, nonfinite_limit=100, **SKIP)
    before = {name: tensor.clone() for name, tensor in trained_state(job.engine.model).items()}
    assert train_model(job).counters.skipped == 6
    for name, tensor in trained_state(job.engine.model).items():
        assert torch.equal(tensor, before[name]), name


def test_too_many_skips_in_a_row_end_the_training(tmp_path, tiny_model, examples):
    job, _, _ = _spoiled(tmp_path, tiny_model, examples, "loss", every=True, nonfinite_limit=2, **SKIP)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train_model(job)


def test_skipping_resumes_exactly(tmp_path, tiny_model, examples):
    whole, losses, _ = _spoiled(tmp_path / "whole", tiny_model, examples, "loss", **SKIP)
    train_model(whole)
    first, one, _ = _spoiled(tmp_path / "cut", tiny_model, examples, "loss", **SKIP)
    stops = iter([False, False, True])
    train_model(dataclasses.replace(first, stop_requested=lambda: next(stops)))
    second, two, _ = _spoiled(tmp_path / "cut", tiny_model, examples, "loss", **SKIP)
    outcome = train_model(second)
    assert [(s, x.hex()) for s, x in one + two] == [(s, x.hex()) for s, x in losses]
    assert outcome.counters.skipped == sum(loss != loss for _, loss in losses)


def test_a_step_without_a_labelled_token_is_told_apart(tmp_path, tiny_model, examples):
    from agentft.data.tokens import Example

    bare = [Example(id=e.id, input_ids=e.input_ids, spans=()) for e in examples]
    job, _ = make_job(tmp_path, tiny_model(), bare)
    with pytest.raises(TrainingError, match="step 1: no token of it is labelled"):
        train_model(job)


class _Hungry(torch.nn.Module):
    """An objective that fails as torch's allocator does when a micro-batch is larger than `fits`."""

    def __init__(self, objective, fits: int, from_step: int = 0):
        super().__init__()
        self.inner, self.fits, self.from_step = objective, fits, from_step
        self.largest: list[int] = []

    @property
    def model(self):
        return self.inner.model

    def forward(self, batch):
        loss = self.inner(batch)  # dropout has drawn by now
        if len(batch.ids) > self.fits:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"
            )
        self.largest.append(len(batch.ids))
        return loss


def test_out_of_memory_halves_the_micro_batch_and_equals_the_smaller_one_bit_for_bit(
    tmp_path, tiny_model, examples, caplog
):
    job, losses = make_job(tmp_path / "hungry", tiny_model(), examples, micro=8, accumulation=1)
    hungry = job.engine.objective = _Hungry(job.engine.objective, fits=2)
    outcome = train_model(job)
    assert outcome.counters.per_device_batch_size == 2
    assert max(hungry.largest) == 2
    assert "out of memory with training.per_device_batch_size=8" in caplog.text
    assert "2 from here on, with the same conversations in a step" in caplog.text
    small, expected = make_job(tmp_path / "small", tiny_model(), examples, micro=2, accumulation=4)
    reference = train_model(small)
    assert [(s, x.hex()) for s, x in losses] == [(s, x.hex()) for s, x in expected]
    assert outcome.counters.tokens == reference.counters.tokens
    final = trained_state(small.engine.model)
    for name, tensor in trained_state(job.engine.model).items():
        assert torch.equal(tensor, final[name]), name


def test_a_resumed_run_keeps_the_halved_micro_batch(tmp_path, tiny_model, examples):
    job, losses = make_job(tmp_path / "whole", tiny_model(), examples, micro=4, accumulation=1)
    job.engine.objective = _Hungry(job.engine.objective, fits=2)
    train_model(job)
    first, one = make_job(tmp_path / "cut", tiny_model(), examples, micro=4, accumulation=1)
    stops = iter([False, False, True])
    first.engine.objective = _Hungry(first.engine.objective, fits=2)
    train_model(dataclasses.replace(first, stop_requested=lambda: next(stops)))
    second, two = make_job(tmp_path / "cut", tiny_model(), examples, micro=4, accumulation=1)
    outcome = train_model(second)  # there is room now, and yet the sums must be those of the whole run
    assert outcome.counters.per_device_batch_size == 2
    assert one + two == losses


def test_one_conversation_that_does_not_fit_ends_in_words(tmp_path, tiny_model, examples):
    job, _ = make_job(tmp_path, tiny_model(), examples, micro=4, accumulation=1)
    job.engine.objective = _Hungry(job.engine.objective, fits=0)
    with pytest.raises(TrainingError, match=r"one conversation, or one packed row, at a time.*gradient_checkpointing"):
        train_model(job)


def test_between_processes_the_shortage_is_told_with_what_to_set():
    with pytest.raises(
        TrainingError, match=r"training.per_device_batch_size=2 with twice the training.gradient_accumulation_steps"
    ):
        accumulate_within_memory(lambda size: _allocate(), 4, lambda: None, step=1, alone=False)


def _allocate():
    raise MemoryError


def test_other_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        accumulate_within_memory(lambda size: _fail(), 4, lambda: None, step=1)


def _fail():
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_real_shortage_of_memory_halves_the_micro_batch():
    """The system itself refuses: the child may map only a little more than it has, and a large product needs much more."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("starved.py"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["refused"], "the system refused nothing: the experiment proves nothing"
    assert told["size"] < 16
    assert told["gradient"] == told["expected"]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "this process stays free"
