"""Tiled attention is causal attention: values and gradients, any length, any grouping, nothing from the future."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from agentft.model import attention
from agentft.model.attention import TiledCausalAttention


def _plain(query, key, value, scale):
    share = query.shape[1] // key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), is_causal=True, scale=scale
    )


@pytest.mark.parametrize("length", [2, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("keep", [True, False])
def test_values_and_gradients_equal_plain_attention(length, heads, groups, keep, monkeypatch):
    monkeypatch.setattr(attention, "KEEP_UP_TO", 1024 if keep else 0)
    torch.manual_seed(length)
    tensors = [
        torch.randn(2, count, length, 8, dtype=torch.float64, requires_grad=True) for count in (heads, groups, groups)
    ]
    # Models hand heads over as a transposed view.
    tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    out = TiledCausalAttention.apply(*tensors, 0.3)
    expected = _plain(*tensors, 0.3)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    actual = torch.autograd.grad((out * weight).sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    for left, right in zip(actual, wanted, strict=True):
        # Tiles of key and value gradients add up in fp32.
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_nothing_comes_from_the_future():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 8) for _ in range(3))
    before = TiledCausalAttention.apply(query, key, value, 0.3)
    for tensor in (query, key, value):
        tensor[:, :, 150:] = 99.0
    after = TiledCausalAttention.apply(query, key, value, 0.3)
    assert torch.equal(before[:, :, :150], after[:, :, :150])


def test_a_bf16_model_takes_it_in_training_and_agrees_with_torchs_kernels(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    used = []
    apply = TiledCausalAttention.apply
    monkeypatch.setattr(TiledCausalAttention, "apply", lambda *args: used.append(1) or apply(*args))
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    results = []
    for name in ("sdpa", attention.TILED):
        torch.manual_seed(1)
        model = LlamaForCausalLM._from_config(config, attn_implementation=name, dtype=torch.bfloat16)
        loss = model(input_ids=torch.arange(150)[None] % 64).logits.float().logsumexp(-1).sum()
        loss.backward()
        results.append((loss, model.model.layers[0].self_attn.q_proj.weight.grad.float()))
    assert len(used) == 2
    (plain, plain_gradient), (tiled, tiled_gradient) = results
    torch.testing.assert_close(tiled, plain, rtol=1e-3, atol=0.5)
    assert (tiled_gradient - plain_gradient).abs().max() < 0.05 * plain_gradient.abs().max()


def test_masks_decoding_and_fp32_are_left_to_torch(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    monkeypatch.setattr(TiledCausalAttention, "apply", lambda *_: pytest.fail("not for this"))
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.arange(6)[None]
    wide = LlamaForCausalLM._from_config(config, attn_implementation=attention.TILED)
    wide(input_ids=ids, use_cache=False)
    narrow = LlamaForCausalLM._from_config(config, attn_implementation=attention.TILED, dtype=torch.bfloat16)
    narrow(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), use_cache=False)
    narrow(input_ids=ids[:, :1], use_cache=False)
