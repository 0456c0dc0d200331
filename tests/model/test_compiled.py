"""A model with compiled parts is the stock model: same values and gradients within bf16, packed or not, cached or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from agentft.data.batches import collate, collate_packed
from agentft.data.tokens import tokenize
from agentft.errors import ModelError
from agentft.model import labelled_loss as loss_module
from agentft.model.adapters import prepare_for_training
from agentft.model.config import FullConfig, KernelChoice, LoraConfig, ModelConfig
from agentft.model.cpu import attention, fused
from agentft.model.cpu.fused import CompiledAttention
from agentft.model.cpu.native import load_kernels
from agentft.model.labelled_loss import FrozenHeadLoss, LabelledLoss, chunked_cross_entropy, packed_arguments
from agentft.model.load import choose_kernels
from agentft.runtime import Device

LORA = LoraConfig(name="lora", default_learning_rate=1e-3, rank=4, dropout=0.0)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    built = load_kernels(str(tmp_path_factory.mktemp("cache")))
    if built is None:
        pytest.skip("no C compiler here: the compiled functions are not used either")
    return built


@pytest.fixture(scope="module")
def examples(golden_conversations, template, encoder):
    return list(tokenize(golden_conversations.values(), template, encoder))


def _model(family: str, kernels, dtype: torch.dtype = torch.bfloat16, sft: LoraConfig = LORA):
    import transformers

    attention.register()
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, attn_implementation=attention.NAME, dtype=dtype
    )
    model = prepare_for_training(model, sft, ModelConfig(name="tiny"), kernels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def _results(model, batches, kernels=None):
    objective = LabelledLoss(model, kernels=kernels)
    model.zero_grad()
    loss = sum(objective(batch) for batch in batches)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_as_near_to_fp32_as_torchs_own(kernels, examples, family, pack):
    """The reference is the same model in fp32; the compiled bf16 model may err at most a quarter more than torch's bf16."""
    rows = examples[:3]
    exact, truth = _results(_model(family, None, torch.float32), [collate([e], 0) for e in rows])
    batches = [collate_packed(rows)] if pack else [collate([e], 0) for e in rows]
    stock, plain = _results(_model(family, None), batches)
    ours, fast = _results(_model(family, kernels), batches, kernels)
    assert abs(ours - exact) <= 1.25 * abs(stock - exact) + 2e-3 * exact
    far = {n: ((fast[n] - g).norm() / g.norm(), (plain[n] - g).norm() / g.norm()) for n, g in truth.items()}
    mean_ours, mean_stock = (sum(pair[k] for pair in far.values()) / len(far) for k in (0, 1))
    assert mean_ours <= 1.25 * mean_stock
    assert max(pair[0] for pair in far.values()) < 0.1


def test_a_trained_model_takes_every_compiled_part(kernels, examples, monkeypatch):
    used = []
    for name in ("CompiledRmsNorm", "CompiledGatedMlp"):
        function = getattr(fused, name)
        monkeypatch.setattr(function, "apply", lambda *a, f=function.apply, n=name: used.append(n) or f(*a))
    monkeypatch.setattr(
        CompiledAttention, "apply", lambda *a, f=CompiledAttention.apply: used.append("attention") or f(*a)
    )
    monkeypatch.setattr(FrozenHeadLoss, "apply", lambda *a, f=FrozenHeadLoss.apply: used.append("head") or f(*a))
    _results(_model("Llama", kernels), [collate(examples[:1], 0)], kernels)
    assert {name: used.count(name) for name in set(used)} == {
        "CompiledRmsNorm": 5,
        "CompiledGatedMlp": 2,
        "attention": 2,
        "head": 1,
    }


def test_no_token_of_a_packed_row_sees_its_neighbours(kernels, examples):
    model = _model("Llama", kernels).eval()
    row = collate_packed(examples[:3])
    start, stop = row.boundaries[1:3].tolist()
    before = model.base_model.model.model(input_ids=row.input_ids_BT, use_cache=False, **packed_arguments(row))[0]
    row.input_ids_BT[:, start:stop] = (row.input_ids_BT[:, start:stop] + 7) % 300
    after = model.base_model.model.model(input_ids=row.input_ids_BT, use_cache=False, **packed_arguments(row))[0]
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, stop:], after[:, stop:])
    assert not torch.equal(before[:, start:stop], after[:, start:stop])


@pytest.mark.parametrize("length", [2, 128, 300])
@pytest.mark.parametrize("keep", [True, False], ids=["weights kept", "weights computed again"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_attention_equals_torchs(kernels, length, keep, packed, monkeypatch):
    monkeypatch.setattr(fused, "KEEP_UP_TO", 1024 if keep else 0)
    torch.manual_seed(length)
    query, key, value = (torch.randn(2, length, 2, *heads, 16).bfloat16() for heads in ((3,), (), ()))
    turn = torch.rand(1, length, 8) * 6
    cos, sin = (torch.cat([f(turn)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    bounds = [0, length // 2, length] if packed else None
    document = torch.arange(length) >= (length // 2 if packed else length)

    def wanted(q, k, v):
        def rotated(x):
            half = torch.cat([-x[..., 8:], x[..., :8]], -1)
            shape = (1, length) + (1,) * (x.ndim - 3) + (16,)
            return x * cos.double().view(shape) + half * sin.double().view(shape)

        heads = rotated(q).flatten(2, 3).transpose(1, 2)
        keys = rotated(k).transpose(1, 2).repeat_interleave(3, 1)
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (document[:, None] == document[None])
        values = v.transpose(1, 2).repeat_interleave(3, 1)
        out = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=0.25)
        return out.transpose(1, 2).reshape(q.shape)

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    out = CompiledAttention.apply(*leaves, cos, sin, 0.25, bounds, kernels)
    expected = wanted(*wide)
    assert (out.double() - expected).abs().max() < 0.03
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for left, right in zip(leaves, wide, strict=True):
        assert (left.grad.double() - right.grad).norm() <= 0.01 * right.grad.norm()


@pytest.mark.parametrize("count", [0, 3, 256, 600])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_behind_a_frozen_head_equals_the_plain_one(kernels, count, weighted):
    torch.manual_seed(count)
    head = nn.Linear(16, 50, bias=False).bfloat16().requires_grad_(False)
    hidden, targets = torch.randn(count, 16).bfloat16(), torch.randint(0, 50, (count,))
    weights = torch.rand(count) if weighted else None
    left, right = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = chunked_cross_entropy(left, targets, head, weights, kernels)
    wanted = functional.cross_entropy(functional.linear(right, head.weight.double()), targets, reduction="none")
    wanted = (wanted * (1.0 if weights is None else weights.double())).sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-3, atol=1e-6)
    (loss / 7).backward()
    (wanted / 7).backward()
    assert (left.grad.double() - right.grad).norm() <= 0.01 * right.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_that_makes_its_gradient_at_once_equals_the_plain_one(monkeypatch, weighted, dtype):
    """As on CUDA, where no C code serves."""
    monkeypatch.setattr(loss_module, "CHUNK", 7)
    torch.manual_seed(3)
    head = nn.Linear(16, 50, bias=False).to(dtype).requires_grad_(False)
    hidden, targets = torch.randn(20, 16).to(dtype), torch.randint(0, 50, (20,))
    weights = torch.rand(20) if weighted else None
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


def test_a_head_that_is_trained_or_has_a_bias_takes_the_plain_way(kernels, monkeypatch):
    monkeypatch.setattr(FrozenHeadLoss, "apply", lambda *_: pytest.fail("not for this"))
    hidden, targets = torch.randn(3, 4).bfloat16(), torch.tensor([1, 2, 3])
    for head in (nn.Linear(4, 6, bias=False).bfloat16(), nn.Linear(4, 6).bfloat16().requires_grad_(False)):
        assert chunked_cross_entropy(hidden, targets, head, None, kernels) > 0
        assert chunked_cross_entropy(hidden, targets, head, None, at_once=True) > 0


def test_dropout_is_seeded_and_alike_forward_and_backward(kernels, examples):
    batch = [collate(examples[:1], 0)]
    with_dropout = LoraConfig(name="lora", default_learning_rate=1e-3, rank=4, dropout=0.3)
    results = []
    for seed in (1, 1, 2):
        model = _model("Llama", kernels, sft=with_dropout)
        torch.manual_seed(seed)
        results.append(_results(model, batch, kernels))
    (first, gradients), (again, same), (other, _) = results
    assert first == again != other
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_gradient_checkpointing_changes_no_bit(kernels, examples):
    batch = [collate(examples[:1], 0)]
    with_dropout = LoraConfig(name="lora", default_learning_rate=1e-3, rank=4, dropout=0.3)
    results = []
    for again in (False, True):
        model = _model("Llama", kernels, sft=with_dropout)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        results.append(_results(model, batch, kernels))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_who_computes_is_chosen_by_what_is_there(monkeypatch, tmp_path, kernels, caplog):
    caplog.set_level("INFO")
    cpu, gpu = Device("cpu", "a CPU", 1), Device("cuda", "a GPU", 1)
    auto = ModelConfig(name="x", cache_dir=str(tmp_path))
    assert choose_kernels(auto, LORA, cpu, torch.bfloat16) is not None
    assert "model.kernels=auto: compiled" in caplog.text
    assert choose_kernels(auto, LORA, cpu, torch.float32) is None
    assert choose_kernels(auto, FullConfig(name="full", default_learning_rate=1.0), cpu, torch.bfloat16) is None
    torch_only = ModelConfig(name="x", kernels=KernelChoice.torch)
    assert choose_kernels(torch_only, LORA, cpu, torch.bfloat16) is None
    asked = ModelConfig(name="x", cache_dir=str(tmp_path), kernels=KernelChoice.compiled)
    assert choose_kernels(asked, LORA, cpu, torch.bfloat16) is not None
    with pytest.raises(ModelError, match="needs adapters, bf16, a CPU and a C compiler"):
        choose_kernels(asked, LORA, gpu, torch.bfloat16)
