"""What transformers offers today trains here to the end: packed or not, resumed, exported as an adapter and merged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from agentft.data.batches import collate
from agentft.errors import ConfigError, ModelError
from agentft.model.adapters import (
    count_parameters,
    find_targets,
    load_trained_state,
    prepare_for_training,
    trained_state,
)
from agentft.model.config import (
    Attention,
    Dtype,
    FullConfig,
    LoraConfig,
    LoraStart,
    ModelConfig,
    ModelSource,
    QloraConfig,
)
from agentft.model.labelled_loss import LabelledLoss
from agentft.model.load import load_model
from agentft.model.memory import Workload, estimate_memory
from agentft.model.merging import write_merged
from agentft.model.quantization import require_dense
from agentft.model.shards import empty_model
from agentft.model.sources import ModelFiles
from agentft.runtime import Device
from benchmarks import architectures
from benchmarks.models import held_in_a_step
from tests.model.test_methods import freeze, lora, train

MODEL = ModelConfig(name="small")
IDS = torch.arange(5, 29)[None]
FP32 = {"computed": torch.float32, "stored": torch.float32}
EVERYTHING = {"targets": ["all-linear"]}
BY_DEFAULT = ("qwen3_moe", "qwen3_5_text", "lfm2_moe", "gpt_oss")


def small(kind: str, **own):
    return architectures.small_model(kind, torch.float32, **own)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in BY_DEFAULT else [pytest.mark.slow]) for n in architectures.RUNS.split()],
)
def test_a_whole_run_of_an_architecture(name: str, tmp_path):
    """Each step raises where it does not hold: see `whole_run`."""
    found = architectures.whole_run(name, tmp_path)
    assert list(found) == list(architectures.FIELDS), found
    reached, of = found["adapters"].split(" of ")
    assert reached == of
    assert found["resumes"] == "bit for bit"


# --- What targets stand for ---


@pytest.mark.parametrize(
    ("kind", "targets", "modules", "parameters"),
    [
        ("qwen3_moe", ["q_proj", "experts.down_proj"], ["q_proj"], ["experts.down_proj"]),
        ("qwen3_moe", ["down_proj"], [], ["experts.down_proj"]),
        # peft takes these names for experts, so that the layers are adapted as parameters.
        ("deepseek_v3", ["o_proj", "gate_proj"], ["o_proj"], ["gate_proj.weight"]),
        ("gemma4_text", ["mlp.down_proj"], ["down_proj"], []),
        ("gpt2", ["c_attn"], ["c_attn"], []),
        (
            "gpt_oss",
            ["all-linear"],
            ["k_proj", "o_proj", "q_proj", "v_proj"],
            ["experts.down_proj", "experts.gate_up_proj"],
        ),
        ("mamba2", ["all-linear"], ["in_proj"], []),
        ("gpt_neox", ["all-linear"], ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], []),
    ],
)
def test_targets_are_ends_of_paths(kind, targets, modules, parameters):
    found = find_targets(small(kind), lora(targets=targets), MODEL)
    assert (found.modules, found.parameter_ends) == (modules, parameters)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "qwen3_moe",
            {"targets": ["w1"]},
            r"is called w1; model=small has: .*q_proj.*experts\.gate_up_proj, or all-linear",
        ),
        ("falcon_h1", {"targets": ["out_proj"]}, "out_proj of model=small hands its bare weight to a kernel"),
        ("gemma2", {"targets": ["lm_head"], "tied": True}, "lm_head of model=small shares its weight"),
        ("olmoe", {**EVERYTHING, "dora": True}, "dora=true: experts.down_proj, .* take plain adapters only"),
        (
            "olmoe",
            {**EVERYTHING, "start": LoraStart.pissa},
            "start=pissa: experts.down_proj, .* take plain adapters only",
        ),
    ],
)
def test_a_target_that_cannot_be_meant_is_refused_without_weights(kind, values, message):
    tied = {"tie_word_embeddings": True} if values.pop("tied", False) else {}
    model = empty_model(small(kind, **tied).config)
    with pytest.raises(ConfigError, match=message):
        find_targets(model, lora(**values), MODEL)


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        ("gemma3", {}, {"patch_size": 14}),
        ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", "patch_size": 14, "head_dim": 8}),
    ],
)
def test_adapters_stay_out_of_a_vision_tower(kind, text, vision, tmp_path):
    """Mistral 3 is no causal language model to transformers: it is loaded with its tower."""
    base, out, sft = tmp_path / "base", tmp_path / "out", lora(targets=["q_proj", "down_proj"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"mm_tokens_per_image": 4} if kind == "gemma3" else {"spatial_merge_size": 1}
    config = AutoConfig.for_model(
        kind,
        text_config=sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64} | text,
        vision_config=sizes | {"image_size": 28} | vision,
        **own,
    )
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(base)
    out.mkdir()
    adapted = prepare_for_training(loaded(base), sft, MODEL)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all(".language_model.layers." in name for name in names)
    train(adapted.train(), sft)
    write_merged(base, out, trained_state(adapted), sft, MODEL, **FP32)
    assert torch.allclose(logits(loaded(out)), logits(adapted), atol=1e-5)


def test_routers_that_are_layers_have_no_adapters():
    assert not any("router" in name for name in find_targets(small("llama4_text"), lora(**EVERYTHING), MODEL).layers)


def test_an_adapter_on_an_own_output_head_trains_and_merges(tmp_path):
    base, out, sft = tmp_path / "base", tmp_path / "out", lora(targets=["lm_head"])
    model = small("llama", tie_word_embeddings=False)
    model.save_pretrained(base)
    out.mkdir()
    adapted = prepare_for_training(model, sft, MODEL)
    assert {name.partition(".lora_")[0] for name in trained_state(adapted)} == {"base_model.model.lm_head"}
    losses = train(adapted.train(), sft)
    assert losses[-1] < losses[0]
    write_merged(base, out, trained_state(adapted), sft, MODEL, **FP32)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted), atol=1e-4)


def test_dropout_is_of_layers_where_experts_are_adapted(caplog):
    caplog.set_level(logging.INFO, "agentft")
    adapted = prepare_for_training(small("qwen3_moe"), lora(**EVERYTHING, dropout=0.1), MODEL)
    layer = adapted.get_base_model().model.layers[0]
    assert layer.self_attn.q_proj.lora_dropout["default"].p == 0.1
    assert isinstance(layer.mlp.experts.lora_dropout["default"], torch.nn.Identity)
    assert adapted.peft_config["default"].lora_dropout == 0.0
    assert any("adapters of experts have none" in message for message in caplog.messages)


def test_a_quantised_base_names_the_layers_that_peft_cannot_adapt():
    sft = QloraConfig(name="qlora", default_learning_rate=1e-3, targets=["all-linear"])
    found = find_targets(small("deepseek_v3"), sft, MODEL)
    assert found.left == "down_proj, gate_proj, up_proj"
    assert found.parameter_ends == ["experts.down_proj", "experts.gate_up_proj"]


# --- Experts ---


def test_a_full_fine_tuning_of_experts_is_merged_under_the_names_of_the_files(tmp_path):
    base, out, sft = tmp_path / "base", tmp_path / "out", FullConfig(name="full", default_learning_rate=1e-3)
    small("mixtral").save_pretrained(base)
    out.mkdir()
    model = prepare_for_training(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft, MODEL)
    train(model.train(), sft)
    write_merged(base, out, trained_state(model), sft, MODEL, **FP32)
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


@pytest.mark.parametrize("on", [True, False])
def test_the_loss_for_evenly_used_experts_is_added_as_the_config_says(on: bool, examples):
    from dataclasses import replace

    model = small("qwen3_moe", vocab_size=512, output_router_logits=on, router_aux_loss_coef=0.5)
    batch = collate([replace(examples[0], input_ids=examples[0].input_ids % 512)], 0)
    objective = LabelledLoss(model)
    plain = float(objective.eval()(batch).detach())
    trained = float(objective.train()(batch).detach())
    with torch.no_grad():
        stock = model(input_ids=batch.input_ids_BT, labels=batch.labels_BT, use_cache=False)
    assert plain / batch.targets == pytest.approx(
        float(stock.loss) - (0.5 * float(stock.aux_loss) if on else 0), rel=1e-4
    )
    assert trained / batch.targets == pytest.approx(float(stock.loss), rel=1e-4)
    assert (trained - plain > 0.1 * batch.targets) == on


# --- Bases that were saved otherwise ---


def test_a_base_without_its_prefix_is_merged_by_transformers(tmp_path):
    base, out, sft = tmp_path / "base", tmp_path / "out", lora()
    small("llama").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"}
    )
    out.mkdir()
    adapted = prepare_for_training(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft, MODEL)
    train(adapted.train(), sft)
    write_merged(base, out, trained_state(adapted), sft, MODEL, **FP32)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted), atol=1e-4)


def test_a_base_without_all_weights_is_not_filled_up_with_random_ones(tmp_path):
    small("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights, such as lm_head\.weight, which would be random"):
        loaded(tmp_path)


def loaded(folder: Path):
    config = ModelConfig(name="x", source=ModelSource.local, path=str(folder))
    return load_model(
        ModelFiles(folder, ""), config, device=Device("cpu", "CPU", 1), dtype=torch.float32, attention="eager"
    )


@pytest.mark.parametrize(
    ("way", "sft", "message"),
    [
        ("gptq", lora(), "says gptq: adapters of sft_type=lora .* take the original weights with sft_type=qlora"),
        ("bitsandbytes", lora(), "says bitsandbytes"),
        ("mxfp4", QloraConfig(name="qlora", default_learning_rate=1e-3), "take sft_type=lora, which makes them dense"),
        ("mxfp4", lora(), None),
        (None, lora(), None),
    ],
)
def test_weights_that_are_quantised_already_are_refused_before_the_start(way, sft: LoraConfig, message):
    settings = {"quantization_config": {"quant_method": way}} if way else {}
    if message is None:
        require_dense(settings, sft)
        return
    with pytest.raises(ModelError, match=message):
        require_dense(settings, sft)


def test_a_quantised_base_is_refused_before_anything_is_written(tmp_path):
    base = tmp_path / "base"
    small("llama").save_pretrained(base)
    settings = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "awq"}}), "utf-8")
    with pytest.raises(ModelError, match="says awq"):
        architectures._train(base, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_published_mxfp4_experts_are_made_dense_trained_and_merged(tmp_path):
    base, out, sft = tmp_path / "base", tmp_path / "out", lora(**EVERYTHING)
    small("gpt_oss").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    settings = json.loads((base / "config.json").read_text("utf-8"))
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    out.mkdir()
    adapted = prepare_for_training(loaded(base), sft, MODEL)
    losses = train(adapted.train(), sft)
    assert losses[-1] < losses[0]
    write_merged(base, out, trained_state(adapted), sft, MODEL, **FP32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text("utf-8"))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted), atol=1e-3)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class ShopConfig(LlamaConfig):
    model_type = "shop"


class ShopForCausalLM(LlamaForCausalLM):
    config_class = ShopConfig
"""


def test_a_base_with_code_of_its_own_is_merged_with_it(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    small("llama").save_pretrained(base)
    (base / "shop.py").write_text(CODE, encoding="utf-8")
    settings = json.loads((base / "config.json").read_text("utf-8"))
    settings |= {"model_type": "shop", "architectures": ["ShopForCausalLM"]}
    settings["auto_map"] = {"AutoConfig": "shop.ShopConfig", "AutoModelForCausalLM": "shop.ShopForCausalLM"}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    out.mkdir()
    trusting, sft = ModelConfig(name="shop", trust_remote_code=True), lora()
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    adapted = prepare_for_training(model, sft, trusting)
    train(adapted.train(), sft)
    write_merged(base, out, trained_state(adapted), sft, trusting, **FP32)
    merged = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)


# --- GPT-2 ---


@pytest.mark.parametrize(
    "sft", [freeze(layers=1, head=True), lora(**EVERYTHING, start=LoraStart.pissa, rank=2)], ids=["freeze", "pissa"]
)
def test_gpt_2_whose_layers_have_other_names_and_turned_weights(sft, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    small("gpt2").save_pretrained(base)
    out.mkdir()
    model = prepare_for_training(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft, MODEL)
    assert 0 < count_parameters(model).trained < count_parameters(model).total
    losses = train(model.train(), sft)
    assert losses[-1] < losses[0]
    fresh = prepare_for_training(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), sft, MODEL)
    load_trained_state(fresh, trained_state(model))
    assert torch.equal(logits(fresh), logits(model))
    write_merged(base, out, trained_state(model), sft, MODEL, **FP32)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), atol=1e-4)


# --- Memory ---

MEASURED = (
    "llama",
    "mistral",
    "smollm3",
    "granite",
    "olmo2",
    "phi3",
    "glm4",
    "lfm2",
    "lfm2_moe",
    "qwen3_moe",
    "mixtral",
    "olmoe",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ("phi3", "mixtral") else [pytest.mark.slow]) for k in MEASURED]
)
@pytest.mark.parametrize("twice", [False, True], ids=["kept", "computed twice"])
def test_the_estimate_of_an_architecture_is_its_measured_peak(kind: str, twice: bool):
    """All that torch holds at once in a step besides weights: 15 % either way."""
    sizes = dict.fromkeys(("num_experts", "num_local_experts"), 8) | {"moe_intermediate_size": 128}
    sizes |= {"layer_types": ["conv", "full_attention"] * 4} if kind.startswith("lfm") else {}
    model = small(
        kind,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        head_dim=32,
        max_position_embeddings=1024,
        **sizes,
    )
    model.set_attn_implementation("sdpa")
    length, sft = 600, lora(**EVERYTHING, rank=8, dropout=0.05)
    config = ModelConfig(name="x", attention=Attention.sdpa)
    work = Workload(max_length=length, on_cpu=True)
    found = estimate_memory(empty_model(model.config), config, sft, work, dtype=Dtype.fp32, checkpointing=twice)
    adapted = prepare_for_training(model, sft, config)
    if twice:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    held = held_in_a_step(LabelledLoss(adapted).train(), length)
    assert held == pytest.approx(found.activations + found.logits, rel=0.15)
