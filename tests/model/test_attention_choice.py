"""Which attention runs: the fastest that fits, said aloud; what cannot run here is refused with what to do."""

from __future__ import annotations

import logging

import pytest
import torch

from agentft.errors import ModelError
from agentft.model import attention
from agentft.model.attention import choose_attention
from agentft.model.config import Attention
from agentft.runtime import Device
from tests.model.test_methods import IDS, tiny

CPU = Device("cpu", "CPU (4 threads)", 4)
GPU = Device("cuda", "a card", 4)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "option", "chosen"),
    [
        (CPU, torch.float32, True, "sdpa", "sdpa"),
        (CPU, torch.bfloat16, True, "tiled", "agentft_tiled"),
        (GPU, torch.bfloat16, True, "flash", "flash_attention_2"),
        (GPU, torch.bfloat16, False, "sdpa", "sdpa"),
        (GPU, torch.float32, True, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_flash_where_it_is_there_and_fits_and_says_what_it_took(
    device, dtype, installed, option, chosen, monkeypatch, caplog
):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    with caplog.at_level(logging.INFO):
        assert choose_attention(Attention.auto, device, dtype) == chosen
    assert f"model.attention=auto: {option}\n" in caplog.text


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (GPU, torch.float32)])
def test_flash_that_cannot_run_is_refused_with_the_line_that_installs_it(device, dtype, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises(ModelError, match="pip install --no-build-isolation flash-attn"):
        choose_attention(Attention.flash, device, dtype)


def test_flex_is_refused_where_it_cannot_train():
    with pytest.raises(ModelError, match=r"flex needs a CUDA device.*here is CPU \(4 threads\)"):
        choose_attention(Attention.flex, CPU, torch.float32)
    assert choose_attention(Attention.flex, GPU, torch.bfloat16) == attention.FLEX


def _with_flex():
    attention.register()
    model = tiny()
    model.set_attn_implementation(attention.FLEX)
    return model


def test_masks_of_generation_hide_positions_under_flex_too():
    seen = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    seen[..., :5] = False
    seen[..., range(24), range(24)] = True
    with torch.no_grad():
        found, wanted = (model(input_ids=IDS, attention_mask=seen).logits for model in (_with_flex(), tiny()))
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_flex_on_whole_rows_is_plain_causal_attention():
    with torch.no_grad():
        found, wanted = (model(input_ids=IDS).logits for model in (_with_flex(), tiny()))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.gpu
def test_flex_trains_on_a_card():
    model = _with_flex().to("cuda", torch.bfloat16).train()
    loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_choices_are_named():
    assert {"auto", "flash", "sdpa", "eager", "flex"} <= {choice.value for choice in Attention}
    assert choose_attention(Attention.eager, CPU, torch.float32) == "eager"
