"""Compiled blocks compute what eager ones do."""

from __future__ import annotations

import shutil

import pytest
import torch

from agentft.data.batches import collate, collate_packed
from agentft.model.adapters import prepare_for_training
from agentft.model.config import LoraConfig, ModelConfig
from agentft.model.labelled_loss import LabelledLoss
from agentft.recipes.components import compile_blocks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager_within_a_thousandth(tiny_model, examples):
    """fp32; sums are taken in another order, so not to the last bit. A padded row, and a packed one of another length."""
    results = []
    sft = LoraConfig(name="lora", default_learning_rate=1e-3, rank=4, dropout=0.0)
    for compiled in (False, True):
        torch.manual_seed(1)
        model = prepare_for_training(tiny_model(layers=1), sft, ModelConfig(name="tiny")).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        if compiled:
            assert compile_blocks(model) == 1
        objective = LabelledLoss(model)
        batches = [collate(examples[:1], 0), collate_packed(examples[1:3])]
        losses = [objective(batch) for batch in batches]
        sum(losses).backward()
        results.append(
            (torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        )
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-3)
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 1e-3 * gradient.norm(), name
