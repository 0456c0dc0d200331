"""The loss of each kind of token is what the model's own probabilities say, whatever the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agentft.data.render import SpanKind
from agentft.data.tokens import Example
from agentft.errors import DataError
from agentft.evaluation.likelihood import KINDS, measure_likelihood
from tests.examples import tokenize


@pytest.fixture(scope="module")
def examples(golden_conversations, template, encoder):
    return list(tokenize(golden_conversations.values(), template, encoder))


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


def test_each_kind_is_the_mean_of_its_own_tokens(model, examples):
    model.train()
    found = measure_likelihood(model, examples, batch=4, pad_id=0)
    assert model.training, "the mode is put back"
    nats: dict[SpanKind, list[float]] = {kind: [] for kind in KINDS}
    model.eval()
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        for span in example.spans:
            nats[span.kind] += [-float(logs[at - 1, ids[0, at]]) for at in range(span.start, span.stop)]
    losses = found.losses()
    assert set(losses) == {"loss", "loss_text", "loss_call", "loss_call_syntax", "loss_stop"}
    for kind, values in ((kind, values) for kind, values in nats.items() if values):
        assert losses[f"loss_{kind.name}"] == pytest.approx(np.mean(values), rel=1e-5)
    assert losses["loss"] == pytest.approx(np.mean([each for values in nats.values() for each in values]), rel=1e-5)


def test_the_total_is_the_loss_of_training(model, examples):
    from agentft.data.batches import collate
    from agentft.model.labelled_loss import LabelledLoss

    objective = LabelledLoss(model.eval())
    with torch.no_grad():
        batches = [collate([example], 0) for example in examples]
        expected = sum(float(objective(batch)) for batch in batches) / sum(batch.targets for batch in batches)
    assert measure_likelihood(model, examples, batch=3, pad_id=0).loss == pytest.approx(expected, rel=1e-6)


def test_the_batch_changes_nothing_and_conversations_keep_their_order(model, examples):
    one, many = (measure_likelihood(model, examples, batch=size, pad_id=0) for size in (1, 7))
    assert one.ids == many.ids == tuple(example.id for example in examples)
    np.testing.assert_allclose(one.nats_GK, many.nats_GK, rtol=1e-5)
    assert (one.tokens_GK == many.tokens_GK).all()
    assert one.tokens_GK.sum() == sum(example.trained_tokens for example in examples)


def test_random_streams_are_left_alone(model, examples):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure_likelihood(model, examples[:3], batch=2, pad_id=0)
    assert torch.rand(3).equal(expected)


def test_the_report_gives_perplexities_with_intervals_by_conversation(model, examples):
    report = measure_likelihood(model, examples, batch=4, pad_id=0).to_json(bootstrap_samples=200, seed=1)
    loss, perplexity = report["metrics"]["loss_call"], report["metrics"]["perplexity_call"]
    assert perplexity["value"] == pytest.approx(math.exp(loss["value"]))
    assert loss["low"] < loss["value"] < loss["high"]
    assert math.log(perplexity["high"]) == pytest.approx(loss["high"])
    assert "|likelihood|" in report["signature"]


def test_a_kind_that_does_not_occur_is_null_and_nothing_at_all_is_refused(model, examples):
    spans = tuple(span for span in examples[0].spans if span.kind is SpanKind.stop)
    only_stops = Example("x", examples[0].input_ids, spans)
    found = measure_likelihood(model, [only_stops], batch=1, pad_id=0)
    assert "loss_call" not in found.losses()
    assert found.to_json(bootstrap_samples=20, seed=0)["metrics"]["perplexity_call"]["value"] is None
    with pytest.raises(DataError, match="no labelled token"):
        measure_likelihood(model, [Example("x", examples[0].input_ids, ())], batch=1, pad_id=0)


def test_pieces_of_one_conversation_are_drawn_together(model, examples):
    found = measure_likelihood(model, examples, batch=4, pad_id=0)
    piece_of = {example.id: f"whole {at // 2}" for at, example in enumerate(examples)}
    apart, joined = (
        found.to_json(bootstrap_samples=100, seed=1, piece_of=of)["metrics"]["loss"] for of in (None, piece_of)
    )
    assert (joined["value"], joined["numerator"]) == pytest.approx((apart["value"], apart["numerator"]))
    assert apart["conversations"] == len(examples)
    assert joined["conversations"] == math.ceil(len(examples) / 2)
