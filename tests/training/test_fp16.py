"""Under fp16 the loss is scaled: small gradients survive, and a step that overflows leaves the weights and lowers the scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from agentft.model.labelled_loss import LabelledLoss
from agentft.training.config import TrainingConfig
from agentft.training.engine import SingleEngine


@pytest.fixture
def engine():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    layer.config = LlamaConfig()  # asked for the loss of routers, which it has not
    objective = LabelledLoss(layer)
    return SingleEngine(objective, TrainingConfig(learning_rate=0.1, warmup=0.0), fp16=True)


def _backward(engine, size: float) -> None:
    hidden = engine.model(torch.ones(2, 4)).half()
    engine.backward((hidden.float() * size).sum())


def test_gradients_below_fp16_come_through_and_are_clipped_unscaled(engine):
    _backward(engine, 1e-7)  # as a number of fp16 it has one bit
    norm = engine.clip(1.0)
    torch.testing.assert_close(norm.item(), 4 * 2e-7, rtol=0.02, atol=0.0)
    before = engine.model.weight.detach().clone()
    engine.step()
    assert (engine.model.weight - before).abs().max() > 0.05, "AdamW's first step is the learning rate"


def test_a_step_that_overflows_is_left_out_and_lowers_the_scale(engine):
    scale = engine.settings()["scaler"]["scale"]
    before = engine.model.weight.detach().clone()
    _backward(engine, 60000.0)
    assert not torch.isfinite(engine.clip(1.0))
    engine.step()
    assert torch.equal(engine.model.weight, before)
    assert engine.settings()["scaler"]["scale"] == scale / 2
    _backward(engine, 1.0)
    engine.clip(1.0)
    engine.step()
    assert not torch.equal(engine.model.weight, before)
