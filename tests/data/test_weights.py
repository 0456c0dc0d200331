"""Weights of spans: a plain weighted loss, normalised over the whole step; without weights nothing changes, to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from agentft.data.batches import collate
from agentft.data.config import SpanWeights
from agentft.data.render import SpanKind
from agentft.data.tokens import IGNORE_INDEX, weigh
from agentft.errors import ConfigError
from agentft.model import labelled_loss as loss_module
from agentft.model.config import RandomShape
from agentft.model.labelled_loss import LabelledLoss
from tests.examples import tokenize

WEIGHTS = SpanWeights(text=1.0, call=2.0, call_syntax=1.5, stop=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    from agentft.model.sources import random_folder

    folder = tmp_path_factory.mktemp("tiny")
    random_folder(RandomShape(), 2048, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def examples(golden_conversations, template, encoder):
    names = ("text_before_the_call", "no_tool_needed", "chinese", "several_rounds")
    return list(tokenize([golden_conversations[name] for name in names], template, encoder))


def test_every_kind_gets_its_weight_and_context_none(examples):
    for example in examples:
        weighed = weigh(example, WEIGHTS)
        expected = {SpanKind.text: 1.0, SpanKind.call: 2.0, SpanKind.call_syntax: 1.5, SpanKind.stop: 0.5}
        assert weighed.span_weights == tuple(expected[span.kind] for span in example.spans)
        assert ((weighed.loss_weights > 0) == (example.labels != IGNORE_INDEX)).all()


def test_weights_of_one_leave_examples_and_batches_as_they_are(examples):
    assert all(weigh(example, SpanWeights()) is example for example in examples)
    batch = collate(examples, 0)
    assert batch.weights_BT is None
    assert batch.weight == batch.targets


def test_loss_is_the_plain_weighted_loss(model, examples):
    batch = collate([weigh(example, WEIGHTS) for example in examples], 0)
    logits = model(input_ids=batch.input_ids_BT).logits[:, :-1].float()
    each = functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT[:, 1:].flatten(), reduction="none")
    plain = (each * batch.weights_BT[:, 1:].flatten()).sum()
    torch.testing.assert_close(LabelledLoss(model)(batch), plain, rtol=1e-5, atol=1e-3)
    assert batch.weight == pytest.approx(float(batch.weights_BT[:, 1:].sum()))


def test_a_weight_of_one_spelt_out_gives_the_same_bits(model, examples):
    spelt = [dataclasses.replace(example, span_weights=(1.0,) * len(example.spans)) for example in examples]
    with torch.no_grad():
        plain, weighted = LabelledLoss(model)(collate(examples, 0)), LabelledLoss(model)(collate(spelt, 0))
    torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=0)
    assert collate(spelt, 0).weight == collate(examples, 0).targets


def test_chunks_and_micro_batches_change_nothing(model, examples, monkeypatch):
    weighed = [weigh(example, WEIGHTS) for example in examples]
    whole = collate(weighed, 0)
    parts = [collate([example], 0) for example in weighed]
    assert sum(part.weight for part in parts) == pytest.approx(whole.weight)
    objective = LabelledLoss(model)
    expected = objective(whole)
    torch.testing.assert_close(sum(objective(part) for part in parts), expected, rtol=1e-5, atol=1e-3)
    monkeypatch.setattr(loss_module, "CHUNK", 50)
    torch.testing.assert_close(objective(whole), expected, rtol=1e-5, atol=1e-3)


def test_one_step_of_the_loop_is_normalised_by_the_sum_of_weights(model, examples):
    """The gradient of a step in four micro-batches is that of one weighted mean over all its labels."""
    weighed = [weigh(example, WEIGHTS) for example in examples]
    objective = LabelledLoss(model)

    def gradient(batches):
        model.zero_grad()
        weight = sum(batch.weight for batch in batches)
        for batch in batches:
            (objective(batch) / weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one = gradient([collate(weighed, 0)])
    torch.testing.assert_close(gradient([collate([example], 0) for example in weighed]), one, rtol=1e-4, atol=1e-6)


def test_the_held_out_loss_and_unweighted_examples_weigh_all_alike(examples):
    mixed = collate([weigh(examples[0], WEIGHTS), examples[1]], 0)
    assert mixed.weights_BT is not None
    labelled = mixed.labels_BT[1] != IGNORE_INDEX
    assert (mixed.weights_BT[1][labelled] == 1).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_positive(value):
    with pytest.raises(ConfigError, match="above 0"):
        SpanWeights(call=value)


def test_prepared_data_weighs_training_examples_only(tmp_path, golden_folder, template, encoder):
    from agentft.data.config import LocalConfig
    from agentft.data.prepare import prepare_data

    path = str(golden_folder / "conversations.jsonl")
    config = LocalConfig(name="local", path=path, test_ratio=0.3)
    plain = prepare_data(config, template, encoder)
    weighed = prepare_data(dataclasses.replace(config, span_weights=WEIGHTS), template, encoder)
    assert all(example.span_weights is not None for example in weighed.train)
    assert all(example.span_weights is None for example in weighed.heldout_examples)
    assert plain.fingerprint != weighed.fingerprint
