"""The memory estimate against published sizes, numbers worked out by hand, and what torch really keeps."""

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from agentft.config import conf_dir
from agentft.errors import ModelError
from agentft.model import attention
from agentft.model.adapters import count_parameters, prepare_for_training
from agentft.model.config import (
    Attention,
    Dtype,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    LoraStart,
    ModelConfig,
    ModelSource,
    QloraConfig,
    SftConfig,
)
from agentft.model.load import load_model
from agentft.model.memory import (
    DeviceMemory,
    Fit,
    MemoryEstimate,
    Workload,
    device_memory,
    estimate_memory,
    judge,
    memory_within,
    planned_model,
)
from agentft.model.quantization import quantization_config
from agentft.model.sources import ModelFiles
from agentft.runtime import Device, available_cores, cgroup_folders, cpu_quotas, set_up
from benchmarks import models

KNOWN = ("llama", "qwen2", "qwen3", "mistral")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY_MATRIX = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def settings(kind: str, numbers: tuple[int, ...], *, tied: bool = False) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = dict(zip((*names, "intermediate_size", "head_dim"), numbers, strict=False))
    values |= {"qwen": {"seq_length": 8192}, "baichuan": {"max_position_embeddings": 4096}}.get(kind, {})
    return {"model_type": kind, "tie_word_embeddings": tied, **values}


PUBLISHED = [
    ("qwen2.5-0.5b", settings("qwen2", (151936, 896, 24, 14, 2, 4864), tied=True), 494_032_768),
    ("qwen2.5-1.5b", settings("qwen2", (151936, 1536, 28, 12, 2, 8960), tied=True), 1_543_714_304),
    ("qwen2.5-3b", settings("qwen2", (151936, 2048, 36, 16, 2, 11008), tied=True), 3_085_938_688),
    ("qwen2.5-7b", settings("qwen2", (152064, 3584, 28, 28, 4, 18944)), 7_615_616_512),
    ("qwen3-0.6b", settings("qwen3", (151936, 1024, 28, 16, 8, 3072, 128), tied=True), 596_049_920),
    ("qwen3-1.7b", settings("qwen3", (151936, 2048, 28, 16, 8, 6144, 128), tied=True), 1_720_574_976),
    ("qwen3-4b", settings("qwen3", (151936, 2560, 36, 32, 8, 9728, 128), tied=True), 4_022_468_096),
    ("qwen3-8b", settings("qwen3", (151936, 4096, 36, 32, 8, 12288, 128)), 8_190_735_360),
    ("llama3.2-1b", settings("llama", (128256, 2048, 16, 32, 8, 8192), tied=True), 1_235_814_400),
    ("llama3.2-3b", settings("llama", (128256, 3072, 28, 24, 8, 8192), tied=True), 3_212_749_824),
    ("llama3.1-8b", settings("llama", (128256, 4096, 32, 32, 8, 14336)), 8_030_261_248),
    ("smollm2-135m", settings("llama", (49152, 576, 30, 9, 3, 1536), tied=True), 134_515_008),
    ("smollm2-360m", settings("llama", (49152, 960, 32, 15, 5, 2560), tied=True), 361_821_120),
    ("smollm2-1.7b", settings("llama", (49152, 2048, 24, 32, 32, 8192), tied=True), 1_711_376_384),
    ("llama2-7b", settings("llama", (32000, 4096, 32, 32, 32, 11008)), 6_738_415_616),
    ("baichuan-7b", settings("baichuan", (64000, 4096, 32, 32, 32, 11008)), 7_000_559_616),
    ("qwen-7b", settings("qwen", (151936, 4096, 32, 32, 32, 22016)), 7_721_324_544),
]


@pytest.mark.parametrize(
    ("name", "numbers", "parameters"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_parameter_counts_are_the_published_ones_and_the_notes_say_so(
    name: str, numbers: dict[str, Any], parameters: int
) -> None:
    assert count_parameters(planned_model(numbers)).total == parameters
    notes = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))["notes"]
    assert any(
        f"{parameters / 10**exponent:.{digits}f}{unit}" in notes
        for exponent, digits, unit in ((9, 2, "B"), (9, 1, "B"), (6, 1, "M"))
    )


def estimate(
    numbers: dict[str, Any],
    sft: SftConfig,
    dtype: Dtype = Dtype.bf16,
    *,
    checkpointing: bool = False,
    config: ModelConfig | None = None,
    **work: Any,
) -> MemoryEstimate:
    """The estimate for a model of these numbers, by default of LoRA on attention in rows of 5 tokens."""
    config = config or ModelConfig(name="any", lora_targets=ATTENTION)
    work = {"max_length": 5, **work}
    return estimate_memory(
        planned_model(numbers), config, sft, Workload(**work), dtype=dtype, checkpointing=checkpointing
    )


def kept_bytes(numbers: dict[str, Any], length: int, dtype: torch.dtype, sft: SftConfig, targets: list[str]) -> int:
    """Bytes of tensors that autograd keeps in a forward pass of the decoder, weights and their copies left out."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**numbers)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if isinstance(sft, LoraConfig):
        adapters = PeftConfig(r=sft.rank, lora_dropout=sft.dropout, target_modules=targets)
        model = get_peft_model(model.to(dtype), adapters).get_base_model()
    model.train()
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned and tuple(sorted(tensor.shape)) not in shapes:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    autocast = isinstance(sft, FullConfig) and dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


WAYS: list[tuple[torch.dtype, SftConfig]] = [
    (torch.bfloat16, LoraConfig(name="lora", default_learning_rate=1e-4)),
    (torch.bfloat16, LoraConfig(name="lora", default_learning_rate=1e-4, rank=4, dropout=0.0)),
    (torch.float32, FullConfig(name="full", default_learning_rate=1e-5)),
    (torch.bfloat16, FullConfig(name="full", default_learning_rate=1e-5)),
]


@pytest.mark.parametrize(("dtype", "sft"), WAYS)
@pytest.mark.parametrize("targets", [ATTENTION, EVERY_MATRIX], ids=["attention", "all"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2"])
def test_activations_of_a_stock_block_are_what_torch_keeps(
    kind: str, targets: list[str], dtype: torch.dtype, sft: SftConfig
) -> None:
    """By the difference of two depths: the first block and what surrounds them all cancel."""
    length, names = 48, {"phi3": ["qkv_proj", "o_proj"]}.get(kind, targets)
    shallow, deep = (settings(kind, (128, 64, layers, 4, 2, 88, 16)) | {"attention_dropout": 0.0} for layers in (2, 5))
    shallow, deep = ({**numbers, "pad_token_id": 0} for numbers in (shallow, deep))
    measured = kept_bytes(deep, length, dtype, sft, names) - kept_bytes(shallow, length, dtype, sft, names)
    chosen = dataclasses.replace(sft, targets=names) if isinstance(sft, LoraConfig) else sft
    named = Dtype.bf16 if dtype is torch.bfloat16 else Dtype.fp32
    work = {"max_length": length, "compiles": True, "on_cpu": True}
    tiles_off = ModelConfig(name="any", attention=Attention.sdpa)
    found = [estimate(numbers, chosen, named, config=tiles_off, **work).activations for numbers in (deep, shallow)]
    print(kind, sft.name, dtype, names, (found[0] - found[1]) / measured)
    assert found[0] - found[1] == pytest.approx(measured, rel=0.05 if kind in KNOWN else 0.2)


def lean_model(kind: str, layers: int, dtype: torch.dtype, sft: LoraConfig) -> Any:
    """A model as `train.py` trains it, on a CPU."""
    torch.manual_seed(0)
    attention.register()
    config = AutoConfig.for_model(**settings(kind, (128, 64, layers, 4, 2, 88, 16)), attention_dropout=0.0)
    name = attention.TILED if dtype is torch.bfloat16 else "sdpa"
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)
    return prepare_for_training(model, sft, ModelConfig(name="x", lora_targets=ATTENTION)).train()


def lean_kept_bytes(model: Any, length: int) -> int:
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # Adapters in the model's dtype are kept once a layer, whatever the length.
    weights = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and tuple(sorted(tensor.shape)) not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, length, dtype=torch.long)
        out = model.get_base_model().model(input_ids=ids, use_cache=False)
    del out
    return sum(kept.values())


LEAN = [
    LoraConfig(name="lora", default_learning_rate=1e-4, rank=8, dropout=0.05, targets=t) for t in (None, EVERY_MATRIX)
]


@pytest.mark.parametrize("sft", LEAN, ids=["attention", "all"])
@pytest.mark.parametrize("way", ["fp32", "tiled"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_activations_of_a_lean_block_are_what_it_keeps(kind: str, way: str, sft: LoraConfig) -> None:
    """By the difference of two depths, to a twentieth."""
    length, dtype = 200, torch.float32 if way == "fp32" else torch.bfloat16
    shallow, deep = (lean_kept_bytes(lean_model(kind, layers, dtype, sft), length) for layers in (2, 5))
    config = ModelConfig(
        name="any",
        lora_targets=ATTENTION,
        attention=Attention.auto if way == "tiled" else Attention.sdpa,
    )
    named = Dtype.bf16 if dtype is torch.bfloat16 else Dtype.fp32
    found = [
        estimate(settings(kind, (128, 64, n, 4, 2, 88, 16)), sft, named, config=config, max_length=length, on_cpu=True)
        for n in (2, 5)
    ]
    print(kind, way, sft.targets, (found[1].activations - found[0].activations) / (deep - shallow))
    assert found[1].activations - found[0].activations == pytest.approx(deep - shallow, rel=0.05)


BY_DEFAULT = ("llama", "qwen3_moe", "granitemoehybrid")


@pytest.mark.parametrize(
    "kind", [kind if kind in BY_DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in models.MEASURED]
)
def test_the_estimate_of_a_training_is_its_measured_peak(kind: str) -> None:
    """All that torch holds at once in a step besides weights, with the LoRA targets of a model's file: 18 % either way."""
    held, found = models.measure(kind)
    assert found.activations + found.logits == pytest.approx(held, rel=0.18)


def test_a_lora_estimate_worked_out_by_hand() -> None:
    """Two blocks, h = 8, two heads of 4 on one key head, i = 16, 10 tokens in the vocabulary; 5 positions x 3 rows."""
    numbers = settings("llama", (10, 8, 2, 2, 1, 16))
    lora = LoraConfig(name="lora", default_learning_rate=1e-4, rank=2, alpha=4, dropout=0.5, targets=["q_proj"])
    found = estimate(numbers, lora, per_device_batch_size=3)
    # A block: q 64, k 32, v 32, o 64, gate, up, down 128 each, two norms 16: 592. Embeddings and head 160, norm 8.
    assert found.weights == 2 * (2 * 592 + 160 + 8)
    trained = 2 * 2 * (8 + 8)
    assert (found.trained, found.gradients, found.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    # Outputs q 8, k 4, v 4, o 8, gate 16, up 16, down 8 and attention's 8; log-sum-exp 2 x 4; adapter: input 8, rank 2, mask 8.
    block = 2 * (64 + 8) + 8 + 2 * (8 + 2) + 8
    assert found.activations == 15 * (2 * block + 2 * 2 * 8)
    assert found.logits == 15 * 10 * 16
    assert found.total == sum(asdict(found).values())
    again = estimate(numbers, lora, per_device_batch_size=3, checkpointing=True)
    assert again.activations == 15 * (2 * 16 + block + 2 * 16)
    pissa = estimate(numbers, dataclasses.replace(lora, start=LoraStart.pissa))
    assert (pissa.trained, pissa.gradients) == (2 * 4 * trained, 4 * trained)


def test_a_full_estimate_worked_out_by_hand() -> None:
    numbers = settings("llama", (10, 8, 2, 2, 1, 16))
    full = FullConfig(name="full", default_learning_rate=1e-5)
    half = estimate(numbers, full)
    assert half.weights == 2 * (2 * 576 + 80)  # matrices and the head
    assert half.trained == half.gradients == 4 * 1352
    assert half.optimizer == 8 * 1352
    whole = estimate(numbers, full, Dtype.fp32)
    assert whole.weights == 0  # what is trained computes
    shared = estimate(numbers, full, ranks=8, zero_stage=3)
    assert (shared.trained, shared.gradients, shared.optimizer) == (4 * 169, 4 * 169, 8 * 169)
    second = estimate(numbers, full, ranks=8, zero_stage=2)
    assert (second.trained, second.gradients, second.optimizer) == (4 * 1352, 4 * 169, 8 * 169)
    away = estimate(numbers, full, ranks=8, zero_stage=3, offloads_optimizer=True, offloads_weights=True)
    assert away.total == away.activations + away.logits


def test_the_old_scripts_job_fits_a_card_of_24_gigabytes() -> None:
    """7B, LoRA rank 8 on q, k, v, 2,048 tokens, checkpointing: as the original was run."""
    lora = LoraConfig(name="lora", default_learning_rate=1e-4, targets=["q_proj", "k_proj", "v_proj"])
    found = estimate(PUBLISHED[-1][1], lora, max_length=2048, checkpointing=True)
    assert 15.4e9 < found.weights < 15.5e9
    fit, line = judge(found, DeviceMemory(24_000_000_000, 24_000_000_000), "a card")
    assert fit is Fit.fits, line
    fit, line = judge(found, DeviceMemory(15_000_000_000, 16_000_000_000), "a card")
    assert fit is Fit.tight
    assert "hardly fit" in line
    fit, line = judge(found, DeviceMemory(12_000_000_000, 12_000_000_000), "a card")
    assert fit is Fit.impossible
    assert "cannot fit" in line
    assert "\n" not in line


def test_what_others_use_now_warns_and_never_refuses() -> None:
    found = MemoryEstimate(10**9, 0, 0, 0, 0, 0)
    assert judge(found, DeviceMemory(0, 10**9), "a card")[0] is Fit.tight


def test_one_line_names_every_kind() -> None:
    found = MemoryEstimate(
        weights=2_000_000_000, trained=10_000_000, gradients=0, optimizer=0, activations=500_000_000, logits=0
    )
    assert str(found) == (
        "weights 2.00 + trained 0.01 + gradients 0.00 + optimizer 0.00 + activations 0.50 + logits 0.00 = 2.51 GB"
    )
    told = f"memory: {found}; free on a card: 9.00 of 10.00 GB"
    assert judge(found, DeviceMemory(9 * 10**9, 10**10), "a card") == (Fit.fits, told)


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(ModelError, match="no memory estimate for model_type 'unheard'"):
        planned_model({"model_type": "unheard"})
    with pytest.raises(ModelError, match="hidden_size or n_embd"):
        planned_model({"model_type": "qwen", "vocab_size": 10})


def test_memory_of_this_machine_is_a_plausible_number() -> None:
    memory = device_memory(Device("cpu", "CPU", 1))
    assert 10**7 < memory.free <= memory.total < 10**14


def test_the_least_limit_of_a_job_inside_other_groups_counts(tmp_path: Path) -> None:
    """As of a job of SLURM: of version 2 the limit is in the middle, of version 1 innermost."""
    table = tmp_path / "cgroup"
    table.write_text("0::/slurm/job/step\n4:memory:/inner\n3:cpu,cpuacct:/quota\n2:cpuset:/other\n")
    limits = {
        "slurm/job/memory.max": "3000",
        "slurm/job/memory.current": "1000",
        "slurm/memory.max": "max",
        "memory/inner/memory.limit_in_bytes": "2500",
        "memory/inner/memory.usage_in_bytes": "100",
        "slurm/job/cpu.max": "250000 100000",
        "slurm/cpu.max": "max 100000",
        "cpu/quota/cpu.cfs_quota_us": "-1",
        "cpu/quota/cpu.cfs_period_us": "100000",
    }
    for name, value in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert memory_within(cgroup_folders("memory", table, tmp_path)) == DeviceMemory(2000, 2500)
    assert cpu_quotas(cgroup_folders("cpu", table, tmp_path)) == [2.5]
    assert cgroup_folders("cpu", tmp_path / "absent", tmp_path) == []


@pytest.mark.parametrize(("given", "threads"), [("1", 1), ("100000", available_cores()), ("", available_cores())])
def test_threads_are_no_more_than_the_environment_says(
    given: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    try:
        assert set_up(None).threads == threads
        assert set_up(2).threads == 2, "what is asked for is obeyed"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("layers", "embeddings", "head"), [(1, False, False), (3, True, False), (2, False, True), (1, True, True)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_freeze_trains_is_counted_as_it_is(layers: int, embeddings: bool, head: bool, tied: bool) -> None:
    sft = FreezeConfig(name="freeze", default_learning_rate=1e-5, layers=layers, embeddings=embeddings, head=head)
    numbers = settings("qwen2", (200, 64, 3, 4, 2, 96), tied=tied)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**numbers))
    trained = count_parameters(prepare_for_training(model, sft, ModelConfig(name="any"))).trained
    found = estimate(numbers, sft, Dtype.fp32, max_length=100)
    assert (found.trained, found.optimizer) == (4 * trained, 8 * trained)
    assert found.weights == 4 * (count_parameters(planned_model(numbers)).total - trained)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("double", [True, False])
def test_quantised_weights_are_counted_as_large_as_they_are(bits: int, double: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    sft = QloraConfig(name="qlora", default_learning_rate=1e-4, bits=bits, double_quantization=double)
    numbers = settings("llama", (200, 256, 2, 4, 4, 512))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**numbers)).save_pretrained(tmp_path)
    model: Any = load_model(
        ModelFiles(tmp_path, "any"),
        ModelConfig(name="any", source=ModelSource.local, path=str(tmp_path)),
        device=Device("cpu", "CPU", 1),
        dtype=torch.bfloat16,
        attention="sdpa",
        quantization=quantization_config(sft, torch.bfloat16),
    )
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        state = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        if state is not None:
            kept += state.absmax.numel() * state.absmax.element_size()
            kept += state.state2.absmax.numel() * 4 if state.nested else 0
    assert estimate(numbers, sft).weights == pytest.approx(kept, rel=0.005)
