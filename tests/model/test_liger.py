"""A model on Liger's kernels is the stock model: values and gradients, frozen or trained, packed, with a cache, checkpointed.

The wiring is held with torch's formulae in the kernels' place, which run anywhere; the kernels themselves in Triton's
interpreter where they are installed, and on CUDA by tests/gpu.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from agentft.config import compose, to_train_config
from agentft.errors import ConfigError, ModelError
from agentft.model import load
from agentft.model.adapters import prepare_for_training
from agentft.model.config import FullConfig, KernelChoice, LoraConfig, ModelConfig
from agentft.model.fused import LigerKernels, load_liger
from agentft.model.load import choose_kernels
from agentft.runtime import Device

FAMILIES = ("Llama", "Qwen2", "Qwen3")
LORA = LoraConfig(name="lora", default_learning_rate=1e-3, rank=2, dropout=0.0)
FULL = FullConfig(name="full", default_learning_rate=1e-3)
CPU, GPU = Device("cpu", "a CPU", 1), Device("cuda", "a GPU", 1)


class _Formula:
    """A step of autograd by name, called as Liger's are."""

    def __init__(self, compute):
        self.apply = compute


def _turned(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


FORMULAE = LigerKernels(
    rms_norm=_Formula(lambda x, w, eps, offset, casting, in_place: functional.rms_norm(x, w.shape, w, eps)),
    gated_silu=_Formula(lambda gate, up: functional.silu(gate) * up),
    rotate=_Formula(lambda q, k, cos, sin: (_turned(q, cos, sin), _turned(k, cos, sin))),
)


def _model(family, kernels, *, trained, dtype=torch.float32):
    import transformers

    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    model = prepare_for_training(model, FULL if trained else LORA, ModelConfig(name="tiny"), kernels)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).train()


def _results(model, **arguments):
    ids = torch.arange(14).view(2, 7) * 5 % 40
    logits = model(input_ids=ids, **arguments).logits
    model.zero_grad()
    logits.double().square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_model(family, kernels, *, trained, **arguments):
    """Values and gradients in fp32 are those of the stock layers in float64."""
    found = _results(_model(family, kernels, trained=trained), **arguments)
    wanted = _results(_model(family, None, trained=trained, dtype=torch.float64), **arguments)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].double() - value).norm() <= 1e-3 * value.norm() + 1e-9, (family, trained, name)


@pytest.mark.parametrize("trained", [False, True], ids=["adapters", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_stock_layers(family, trained):
    check_model(family, FORMULAE, trained=trained)


def test_rows_that_are_packed_or_have_a_cache_are_answered_as_ever():
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, 7)
    check_model("Llama", FORMULAE, trained=False, position_ids=packed, use_cache=False)
    ours, stock = (_model("Llama", kernels, trained=False).eval() for kernels in (FORMULAE, None))
    ids = torch.arange(6)[None]
    said = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=True) for model in (ours, stock)]
    assert torch.equal(*said)


def test_gradient_checkpointing_changes_no_bit():
    plain, saving = (_model("Qwen2", FORMULAE, trained=True) for _ in range(2))
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(_results(saving), _results(plain), rtol=0, atol=0)


def test_who_computes_on_cuda_is_chosen_by_what_is_there(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(load, "load_liger", lambda: FORMULAE)
    assert choose_kernels(KernelChoice.auto, GPU) is FORMULAE
    assert "model.kernels=auto: liger" in caplog.text
    assert choose_kernels(KernelChoice.liger, GPU) is FORMULAE
    assert choose_kernels(KernelChoice.torch, GPU) is None
    assert choose_kernels(KernelChoice.auto, CPU) is None
    with pytest.raises(ModelError, match=r"needs a CUDA device and the package: pip install liger-kernel"):
        choose_kernels(KernelChoice.liger, CPU)
    monkeypatch.setattr(load, "load_liger", lambda: None)
    assert choose_kernels(KernelChoice.auto, GPU) is None
    assert "model.kernels=auto: torch" in caplog.text
    with pytest.raises(ModelError, match="needs a CUDA device and the package"):
        choose_kernels(KernelChoice.liger, GPU)


def test_what_is_not_installed_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    assert load_liger() is None
    assert "pip install liger-kernel" in caplog.text


def test_liger_and_torchs_compiler_are_not_taken_together():
    with pytest.raises(ConfigError, match="training.compile=true with model.kernels=liger"):
        to_train_config(compose("train", ["training.compile=true", "model.kernels=liger", "run_dir=unused"]))


def test_ligers_own_kernels_equal_float64_in_tritons_interpreter():
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, as it is with the extra gpu on CUDA")
    script = Path(__file__).with_name("liger_interpreted.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checked 3" in done.stdout
