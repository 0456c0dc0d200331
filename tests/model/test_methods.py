"""Ways of fine-tuning: each changes what it should and nothing else, and its adapter means the same to plain peft."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agentft.errors import ConfigError, ModelError
from agentft.model import quantization
from agentft.model.adapters import (
    count_parameters,
    load_trained_state,
    prepare_for_training,
    rate_factors,
    save_final,
    trained_state,
)
from agentft.model.config import (
    FreezeConfig,
    LoraConfig,
    LoraStart,
    ModelConfig,
    QloraConfig,
    QuantKind,
    trains_weights,
)
from agentft.model.labelled_loss import LabelledLoss
from agentft.model.quantization import dense_weight, quantization_config, rounded_weight
from agentft.recipes.config import require_consistent
from agentft.training.config import TrainingConfig
from agentft.training.engine import build_optimizer, build_schedule

MODEL = ModelConfig(name="tiny")
IDS = torch.arange(3, 27)[None] % 50


def tiny(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def lora(**values) -> LoraConfig:
    return LoraConfig(name="lora", default_learning_rate=1e-3, **{"rank": 4, "dropout": 0.0, **values})


def freeze(**values) -> FreezeConfig:
    return FreezeConfig(name="freeze", default_learning_rate=1e-3, **values)


def training(**values) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 1e-2, "warmup": 0.0, **values})


def train(model: torch.nn.Module, sft, *, steps: int = 3, autocast: bool = False) -> list[float]:
    optimizer = build_optimizer(model, training(), rate_factors(sft))
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def other_names(state: dict[str, torch.Tensor], trained: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in trained}


# --- LoRA and its relatives ---

METHODS = {
    "plain": {},
    "all_linear": {"targets": ["all-linear"]},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_plus": {"learning_rate_ratio": 16.0},
    "pissa": {"start": LoraStart.pissa},
    "rslora_pissa_all": {"rslora": True, "start": LoraStart.pissa, "targets": ["all-linear"]},
    "rslora_dora_plus": {"rslora": True, "dora": True, "learning_rate_ratio": 4.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_begins_as_the_model_came_learns_and_changes_the_adapter_alone(method: str, dtype: torch.dtype):
    model = tiny(dtype=dtype)
    came = logits(model)
    sft = lora(**METHODS[method])
    adapted = prepare_for_training(model, sft, MODEL)
    tolerance = 2e-5 if dtype is torch.float32 else 0.05
    assert torch.allclose(logits(adapted), came, atol=tolerance)
    before = copy.deepcopy(adapted.state_dict())
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.dtype is torch.float32 for p in adapted.parameters() if p.requires_grad)
    losses = train(adapted.train(), sft)
    assert losses[-1] < losses[0]
    after = adapted.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in other_names(before, trained))
    assert all(not torch.equal(after[name], before[name]) for name in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_the_same_outputs_in_plain_peft(method: str, tmp_path, byte_tokenizer):
    from peft import PeftModel

    sft = lora(**METHODS[method])
    adapted = prepare_for_training(tiny(), sft, MODEL)
    train(adapted.train(), sft)
    wanted = logits(adapted)
    save_final(adapted, sft, byte_tokenizer, tmp_path)
    plain = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.allclose(logits(plain), wanted, atol=2e-5)
    assert torch.allclose(logits(plain.merge_and_unload()), wanted, atol=2e-5)
    assert not torch.allclose(logits(tiny()), wanted, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_all_that_a_method_has_made(method: str, monkeypatch):
    sft = lora(**METHODS[method])
    adapted = prepare_for_training(tiny(), sft, MODEL)
    train(adapted.train(), sft)
    saved = {name: tensor.clone() for name, tensor in trained_state(adapted).items()}
    # Another machine finds singular vectors of another sign: what was saved must not depend on them.
    svd = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: (-svd(*a, **k)[0], svd(*a, **k)[1], -svd(*a, **k)[2]))
    fresh = prepare_for_training(tiny(), sft, MODEL)
    load_trained_state(fresh, saved)
    assert torch.equal(logits(fresh), logits(adapted))


def test_pissa_begins_with_the_best_approximation_of_each_weight():
    model = tiny()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    sft = lora(start=LoraStart.pissa)
    adapted = prepare_for_training(model, sft, MODEL)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    product = sft.scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    left = torch.linalg.svdvals(weight)[sft.rank :].square().sum().sqrt()
    assert torch.allclose((weight - product).norm(), left, rtol=1e-3)
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("start", LoraStart)
def test_a_saved_adapter_names_its_base_whatever_it_began_as(start: LoraStart, tmp_path, byte_tokenizer):
    model, sft, base = tiny(), lora(start=start), str(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = base
    save_final(prepare_for_training(model, sft, MODEL), sft, byte_tokenizer, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == base


def test_the_learning_rate_of_b_is_the_ratio_times_that_of_a_all_the_way():
    sft = lora(learning_rate_ratio=16.0)
    adapted = prepare_for_training(tiny(), sft, MODEL)
    config = training(warmup=0.5)
    optimizer = build_optimizer(LabelledLoss(adapted, rate_factors=rate_factors(sft)), config)
    schedule = build_schedule(optimizer, 4, config)
    names = {id(p): name for name, p in adapted.named_parameters()}
    for _ in range(4):
        first, second = optimizer.param_groups
        assert {"lora_A" in names[id(p)] for p in first["params"]} == {True}
        assert {"lora_B" in names[id(p)] for p in second["params"]} == {True}
        assert second["lr"] == pytest.approx(16 * first["lr"])
        optimizer.step()
        schedule.step()


def test_all_linear_is_every_layer_but_the_head():
    adapted = prepare_for_training(tiny(), lora(targets=["all-linear"]), MODEL)
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in trained_state(adapted) if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"dora": True}, "DoRA"), ({"start": LoraStart.pissa}, "a PiSSA start"), ({}, None)],
    ids=["dora", "pissa", "plain"],
)
def test_layers_without_the_lean_forward_are_named_with_their_reason(values, reason, caplog):
    with caplog.at_level(logging.INFO):
        prepare_for_training(tiny(), lora(**values), MODEL)
    said = [line for line in caplog.messages if "use PEFT's forward" in line]
    assert said == ([f"12 LoRA layers use PEFT's forward ({reason})"] if reason else [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate_ratio": 0.0}, "learning_rate_ratio"),
        ({"targets": []}, "targets"),
        ({"targets": ["all-linear", "q_proj"]}, "all-linear alone"),
        ({"dora": True, "start": LoraStart.pissa}, "one of the two"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, message: str):
    with pytest.raises(ConfigError, match=message):
        require_consistent(lora(**values))


def test_a_target_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"no linear layer or expert is called c_attn; .*q_proj.*or all-linear"):
        prepare_for_training(tiny(), lora(targets=["c_attn"]), MODEL)


def test_a_pissa_rank_beyond_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"rank=20: .*k_proj has rank 16 at most"):
        prepare_for_training(tiny(), lora(rank=20, start=LoraStart.pissa), MODEL)


# --- freeze ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layers", "embeddings", "head", "tied"),
    [(1, False, False, False), (2, True, False, False), (1, False, True, False), (0, False, True, True)],
)
def test_freeze_trains_the_last_blocks_and_what_is_named(layers, embeddings, head, tied, dtype):
    model = tiny(tied=tied, dtype=dtype)
    sft = freeze(layers=layers, embeddings=embeddings, head=head)
    came = logits(model)
    prepared = prepare_for_training(model, sft, MODEL)
    assert torch.allclose(logits(prepared), came, atol=1e-6 if dtype is torch.float32 else 0.05)
    before = copy.deepcopy(prepared.state_dict())
    losses = train(prepared.train(), sft, autocast=dtype is torch.bfloat16)
    assert losses[-1] < losses[0]
    after = prepared.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {name for name in before for block in range(3 - layers, 3) if f"layers.{block}." in name}
    wanted |= {"model.embed_tokens.weight"} if embeddings or (head and tied) else set()
    wanted |= {"lm_head.weight", "model.norm.weight"} if head else set()
    assert changed == wanted
    assert all(after[name].dtype is torch.float32 for name in changed)
    assert trains_weights(sft)


def test_freeze_of_more_blocks_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="the model has 3 blocks"):
        prepare_for_training(tiny(), freeze(layers=4), MODEL)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        require_consistent(freeze(layers=0))


# --- qlora ---


def qlora(**values) -> QloraConfig:
    return QloraConfig(name="qlora", default_learning_rate=1e-3, **{"rank": 4, "dropout": 0.0, **values})


def quantized(sft: QloraConfig, folder, dtype: torch.dtype = torch.float32):
    """Load the tiny model with its matrices in few bits, as `load_model` does."""
    from agentft.model.config import ModelSource
    from agentft.model.load import load_model
    from agentft.model.sources import ModelFiles
    from agentft.runtime import Device

    if not (folder / "config.json").is_file():
        tiny().save_pretrained(folder)
    return load_model(
        ModelFiles(folder, "tiny"),
        ModelConfig(name="tiny", source=ModelSource.local, path=str(folder)),
        device=Device("cpu", "CPU", 1),
        dtype=dtype,
        attention="sdpa",
        quantization=quantization_config(sft, dtype),
    )


QUANTIZED = [
    *({"bits": 4, "kind": kind, "double_quantization": double} for kind in QuantKind for double in (True, False)),
    {"bits": 8},
]


@pytest.mark.parametrize(
    ("bits", "method"), [(4, "plain"), (4, "dora"), (4, "pissa"), (8, "plain"), (8, "rslora_pissa_all")]
)
def test_qlora_learns_on_a_base_that_does_not_change(bits: int, method: str, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    sft = qlora(bits=bits, **METHODS[method])
    model = quantized(sft, tmp_path)
    matrices = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert len(matrices) == 3 * 7
    assert all(m.weight.dtype == (torch.uint8 if bits == 4 else torch.int8) for m in matrices)
    adapted = prepare_for_training(model, sft, MODEL)
    came = logits(quantized(sft, tmp_path))
    assert torch.allclose(logits(adapted), came, atol=1e-4 if bits == 4 else 0.02)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if torch.is_tensor(tensor)}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    losses = train(adapted.train(), sft)
    logits(adapted)
    assert losses[-1] < losses[0]
    after = adapted.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in other_names(before, trained))


@pytest.mark.parametrize("values", QUANTIZED, ids=str)
def test_a_weight_rounded_alone_is_the_weight_of_the_quantised_model(values, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    sft = qlora(**values)
    model = quantized(sft, tmp_path)
    for (name, plain), layer in zip(
        ((n, m) for n, m in tiny().named_modules() if n.endswith("_proj")),
        (m for n, m in model.named_modules() if n.endswith("_proj")),
        strict=True,
    ):
        assert torch.equal(rounded_weight(plain.weight.detach(), sft), dense_weight(layer)), name


def test_answering_in_the_middle_of_a_training_leaves_the_quantised_weights_alone(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    model = quantized(qlora(), tmp_path, torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    before = dense_weight(layer)
    with torch.no_grad():
        for length in (1, 5):
            model(input_ids=IDS[:, :length])
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(dense_weight(layer), before)


def test_without_the_package_qlora_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes: pip install bitsandbytes"):
        quantization_config(qlora(), torch.float32)
    assert quantization_config(lora(), torch.float32) is None


def test_bits_other_than_4_and_8_are_refused():
    with pytest.raises(ConfigError, match="bits=3: expected 4 or 8"):
        qlora(bits=3)
    with pytest.raises(ConfigError, match="peft cannot"):
        require_consistent(qlora(bits=8, dora=True))


@pytest.mark.slow
def test_importing_bitsandbytes_never_asks_for_kernels_from_a_hub(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    (tmp_path / "kernels.py").write_text("raise SystemExit('code from a hub was asked for')")
    code = (
        "from agentft.model.quantization import import_bitsandbytes as load\n"
        "print(load().__name__)\nimport sys; assert 'kernels' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.stdout.strip() == "bitsandbytes", done.stderr
    assert "kernels" not in done.stderr


def test_parameters_are_counted_once():
    count = count_parameters(prepare_for_training(tiny(tied=True), freeze(layers=0, head=True), MODEL))
    assert count.trained == 50 * 32 + 32


# --- Layers that adapters reach ---

DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRIDS = {
    "llama": ({}, 8, None),
    "qwen3_5_text": (DELTA_NET, 2, "Qwen3_5GatedDeltaNet (in_proj_a, in_proj_b, in_proj_qkv, in_proj_z, out_proj)"),
    "qwen3_next": (
        DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 16},
        2,
        "Qwen3NextGatedDeltaNet (in_proj_ba, in_proj_qkvz, out_proj)",
    ),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "moe", "mamba", "attention", "mamba", "moe", "mamba", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        1,
        "NemotronHMamba2Mixer (in_proj, out_proj)",
    ),
    "jamba": ({"num_experts": 2}, 1, "JambaMambaMixer (dt_proj, in_proj, out_proj, x_proj)"),
}
"""Model type -> its own settings, layers of 8 that the default targets reach, what the log names of the others."""


def _is_our_warning(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING and record.name.startswith("agentft")


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_log_says_how_many_layers_have_adapters(kind, caplog):
    own, reached, missed = HYBRIDS[kind]
    width = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **width, vocab_size=50, num_hidden_layers=8, **own)
    caplog.set_level("INFO", "agentft")
    adapted = prepare_for_training(AutoModelForCausalLM.from_config(config), lora(), MODEL)
    count = count_parameters(adapted)
    said = f"adapters in {reached} of 8 layers"
    assert f"{said}, {count.trained:,} of {count.total:,} parameters" in caplog.messages
    warnings = [record.message for record in caplog.records if _is_our_warning(record)]
    if missed is None:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith(f"{said}: ")
    assert missed in warning
    # By hand: layers by the names of the trained parameters.
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len({name.partition(".layers.")[2].partition(".")[0] for name in names}) == reached
    caplog.clear()
    everything = lora(targets=["all-linear"])
    prepare_for_training(AutoModelForCausalLM.from_config(config), everything, MODEL)
    assert any(message.startswith("adapters in 8 of 8 layers, ") for message in caplog.messages)
    assert not any(map(_is_our_warning, caplog.records))
