"""Packed rows are the same mathematics: equal losses and gradients, and nobody sees a neighbour's conversation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentft.data.batches import collate, collate_packed, pack_rows, step_groups
from agentft.data.render import SpanKind
from agentft.data.tokens import IGNORE_INDEX, Span
from agentft.errors import ConfigError
from agentft.model import attention
from agentft.model.labelled_loss import LabelledLoss, packed_arguments
from agentft.training.config import TrainingConfig
from agentft.training.loop import choose_row_tokens


def _model(family: str = "Llama", *, tied: bool = True, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **more):
    import transformers

    attention.register()
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=tied, **more,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=attn, dtype=dtype)


def _gradients(model, batches):
    model.zero_grad()
    loss = sum(LabelledLoss(model)(batch) for batch in batches)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow), attention.TILED])
@pytest.mark.parametrize(("family", "tied"), [("Llama", True), ("Llama", False), ("Qwen2", True), ("Qwen3", False)])
def test_packed_loss_and_gradients_equal_unpacked(examples, family, tied, attn):
    model = _model(family, tied=tied, attn=attn)
    plain, expected = _gradients(model, [collate([example], 0) for example in examples[:4]])
    packed, actual = _gradients(model, [collate_packed(examples[:4])])
    torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("attn", "dtype"),
    [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16), (attention.TILED, torch.bfloat16)],
)
@pytest.mark.parametrize("cache", [True, False], ids=["config asks for a cache", "no cache"])
def test_no_token_sees_its_neighbours_conversation(examples, attn, dtype, cache):
    """Every token of one conversation is changed: the hidden states of the others stay as they were, to the last bit."""
    model = _model(attn=attn, dtype=dtype, use_cache=cache).eval()
    row = examples[:3]
    middle = dataclasses.replace(row[1], input_ids=(row[1].input_ids + 5) % 300)
    first, second = collate_packed(row), collate_packed([row[0], middle, row[2]])
    before, after = (
        model.model(input_ids=b.input_ids_BT, use_cache=False, **packed_arguments(b)).last_hidden_state
        for b in (first, second)
    )
    start, stop = first.boundaries[1:3].tolist()
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, stop:], after[:, stop:])
    assert not torch.equal(before[:, start:stop], after[:, start:stop])


def test_the_objective_packs_rightly_even_where_the_config_asks_for_a_cache(examples):
    """With a cache transformers lets packed conversations see each other; the objective never makes one."""
    model = _model(use_cache=True)
    batch = collate_packed(examples[:3])
    apart = sum(LabelledLoss(model)(collate([example], 0)) for example in examples[:3])
    torch.testing.assert_close(LabelledLoss(model)(batch), apart, rtol=1e-6, atol=1e-5)
    leaking = model.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=True)
    kept = model.model(input_ids=batch.input_ids_BT, use_cache=False, **packed_arguments(batch))
    assert (leaking.last_hidden_state - kept.last_hidden_state).abs().max() > 0.01, (
        "the trap is gone: say so in loss.py"
    )


def test_tiles_of_packed_rows_equal_attention_of_each_conversation():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 400, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    bounds = [0, 150, 151, 400]
    out = attention.TiledCausalAttention.apply(query, key, value, 0.3, bounds)
    apart = torch.cat(
        [
            attention.TiledCausalAttention.apply(*(x[:, :, a:b] for x in (query, key, value)), 0.3)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ],
        dim=2,
    )
    torch.testing.assert_close(out, apart)
    weight = torch.randn_like(out)
    actual = torch.autograd.grad((out * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad((apart * weight).sum(), (query, key, value))
    for left, right in zip(actual, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=60))
def test_rows_hold_every_example_once_and_are_full(lengths):
    rows = pack_rows(range(len(lengths)), lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= 100
    if len(sums) > 1:
        assert sums[0] + sums[1] > 100, "two rows would fit into one"
    assert len(rows) <= math.ceil(11 / 9 * math.ceil(sum(lengths) / 100) * 2) + 4


def test_nothing_predicts_the_first_token_of_a_conversation(examples):
    whole = dataclasses.replace(
        examples[0], spans=(Span(0, len(examples[0]), SpanKind.text),), span_weights=(2.0,), id="all of it trained"
    )
    batch = collate_packed([examples[1], whole])
    start = int(batch.boundaries[1])
    assert batch.labels_BT[0, start] == IGNORE_INDEX
    assert batch.weights_BT[0, start] == 0.0
    apart = [collate([example], 0) for example in (examples[1], whole)]
    assert batch.targets == sum(b.targets for b in apart)
    assert batch.weight == pytest.approx(sum(b.weight for b in apart))
    model = _model()
    torch.testing.assert_close(
        LabelledLoss(model)(batch), sum(LabelledLoss(model)(b) for b in apart), rtol=1e-6, atol=1e-5
    )


def test_a_packed_step_has_the_examples_of_the_padded_one_and_no_padding(examples):
    indices = list(range(len(examples)))
    lengths = {i: len(examples[i]) for i in indices}
    padded, packed = (
        step_groups(indices, lengths, per_device_batch_size=4, row_tokens=row_tokens) for row_tokens in (None, 2048)
    )
    assert sorted(i for group in packed for i in group) == sorted(i for group in padded for i in group) == indices
    rows = [collate_packed([examples[i] for i in group]) for group in packed]
    pads = [collate([examples[i] for i in group], 0) for group in padded]
    assert sum(b.targets for b in rows) == sum(b.targets for b in pads)
    assert sum(b.positions for b in rows) == sum(b.tokens for b in rows) < sum(b.positions for b in pads)


def test_auto_packs_on_cuda_only(caplog):
    caplog.set_level("INFO")
    asked = {
        name: TrainingConfig(learning_rate=1.0, packing=name, per_device_batch_size=2)
        for name in ("auto", "true", "false")
    }
    assert choose_row_tokens(asked["auto"], 100, None, cuda=True) == 200
    assert choose_row_tokens(asked["auto"], 100, None, cuda=False) is None
    assert "training.packing=auto: packed rows" in caplog.text
    assert choose_row_tokens(asked["true"], 100, None, cuda=False) == 200
    assert choose_row_tokens(asked["false"], 100, None, cuda=True) is None
    assert choose_row_tokens(asked["auto"], 100, "a packed neighbour moves logits", cuda=True) is None
    with pytest.raises(ConfigError, match="training.packing=true: a packed neighbour moves logits; .*packing=false"):
        choose_row_tokens(asked["true"], 100, "a packed neighbour moves logits", cuda=True)
    with pytest.raises(ConfigError, match="packing=maybe: expected one of auto, true, false"):
        TrainingConfig(learning_rate=1.0, packing="maybe")
