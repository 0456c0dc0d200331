"""The same laws on a GPU: `make gpu` runs them; without one they are not collected into the default run."""

from __future__ import annotations

import pytest
import torch

from agentft.data.batches import collate, collate_packed
from agentft.model.adapters import prepare_for_training
from agentft.model.config import FullConfig, LoraConfig, ModelConfig
from agentft.model.fused import load_liger
from agentft.model.labelled_loss import LabelledLoss
from tests.examples import tokenize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine shows torch none"),
]


@pytest.fixture(scope="module")
def examples(golden_conversations, template, encoder):
    return list(tokenize(golden_conversations.values(), template, encoder))


def _model(attn: str, dtype: torch.dtype):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attn, dtype=dtype).cuda()
    sft = LoraConfig(name="lora", default_learning_rate=1e-3, dropout=0.0)
    return prepare_for_training(model, sft, ModelConfig(name="tiny")).train()


def _results(model, batches):
    model.zero_grad()
    loss = sum(LabelledLoss(model)(batch.to(torch.device("cuda"))) for batch in batches)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2"])
def test_packed_equals_unpacked(examples, attn):
    from transformers.utils import is_flash_attn_2_available

    if attn == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    dtype = torch.float32 if attn == "sdpa" else torch.bfloat16
    model = _model(attn, dtype)
    plain, wanted = _results(model, [collate([e], 0) for e in examples[:4]])
    packed, found = _results(model, [collate_packed(examples[:4])])
    close = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(packed, plain, rtol=close, atol=close)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= close * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("trained", [False, True], ids=["adapters", "full"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_ligers_kernels_are_as_near_to_fp32_as_torchs(family, trained):
    """In bf16 both err against fp32; Liger's may err at most a half more."""
    import transformers

    kernels = load_liger()
    if kernels is None:
        pytest.skip("liger-kernel is not installed: pip install liger-kernel")
    sft = FullConfig if trained else LoraConfig

    def results(dtype, used):
        torch.manual_seed(3)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, use_cache=False,
        )  # fmt: skip
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="sdpa")
        model = model.cuda().to(torch.float32 if trained else dtype)
        model = prepare_for_training(model, sft(name="x", default_learning_rate=1.0), ModelConfig(name="tiny"), used)
        with torch.autocast("cuda", torch.bfloat16, enabled=trained and dtype is torch.bfloat16):
            logits = model.eval()(input_ids=torch.arange(200, device="cuda").view(2, 100)).logits
        logits.float().square().mean().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    wanted = results(torch.float32, None)
    torchs, ligers = ((results(torch.bfloat16, used) - wanted).norm() for used in (None, kernels))
    assert ligers <= 1.5 * torchs + 1e-6 * wanted.norm()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_the_loss_of_a_batch_waits_for_nothing(examples, pack, at_once):
    """Our part of a step never asks the device for a number; transformers' own mask building does once a forward pass."""
    model = _model("sdpa", torch.bfloat16)
    objective = LabelledLoss(model, reads_head=at_once)
    batch = collate_packed(examples[:3]) if pack else collate(examples[:3], 0)
    hidden = torch.randn(*batch.input_ids_BT.shape, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moved = batch.to(torch.device("cuda"))
    objective.of_hidden(hidden, moved).backward()  # what is loaded once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        (objective.of_hidden(hidden, moved) / batch.weight).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_running_out_of_memory_leaves_a_snapshot(tmp_path):
    from agentft.training.guards import NAME, snapshot_on_out_of_memory

    snapshot_on_out_of_memory(tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert (tmp_path / NAME.format(device=0)).stat().st_size > 100
