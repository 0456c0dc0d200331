"""The leaner layers compute what the stock layers compute: values, gradients, and dropout that is fair and seeded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agentft.model.adapters import prepare_for_training
from agentft.model.config import LoraConfig, ModelConfig
from agentft.model.fused import (
    GatedSiluFunction,
    LoraLinearFunction,
    RmsNormFunction,
    fuse_layers,
    is_gated_mlp,
    is_rms_norm,
    random_bytes,
)


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_lora_linear_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, a, b = _leaf(2, 5, 6), _leaf(3, 6), _leaf(4, 3)
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    out = LoraLinearFunction.apply(x, weight, bias, a, b, 0.5, 0.0).view(2, 5, 4)
    out += 0.0  # Llama 4 changes what a layer returned in place
    expected = x @ weight.t() + bias + 0.5 * (x @ a.t() @ b.t())
    torch.testing.assert_close(out, expected)
    target = torch.randn_like(out)
    actual = torch.autograd.grad((out * target).sum(), (x, a, b))
    wanted = torch.autograd.grad((expected * target).sum(), (x, a, b))
    for left, right in zip(actual, wanted, strict=True):
        # The adapter's gradients come back in fp32, the dtype of its master weights.
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


def test_lora_dropout_uses_one_mask_forward_and_backward():
    torch.manual_seed(1)
    x, a, b = torch.ones(64, 32, requires_grad=True), torch.randn(4, 32), torch.randn(8, 4)
    a.requires_grad_(True)
    b.requires_grad_(True)
    weight = torch.zeros(8, 32)
    p = 0.25  # a multiple of 1/256, as masks are drawn
    out = LoraLinearFunction.apply(x, weight, None, a, b, 1.0, p)
    out.sum().backward()
    # With x all ones the gradient of x shows the mask; the same mask must explain the output.
    column = b.detach().sum(0) @ a.detach() / (1 - p)
    mask = x.grad / column
    torch.testing.assert_close(mask, mask.round(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        out.detach(), mask.round() @ a.detach().t() @ b.detach().t() / (1 - p), rtol=1e-4, atol=1e-4
    )
    assert 0.2 < (mask.round() == 0).float().mean() < 0.3


def test_rms_norm_and_gated_silu_have_the_gradients_of_their_formulae():
    torch.manual_seed(2)
    x, weight = _leaf(3, 7, 16), torch.randn(16, dtype=torch.float64)
    out = RmsNormFunction.apply(x, weight, 1e-5)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    (left,) = torch.autograd.grad(out.pow(2).sum(), x)
    (right,) = torch.autograd.grad(expected.pow(2).sum(), x)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    gate, up = _leaf(4, 9), _leaf(4, 9)
    out, expected = GatedSiluFunction.apply(gate, up), nn.functional.silu(gate) * up
    torch.testing.assert_close(out, expected)
    for left, right in zip(
        torch.autograd.grad(out.pow(2).sum(), (gate, up)),
        torch.autograd.grad(expected.pow(2).sum(), (gate, up)),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Olmo2", "Granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_equals_the_stock_one(family, dtype):
    import transformers
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    def make(fuse: bool):
        torch.manual_seed(4)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            use_cache=False,
            pad_token_id=None,
        )
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
        model = get_peft_model(
            model, PeftLoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "o_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        if fuse:
            assert fuse_layers(model, adapted=True) > 6
        return model.train()

    ids = torch.arange(40).view(2, 20) % 64
    results = []
    for fuse in (False, True):
        model = make(fuse)
        logits = model(input_ids=ids).logits
        logits.float().pow(2).mean().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain, plain_gradients), (fused, fused_gradients) = results
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(fused, plain, **tolerance)
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max().item()
        close = 1e-4 if dtype == torch.float32 else 0.08
        assert (fused_gradients[name] - gradient).abs().max().item() <= close * scale + 1e-9, name


def test_layers_are_known_by_what_they_compute():
    import transformers
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.mixtral import modeling_mixtral
    from transformers.models.smollm3 import modeling_smollm3

    numbers = {"hidden_size": 8, "intermediate_size": 16, "head_dim": 4, "num_attention_heads": 2}
    gemma, smol = transformers.Gemma2Config(**numbers), transformers.SmolLM3Config(**numbers)
    with torch.device("meta"):  # weights are not looked at
        norms = [
            modeling_mixtral.MixtralRMSNorm(8),
            modeling_gemma2.Gemma2RMSNorm(8),
            torch.nn.LayerNorm(8, bias=False),
        ]
        mlps = [modeling_smollm3.SmolLM3MLP(smol), modeling_gemma2.Gemma2MLP(gemma)]  # Gemma's activation is GELU
    assert [is_rms_norm(layer) for layer in norms] == [True, False, False]
    assert [is_gated_mlp(layer) for layer in mlps] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_follows_from_the_seed_and_gradient_checkpointing_changes_no_bit(tiny_model, dtype):
    sft = LoraConfig(name="lora", default_learning_rate=1e-3, rank=4, dropout=0.3)

    def results(seed: int, again: bool = False) -> list[torch.Tensor]:
        model = prepare_for_training(tiny_model().to(dtype), sft, ModelConfig(name="tiny")).train()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(seed)
        loss = model(input_ids=torch.arange(40).view(2, 20)).logits.float().square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    first, same, other, saving = results(1), results(1), results(2), results(1, again=True)
    assert all(map(torch.equal, first, same))
    assert first[0] != other[0]
    assert all(map(torch.equal, first, saving))


def test_random_bytes_are_uniform_seeded_and_of_any_count():
    torch.manual_seed(9)
    first = random_bytes(100_003, torch.device("cpu"))
    torch.manual_seed(9)
    assert torch.equal(first, random_bytes(100_003, torch.device("cpu")))
    counts = torch.bincount(first.long(), minlength=256)
    assert counts.min() > 300
    assert counts.max() < 480


def test_prepared_models_are_fused_and_frozen_below_the_adapter():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = prepare_for_training(
        LlamaForCausalLM(config), LoraConfig(name="lora", default_learning_rate=1e-3), ModelConfig(name="x")
    )
    names = [type(n).__name__ for n in _functions(model(input_ids=torch.arange(6)[None]).logits.grad_fn)]
    assert "LoraLinearFunctionBackward" in names
    assert "GatedSiluFunctionBackward" in names


def _functions(node, seen=None):
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return seen
    seen.add(node)
    for child, _ in node.next_functions:
        _functions(child, seen)
    return seen
