"""Memory of every model of `conf/model`: the table of docs/models.md, and the estimate beside what torch holds at its peak.

    python benchmarks/models.py              # the table, into docs/models.md
    python benchmarks/models.py --measure    # small shapes trained on the CPU, into benchmarks/models.md

The table is `agentft.model.memory` over the published shapes: bf16, rank 8, one conversation of 4,096 tokens, activations
recomputed, with the LoRA targets of the model's file. No weights are made.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from agentft.config import conf_dir
from agentft.data.batches import Batch
from agentft.model import attention
from agentft.model.adapters import count_parameters, prepare_for_training
from agentft.model.attention import take_attention
from agentft.model.config import Dtype, LoraConfig, ModelConfig, QloraConfig
from agentft.model.labelled_loss import LabelledLoss
from agentft.model.memory import MemoryEstimate, Workload, estimate_memory, planned_model

ROOT = Path(__file__).resolve().parent.parent
DOCS, PAGE = ROOT / "docs" / "models.md", Path(__file__).resolve().with_suffix(".md")
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
ANY = {"auto", "tiny"}
"""Any model, and random weights."""

LENGTH = 4096
LORA = LoraConfig(name="lora", default_learning_rate=1e-4)
QLORA = QloraConfig(name="qlora", default_learning_rate=1e-4)

Shape = dict[str, Any]


def dense(
    kind: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, inner: int, head: int = 0, **more: Any
) -> Shape:
    """Return the settings of a decoder of one kind of layer."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = (vocab, hidden, layers, heads, kv)
    given = dict(zip(names, values, strict=True)) | {"intermediate_size": inner, "tie_word_embeddings": False}
    return {"model_type": kind, **given, **({"head_dim": head} if head else {}), **more}


TIED: Shape = {"tie_word_embeddings": True}


def qwen3_5(hidden: int, inner: int, layers: int, heads: int, kv: int, delta_heads: int, **more: Any) -> Shape:
    given = dense("qwen3_5_text", 248_320, hidden, layers, heads, kv, inner, 256, **more)
    return given | {"linear_num_value_heads": delta_heads, "linear_num_key_heads": 16}


def kinds(layers: int, attention: tuple[int, ...], other: str) -> list[str]:
    """Return each layer's kind; full attention stands at these places."""
    return ["full_attention" if number in attention else other for number in range(layers)]


def lfm2(hidden: int, inner: int, heads: int) -> Shape:
    given = dense("lfm2", 65_536, hidden, 16, heads, 8, inner, **TIED)
    return given | {"layer_types": kinds(16, (2, 5, 8, 10, 12, 14), "conv")}


def granite(hidden: int, inner: int, heads: int, kv: int, shared: int, experts: int, active: int) -> Shape:
    given = dense("granitemoehybrid", 100_352, hidden, 40, heads, kv, inner, **TIED)
    mixers = {"mamba_n_heads": hidden * 2 // 64, "mamba_d_state": 128}
    return (
        given
        | mixers
        | {
            "num_local_experts": experts,
            "num_experts_per_tok": active,
            "shared_intermediate_size": shared,
            "layer_types": kinds(40, (5, 15, 25, 35), "linear_attention"),
        }
    )


def nemotron(hidden: int, inner: int, heads: int, kv: int, mamba: tuple[int, int], pattern: str, **more: Any) -> Shape:
    """`pattern` has a letter for each layer: M Mamba-2, - MLP, E experts, * attention."""
    mixers = {"mamba_num_heads": mamba[0], "mamba_head_dim": mamba[1], "n_groups": 8, "ssm_state_size": 128}
    given = {"model_type": "nemotron_h", "hidden_size": hidden, "intermediate_size": inner}
    given |= {"num_attention_heads": heads, "num_key_value_heads": kv, "hybrid_override_pattern": pattern}
    return given | mixers | more


def gemma4(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> Shape:
    given = {"model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": inner, "head_dim": 256}
    return given | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


QWEN3_4B = dense("qwen3", 151_936, 2560, 36, 32, 8, 9728, 128, **TIED)
QWEN3_30B: Shape = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "num_experts": 128}
LLAMA_8B = dense("llama", 128_256, 4096, 32, 32, 8, 14336)
QWEN2_7B = dense("qwen2", 152_064, 3584, 28, 28, 4, 18944)
QWEN3_5_27B = qwen3_5(5120, 17408, 64, 24, 4, 48)
QWEN_7B: Shape = {"seq_length": 8192} | dense("qwen", 151_936, 4096, 32, 32, 32, 22016)

SHAPES: dict[str, Shape] = {
    "baichuan-7b": dense("baichuan", 64_000, 4096, 32, 32, 32, 11008, max_position_embeddings=4096),
    "devstral-small-2507": dense("mistral", 131_072, 5120, 40, 32, 8, 32768, 128),
    "gemma3-1b": dense("gemma3_text", 262_144, 1152, 26, 4, 1, 6912, 256, sliding_window=512, **TIED),
    "gemma3-4b": dense("gemma3_text", 262_208, 2560, 34, 8, 4, 10240, 256, sliding_window=1024, **TIED),
    "gemma3-12b": dense("gemma3_text", 262_208, 3840, 48, 16, 8, 15360, 256, sliding_window=1024, **TIED),
    "gemma4-e2b": gemma4(
        1536,
        6144,
        35,
        8,
        1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
    ),
    "gemma4-e4b": gemma4(2560, 10240, 42, 8, 2, num_kv_shared_layers=18),
    "gemma4-26b-a4b": gemma4(
        2816,
        2112,
        30,
        16,
        8,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        enable_moe_block=True,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=1024,
    ),
    "glm4-9b-0414": {"model_type": "glm4"},
    "glm4.7-flash": {"model_type": "glm4_moe_lite"},
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "granite4-micro": dense("granitemoehybrid", 100_352, 2560, 40, 40, 8, 8192, **TIED)
    | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 8192}
    | {"layer_types": ["full_attention"] * 40},
    "granite4-h-micro": granite(2048, 8192, 32, 8, 8192, 0, 0),
    "granite4-h-tiny": granite(1536, 512, 12, 4, 1024, 64, 6),
    "lfm2-350m": lfm2(1024, 6656, 16),
    "lfm2-1.2b": lfm2(2048, 12288, 32),
    "lfm2.5-1.2b": lfm2(2048, 12288, 32),
    "lfm2-8b-a1b": {
        "model_type": "lfm2_moe",
        "num_hidden_layers": 24,
        "layer_types": kinds(24, (2, 6, 10, 14, 18, 21), "conv"),
    },
    "ministral3-3b": dense("ministral3", 131_072, 3072, 26, 32, 8, 9216, **TIED),
    "ministral3-8b": dense("ministral3", 131_072, 4096, 34, 32, 8, 14336),
    "mistral-small-3.2-24b": dense("mistral", 131_072, 5120, 40, 32, 8, 32768, 128),
    "llama2-7b": dense("llama", 32_000, 4096, 32, 32, 32, 11008),
    "llama3.1-8b": LLAMA_8B,
    "llama3.2-1b": dense("llama", 128_256, 2048, 16, 32, 8, 8192, **TIED),
    "llama3.2-3b": dense("llama", 128_256, 3072, 28, 24, 8, 8192, **TIED),
    "llama3.3-70b": dense("llama", 128_256, 8192, 80, 64, 8, 28672),
    "modelscope-agent-7b": QWEN_7B,
    "nemotron-nano-9b-v2": nemotron(
        4480, 15680, 40, 8, (128, 80), "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    ),
    "nemotron3-nano-30b-a3b": nemotron(
        2688,
        1856,
        32,
        2,
        (64, 64),
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
    ),
    "phi4": dense("phi3", 100_352, 5120, 40, 40, 10, 17920, pad_token_id=0),
    "phi4-mini": dense("phi3", 200_064, 3072, 32, 24, 8, 8192, pad_token_id=0, **TIED),
    "qwen-7b": QWEN_7B,
    "qwen2.5-0.5b": dense("qwen2", 151_936, 896, 24, 14, 2, 4864, **TIED),
    "qwen2.5-1.5b": dense("qwen2", 151_936, 1536, 28, 12, 2, 8960, **TIED),
    "qwen2.5-3b": dense("qwen2", 151_936, 2048, 36, 16, 2, 11008, **TIED),
    "qwen2.5-7b": QWEN2_7B,
    "qwen3-0.6b": dense("qwen3", 151_936, 1024, 28, 16, 8, 3072, 128, **TIED),
    "qwen3-1.7b": dense("qwen3", 151_936, 2048, 28, 16, 8, 6144, 128, **TIED),
    "qwen3-4b": QWEN3_4B,
    "qwen3-4b-instruct-2507": QWEN3_4B,
    "qwen3-4b-thinking-2507": QWEN3_4B,
    "qwen3-8b": dense("qwen3", 151_936, 4096, 36, 32, 8, 12288, 128),
    "qwen3-30b-a3b-instruct-2507": QWEN3_30B,
    "qwen3-30b-a3b-thinking-2507": QWEN3_30B,
    "qwen3-coder-30b-a3b": QWEN3_30B,
    "qwen3.5-0.8b": qwen3_5(1024, 3584, 24, 8, 2, 16, **TIED),
    "qwen3.5-2b": qwen3_5(2048, 6144, 24, 8, 2, 16, **TIED),
    "qwen3.5-4b": qwen3_5(2560, 9216, 32, 16, 4, 32, **TIED),
    "qwen3.5-9b": qwen3_5(4096, 12288, 32, 16, 4, 32),
    "qwen3.5-27b": QWEN3_5_27B,
    "qwen3.5-35b-a3b": {"model_type": "qwen3_5_moe_text"},
    "qwen3.6-27b": QWEN3_5_27B,
    "qwen3.6-35b-a3b": {"model_type": "qwen3_5_moe_text"},
    "r1-distill-llama-8b": LLAMA_8B,
    "r1-distill-qwen-1.5b": dense("qwen2", 151_936, 1536, 28, 12, 2, 8960),
    "r1-distill-qwen-7b": QWEN2_7B,
    "smollm2-135m": dense("llama", 49_152, 576, 30, 9, 3, 1536, **TIED),
    "smollm2-360m": dense("llama", 49_152, 960, 32, 15, 5, 2560, **TIED),
    "smollm2-1.7b": dense("llama", 49_152, 2048, 24, 32, 32, 8192, **TIED),
    "smollm3-3b": {"model_type": "smollm3"},
}
"""Published shapes of the text parts; of an empty one transformers' defaults are the published values."""


def model_files() -> dict[str, dict[str, Any]]:
    """Return the settings in each file of `conf/model` by its name."""
    return {
        path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((conf_dir() / "model").glob("*.yaml"))
    }


# --- The table of docs/models.md ---


def estimate(name: str, file: Mapping[str, Any], sft: LoraConfig, parameters: float) -> MemoryEstimate:
    """Estimate a fine-tuning on one GPU; what the model holds beside its text part is frozen too."""
    config = ModelConfig(**{key: value for key, value in file.items() if key in ("name", "lora_targets", "context")})
    model = planned_model(SHAPES[name])
    work = Workload(LENGTH)
    found = estimate_memory(model, config, sft, work, dtype=Dtype.bf16, checkpointing=True)
    beside = max(0, round(parameters - count_parameters(model).total))
    # A rounded number of the file is no difference.
    return replace(found, weights=found.weights + 2 * beside) if beside > parameters / 100 else found


def row(name: str, file: Mapping[str, Any]) -> str:
    """Return a model's line of the table."""
    notes = file["notes"]
    size, unit, active = re.search(r"([\d.]+)([BM]) parameters(?:, ([\d.]+)B active)?", notes).groups()
    thinks = next((word for words, word in THINKS.items() if words in notes), "no")
    parameters = float(size) * (1e9 if unit == "B" else 1e6)
    shown = f"{parameters / 1e9:.3g}" + (f" ({float(active):.3g} active)" if active else "")
    cells = [f"`{name}`", shown, f"{file['context']:,}", thinks]
    for sft in (LORA, QLORA):
        cells.append(f"{estimate(name, file, sft, parameters).total / 1e9:.1f}" if name in SHAPES else "not estimated")
    return f"|{'|'.join(cells)}|"


THINKS = {
    "Thinks always": "always",
    "Thinks by default": "default",
    "Thinks on request": "request",
    "not looked up": "unknown",
}
"""Words of a file's notes -> of the table."""


def table() -> str:
    head = "|`model=`|B parameters|context|thinks|LoRA GB|QLoRA GB|\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(name, file)}\n" for name, file in model_files().items() if name not in ANY)


# --- The estimate beside the measured peak ---

SMALL: Shape = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "pad_token_id": 0,
}
EXPERTS: Shape = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MEASURED: dict[str, tuple[str, Shape]] = {
    "llama": ("llama3.2-1b", {}),
    "qwen3_moe": ("qwen3-30b-a3b-instruct-2507", {**EXPERTS, "head_dim": 16, "num_experts": 8}),
    "gpt_oss": (
        "gpt-oss-20b",
        {
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
        },
    ),
    "qwen3_5_text": (
        "qwen3.5-4b",
        {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": kinds(8, (3, 7), "linear_attention")},
    ),
    "lfm2": ("lfm2.5-1.2b", {"block_auto_adjust_ff_dim": False, "layer_types": kinds(8, (2, 5), "conv")}),
    "granitemoehybrid": (
        "granite4-h-micro",
        {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 88, "mamba_n_heads": 8}
        | {"mamba_d_head": 16, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 64}
        | {"layer_types": kinds(8, (3, 7), "linear_attention")},
    ),
    "gemma3_text": ("gemma3-1b", {"head_dim": 16, "sliding_window": 64}),
    "phi3": ("phi4", {}),
    "glm4": ("glm4-9b-0414", {"head_dim": 16}),
}
"""Architecture -> the file whose LoRA targets it takes, and what its small shape has besides."""


def measure(kind: str, length: int = 600, dtype: torch.dtype = torch.bfloat16) -> tuple[int, MemoryEstimate]:
    """Train a small shape as `train.py` does on a CPU and return (bytes held at the peak besides weights, the estimate)."""
    name, more = MEASURED[kind]
    config = ModelConfig(name=name, lora_targets=model_files()[name].get("lora_targets") or TARGETS)
    settings = {"model_type": kind, **SMALL, **more}
    torch.manual_seed(0)
    attention.register()
    # gpt-oss has no other attention than its own.
    form = "eager" if kind == "gpt_oss" else attention.TILED if dtype is torch.bfloat16 else "sdpa"
    hf_config = transformers.AutoConfig.for_model(**settings)
    model: Any = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="eager")
    take_attention(model, form)
    held = held_in_a_step(LabelledLoss(prepare_for_training(model, LORA, config).train()), length)
    work = Workload(length, on_cpu=True)
    named = Dtype.bf16 if dtype is torch.bfloat16 else Dtype.fp32
    found = estimate_memory(planned_model(settings), config, LORA, work, dtype=named, checkpointing=False)
    return held, found


def held_in_a_step(objective: LabelledLoss, length: int) -> int:
    """Return the bytes that torch holds at once besides weights in a step of one conversation of `length` tokens."""
    ids = torch.arange(length)[None] % 128
    batch = Batch(ids=("a",), input_ids_BT=ids, labels_BT=ids, tokens=length, targets=length - 1, weight=length - 1)
    objective(batch).backward()  # what is made once is made
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective(batch).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


TARGETS = ModelConfig(name="any").lora_targets


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if sys.argv[1:] == ["--measure"]:
        lines = []
        for kind, dtype in itertools.product(MEASURED, (torch.bfloat16, torch.float32)):
            held, found = measure(kind, dtype=dtype)
            counted = found.activations + found.logits
            cells = (kind, str(dtype)[6:], f"{held / 1e6:.2f}", f"{counted / 1e6:.2f}", f"{counted / held:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
        PAGE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n")
        return
    before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


HEAD = """# The estimate of memory beside the measured peak

Written by `python benchmarks/models.py --measure`. Small shapes with random weights, 8 layers, hidden width 64, transformers
{version}, trained on a CPU with LoRA of rank 8 on the targets of the model's file, one row of 600 tokens, no checkpointing.
Measured: what torch holds at its peak in a step besides weights, adapters and their gradients. Estimated: activations and
logits of `agentft/model/memory.py`.

| architecture | numbers | measured MB | estimated MB | ratio |
| --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    main()
