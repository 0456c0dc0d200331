"""Merged tensor by tensor, a model is what peft makes of it whole."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from agentft.errors import ModelError
from agentft.model import shards
from agentft.model.adapters import prepare_for_training, trained_state
from agentft.model.config import FullConfig
from agentft.model.merging import write_merged
from tests.model.test_methods import METHODS, MODEL, freeze, logits, lora, qlora, quantized, tiny, train

FP32 = {"computed": torch.float32, "stored": torch.float32}


def loaded(folder, base):
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_is_what_peft_merges(method: str, tied: bool, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny(tied=tied).save_pretrained(base, max_shard_size="30KB")
    out.mkdir()
    adapted = prepare_for_training(tiny(tied=tied), lora(**METHODS[method]), MODEL)
    train(adapted.train(), lora(**METHODS[method]))
    write_merged(base, out, trained_state(adapted), lora(**METHODS[method]), MODEL, **FP32)
    assert len(list(base.glob("*.safetensors"))) > 1
    merged = loaded(out, base)
    assert torch.allclose(logits(merged), logits(adapted), atol=2e-5)
    whole = adapted.eval().merge_and_unload() if "start" not in adapted.peft_config else None
    if whole is not None:
        wanted = whole.state_dict()
        assert all(torch.allclose(tensor, wanted[name], atol=1e-6) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("sft", [FullConfig(name="full", default_learning_rate=1e-3), freeze(layers=1, head=True)])
@pytest.mark.parametrize("tied", [True, False])
def test_trained_weights_take_the_place_of_the_bases(sft, tied: bool, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny(tied=tied).save_pretrained(base)
    out.mkdir()
    model = prepare_for_training(tiny(tied=tied), sft, MODEL)
    train(model.train(), sft)
    write_merged(base, out, trained_state(model), sft, MODEL, **FP32)
    assert torch.equal(logits(loaded(out, base)), logits(model))


@pytest.mark.parametrize("values", [{"bits": 4}, {"bits": 8}], ids=str)
def test_a_quantised_base_is_written_as_the_numbers_it_computed_with(values, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    base, out, sft = tmp_path / "base", tmp_path / "out", qlora(**values)
    model = prepare_for_training(quantized(sft, base), sft, MODEL)
    train(model.train(), sft)
    out.mkdir()
    write_merged(base, out, trained_state(model), sft, MODEL, **FP32)
    # In 8 bits the inputs are rounded as well, which no plain model does.
    assert torch.allclose(logits(loaded(out, base)), logits(model), atol=1e-4 if sft.bits == 4 else 0.05)
    assert not torch.allclose(logits(tiny()), logits(model), atol=1e-3)


def test_the_weights_of_another_model_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    state = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)}
    with pytest.raises(ModelError, match="belong to another model"):
        write_merged(tmp_path, tmp_path, state, lora(), MODEL, **FP32)


def test_memory_is_that_of_a_shard(tmp_path, monkeypatch):
    """What is written is handed on as it comes: no more than a shard's tensors are held at once."""
    held: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def save(tensors, *args, **kwargs):
        alive.extend(map(weakref.ref, tensors.values()))
        held.append(sum(tensor.nbytes for tensor in map(weakref.ref.__call__, alive) if tensor is not None))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    base, out = tmp_path / "base", tmp_path / "out"
    tiny().save_pretrained(base)
    out.mkdir()
    adapted = prepare_for_training(tiny(), lora(), MODEL)
    write_merged(base, out, trained_state(adapted), lora(), MODEL, **FP32)
    assert 10_000 < max(held) <= 20_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
