"""Memory and communication of every engine for 7B, 14B and 72B on 1, 8 and 64 devices: the tables of docs/scaling.md.

    python benchmarks/scaling.py [--measure]

The parts of one device's memory come from `agentft.model.memory`; which of them an engine divides by the devices, and what it
sends, is said below and in docs/scaling.md.
`--measure` runs two ranks of every engine on the CPU, a small Llama in fp32, two micro-batches a step, and sets what one of
them holds and sends beside the formulae: bytes of weights and moments as the engine keeps them, and bytes written to sockets
as the system counts them (`wchar` of /proc/self/io; gloo writes nothing else).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

from agentft.model.adapters import count_parameters  # noqa: E402
from agentft.model.config import Dtype, FullConfig, LoraConfig, ModelConfig  # noqa: E402
from agentft.model.memory import MemoryEstimate, Workload, estimate_memory, planned_model  # noqa: E402

QWEN = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "7B": {
        **QWEN,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "14B": {
        **QWEN,
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 13824,
    },
    "72B": {
        **QWEN,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29568,
    },
}
"""Shapes of Qwen2.5, from the config.json of the published models."""

DEVICES = (1, 8, 64)
ENGINES = ("ddp", "zero1", "zero2", "zero3 / fsdp", "zero2_offload", "zero3_offload")
LORA = LoraConfig(name="lora", default_learning_rate=1e-4, rank=8)
FULL = FullConfig(name="full", default_learning_rate=1e-5)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LENGTH = 2048


def parts(name: str, method: str) -> tuple[Any, MemoryEstimate]:
    """Return a model without weights and what one device holds without sharing: bf16, 2,048 tokens, activations recomputed."""
    model = planned_model(MODELS[name])
    config, sft = ModelConfig(name=name, lora_targets=TARGETS), LORA if method == "lora" else FULL
    return model, estimate_memory(model, config, sft, Workload(LENGTH), dtype=Dtype.bf16, checkpointing=True)


def memory(engine: str, model: Any, whole: MemoryEstimate, devices: int) -> float:
    """Return the bytes of one device."""
    shared = {"ddp": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2}.get(engine, 3)
    masters = whole.trained / (devices if shared >= 1 else 1)
    optimizer = whole.optimizer / (devices if shared >= 1 else 1)
    gradients = whole.gradients / (devices if shared >= 2 else 1)
    weights = whole.weights / (devices if shared >= 3 else 1)
    if shared >= 3 and (devices > 1 or engine == "zero3_offload"):
        # What is gathered at a time: a block, the one fetched ahead of it, embedding and head.
        block = count_parameters(model.get_decoder().layers[0]).total
        weights += 2 * (2 * block + 2 * model.get_input_embeddings().weight.numel())
    if engine.endswith("offload"):
        optimizer = masters = 0
    if engine == "zero3_offload":
        weights -= whole.weights / devices
    return weights + masters + optimizer + gradients + whole.activations + whole.logits


def traffic(engine: str, whole: MemoryEstimate, method: str, devices: int) -> tuple[float, float]:
    """Return the bytes that one device sends in a step: at its end, and for each micro-batch."""
    ring = (devices - 1) / devices
    gradients = whole.gradients * ring
    if engine == "ddp":
        return 2 * gradients, 0.0
    # Updated weights go out as they compute: adapters in fp32, a whole model in bf16.
    updated = (whole.trained if method == "lora" else whole.weights) * ring
    if engine == "zero1":
        return gradients + updated, 0.0
    if engine in ("zero2", "zero2_offload"):
        return updated, gradients  # a shard of the gradient is all that is kept of each micro-batch
    gathered = 2 * whole.weights * ring  # once forward, once backward
    return (gradients, gathered) if method == "lora" else (0.0, gathered + gradients)


def tables() -> str:
    """Return the tables in Markdown."""
    lines = []
    for method in ("lora", "full"):
        for name in MODELS:
            model, whole = parts(name, method)
            lines += [
                "",
                f"**{name}, {method}** ({count_parameters(model).total / 1e9:.2f} billion parameters): GB of one device; "
                "GB it sends in a step + in each micro-batch",
                "",
                "| engine | " + " | ".join(f"{n} device{'s' * (n > 1)}" for n in DEVICES) + " |",
                "|---" * (len(DEVICES) + 1) + "|",
            ]
            for engine in ENGINES:
                cells = []
                for devices in DEVICES:
                    held = memory(engine, model, whole, devices) / 1e9
                    end, each = (value / 1e9 for value in traffic(engine, whole, method, devices))
                    cells.append(f"{held:,.1f}" + (f"; {end:.2f} + {each:.1f}" if devices > 1 else ""))
                lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MEASURED = {
    "ddp": "ddp",
    "deepspeed_zero1": "zero1",
    "deepspeed_zero2": "zero2",
    "deepspeed_zero3": "zero3 / fsdp",
    "fsdp": "zero3 / fsdp",
    "deepspeed_zero2_offload": "zero2_offload",
    "deepspeed_zero3_offload": "zero3_offload",
}
"""Option of the group `distributed` -> its row in the tables."""
MICRO_BATCHES = 2


def rank(payload: str) -> list[dict[str, float]]:
    """Take two steps under every engine and return what the second one held and sent."""
    import torch

    from agentft.runtime import join_world, leave_world

    torch.set_num_threads(1)
    world = join_world("cpu", 300)
    try:
        return [_one(option, method, world) for option, method in json.loads(payload)]
    finally:
        leave_world()


def _one(option: str, method: str, world: Any) -> dict[str, float]:
    import laws
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agentft.data.batches import collate
    from agentft.data.render import MsagentTemplate
    from agentft.data.tokens import SegmentEncoder
    from agentft.distributed.engines import make_engine
    from agentft.model.adapters import prepare_for_training
    from agentft.model.config import ModelConfig
    from agentft.model.labelled_loss import LabelledLoss
    from agentft.model.sources import byte_tokenizer
    from agentft.training.config import TrainingConfig
    from tests.examples import tokenize

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=4, use_cache=False, **shape))
    model = prepare_for_training(model, laws.METHODS[method], ModelConfig(name="x", lora_targets=TARGETS))
    found = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    found["trained"] = float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    engine = make_engine(
        laws.distributed(option), LabelledLoss(model), TrainingConfig(learning_rate=1e-3), world, fp16=False
    )
    template = MsagentTemplate(byte_tokenizer().eos_token)
    example = next(iter(tokenize(laws.conversations(), template, SegmentEncoder(byte_tokenizer()))))
    for _ in range(2):
        world.barrier()
        before = _written()
        for number in range(MICRO_BATCHES):
            with engine.micro_batch(last=number == MICRO_BATCHES - 1):
                engine.backward(engine.loss(collate([example], 0)))
        engine.clip(1.0)
        engine.step()
        found["sent"] = _written() - before
    return found | {f"held_{name}": float(value) for name, value in laws.held_bytes(engine).items()}


def _written() -> float:
    lines = Path("/proc/self/io").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("wchar")))


def measure() -> None:
    """Print what two ranks hold and send, over what the formulae say."""
    from agentft.distributed.config import DistributedConfig, EngineKind
    from agentft.distributed.launch import run_on_ranks

    cases = [(option, method) for option in MEASURED for method in ("lora", "full")]
    config = DistributedConfig(name="scaling", engine=EngineKind.ddp, nproc=2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks, whatever the machine has
    with tempfile.TemporaryDirectory() as folder:
        found = run_on_ranks(rank, json.dumps(cases), config, folder=folder, threads=1)
    print("| engine | method | weights, measured / formula | moments | sent in a step, MB | formula, MB |")
    print("|---" * 6 + "|")
    for (option, method), here in zip(cases, found, strict=True):
        row, trained = MEASURED[option], 4 * here["trained"]
        whole: Any = SimpleNamespace(weights=4 * here["parameters"], trained=trained, gradients=trained)
        end, each = traffic(row, whole, method, 2)
        divisor = 2 if row.startswith("zero3") else 1
        weights = here["held_weights"] / (whole.weights / divisor)
        moments = here["held_moments"] / (2 * trained / (1 if row == "ddp" else 2))
        sent, formula = here["sent"] / 1e6, (end + MICRO_BATCHES * each) / 1e6
        print(f"| {option} | {method} | {weights:.2f} | {moments:.2f} | {sent:.2f} | {formula:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    if given.measure:
        measure()
    else:
        print(tables())
