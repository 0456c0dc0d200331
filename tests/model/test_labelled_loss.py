"""The labelled-only loss is the plain loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from agentft.data.batches import collate, empty_batch
from agentft.data.tokens import IGNORE_INDEX
from agentft.model import labelled_loss as loss_module
from agentft.model.labelled_loss import FrozenHeadLoss, LabelledLoss, chunked_cross_entropy


def _plain_loss(model, batch, lengths) -> torch.Tensor:
    """The textbook loss: all logits, and a mask that hides padding."""
    mask = (torch.arange(batch.input_ids_BT.shape[1])[None] < lengths[:, None]).long()
    logits = model(input_ids=batch.input_ids_BT, attention_mask=mask).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        batch.labels_BT[:, 1:].reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_loss_and_gradients_equal_the_plain_ones(tiny_model, examples, monkeypatch, tied, rows, chunk):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    batch = collate(examples[:rows], pad_id=0)
    plain, labelled = tiny_model(tied=tied), tiny_model(tied=tied)
    expected = _plain_loss(plain, batch, torch.tensor([len(example) for example in examples[:rows]]))
    expected.backward()
    actual = LabelledLoss(labelled)(batch)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)
    for (name, left), right in zip(plain.named_parameters(), labelled.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families_have_the_plain_loss_and_gradients_too(examples, family, tied):
    import transformers

    def make():
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=tied, use_cache=False,
        )  # fmt: skip
        return getattr(transformers, f"{family}ForCausalLM")(config)

    batch = collate(examples[:2], pad_id=0)
    plain, labelled = make(), make()
    expected = _plain_loss(plain, batch, torch.tensor([len(example) for example in examples[:2]]))
    expected.backward()
    actual = LabelledLoss(labelled)(batch)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)
    for (name, left), right in zip(plain.named_parameters(), labelled.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_logits_of_context_are_never_computed(tiny_model, examples):
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    batch = collate(examples[:2], pad_id=0)
    LabelledLoss(model)(batch)
    assert seen == [batch.targets]
    assert batch.targets < batch.tokens / 2


def test_padding_changes_no_loss(tiny_model, examples):
    model = tiny_model().eval()
    objective = LabelledLoss(model)
    together = objective(collate(examples[:4], pad_id=0))
    apart = sum(objective(collate([example], pad_id=0)) for example in examples[:4])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-5)


def test_the_stop_token_is_trained_though_it_is_also_the_pad_token(examples, byte_tokenizer):
    """A collator that masks every pad id would unteach stopping where pad and stop are one token."""
    stop = byte_tokenizer.eos_token_id
    batch = collate(examples[:3], pad_id=stop)
    labelled_stops = int((batch.labels_BT == stop).sum())
    assert labelled_stops == sum(len(example.steps()) for example in examples[:3])


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_batch_has_no_loss_and_no_gradient_but_takes_part(tiny_model, tied):
    """A rank without a micro-batch runs one, since the others exchange weights in every pass."""
    model = tiny_model(tied=tied)
    loss = LabelledLoss(model)(empty_batch(pad_id=0))
    loss.backward()
    assert float(loss) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_knows_which_positions_predict_a_label(examples, pack):
    from agentft.data.batches import collate_packed

    batch = collate_packed(examples[:4]) if pack else collate(examples[:4], pad_id=0)
    assert torch.equal(batch.predicting_N, loss_module.predicting_positions(batch.labels_BT))
    assert len(batch.predicting_N) == batch.targets
    targets = batch.labels_BT.flatten()[batch.predicting_N + 1]
    assert torch.equal(targets, batch.labels_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORE_INDEX])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [0, 3, 20])
def test_the_loss_that_makes_its_gradient_at_once_equals_the_plain_one(monkeypatch, count, weighted, dtype):
    """As behind a frozen head."""
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    torch.manual_seed(3)
    head = nn.Linear(16, 50, bias=False).to(dtype).requires_grad_(False)
    hidden, targets = torch.randn(count, 16).to(dtype), torch.randint(0, 50, (count,))
    weights = torch.rand(count) if weighted else None
    left, right = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = chunked_cross_entropy(left, targets, head, weights, at_once=True)
    wanted = functional.cross_entropy(functional.linear(right, head.weight.double()), targets, reduction="none")
    wanted = (wanted * (1.0 if weights is None else weights.double())).sum()
    (loss / 7).backward()
    (wanted / 7).backward()
    close = 1e-6 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(loss.double(), wanted, rtol=close, atol=close)
    assert left.grad.dtype is dtype
    assert (left.grad.double() - right.grad).norm() <= 5 * close * right.grad.norm()


def test_a_head_that_is_trained_or_has_a_bias_takes_the_plain_way(monkeypatch):
    monkeypatch.setattr(FrozenHeadLoss, "apply", lambda *_: pytest.fail("not for this"))
    hidden, targets = torch.randn(3, 4).bfloat16(), torch.tensor([1, 2, 3])
    for head in (nn.Linear(4, 6, bias=False).bfloat16(), nn.Linear(4, 6).bfloat16().requires_grad_(False)):
        assert chunked_cross_entropy(hidden, targets, head, at_once=True) > 0
