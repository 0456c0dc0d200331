"""Training speed on whatever device there is, for models of real shapes with random weights: ours against a plain loop.

    python benchmarks/gpu.py                                  # on CUDA: 0.5B and 7B shapes, LoRA and full, packed
    python benchmarks/gpu.py --shapes tiny --steps 1          # anywhere: shows that the script runs

Conversations are random ids with lengths and labelled shares like those of real tool-call conversations (mean about 650
tokens, 42 % labelled), the same for every variant. Variants:

- `plain`: the transformers model with peft as they come, padded batches, logits of every position;
- `agentft`: packed rows, logits at labelled positions, our layers, flash attention where it is installed;
- `liger`: the same with norms, rotary positions and activations on Liger's kernels, which `model.kernels=auto` takes on
  CUDA; where they are installed;
- `compiled`: `agentft` with `torch.compile` over each block, with --compile.

Printed for each: tokens and labelled tokens a second, model FLOPs over time as a share of the device's own bf16 matrix rate
(measured here with 8192-wide matrices, not a data sheet's), peak memory. FLOPs are those that the mathematics needs:
recomputation under gradient checkpointing counts as nothing, so it lowers the share. What does not fit is said so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agentft.data.batches import Batch, collate, collate_packed, step_groups  # noqa: E402
from agentft.data.render import SpanKind  # noqa: E402
from agentft.data.tokens import IGNORE_INDEX, Example, Span  # noqa: E402
from agentft.model.adapters import prepare_for_training  # noqa: E402
from agentft.model.config import FullConfig, LoraConfig, ModelConfig  # noqa: E402
from agentft.model.fused import load_liger  # noqa: E402
from agentft.model.labelled_loss import LabelledLoss  # noqa: E402
from agentft.model.quantization import import_peft  # noqa: E402

SHAPES = {
    # hidden, layers, heads, key-value heads, inner width, vocabulary, tied head, conversations a step, checkpointing
    "tiny": (64, 2, 4, 2, 128, 512, True, 4, False),
    "0.5B": (896, 24, 14, 2, 4864, 151936, True, 32, False),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 16, True),
}
MAX_LENGTH = 2048


def conversations(count: int, vocabulary: int) -> list[Example]:
    """Random examples: log-normal lengths, alternating runs of context and of labelled tokens."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(6.3, 0.6), 64, MAX_LENGTH))
        edges = np.sort(rng.choice(np.arange(8, length), 6, replace=False))
        spans = tuple(Span(int(edges[k]), int(edges[k + 1]), SpanKind.text) for k in (0, 2, 4))
        ids = rng.integers(5, vocabulary, length).astype(np.int32)
        examples.append(Example(f"c{number}", ids, spans))
    return examples


def random_model(shape: str, device: torch.device, attention: str, dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, key_heads, inner, vocabulary, tied, _, _ = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied, use_cache=False,
        max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return Qwen2ForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)


def model_flops(model: Any, lengths: list[int], labelled: int, *, full: bool) -> float:
    """FLOPs of a step: 6 for each trained weight of a matrix and token, 4 for a frozen one; the head at labels only."""
    config = model.config
    blocks = [(p.numel(), p.requires_grad) for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    per_token = sum(size * (6 if trained else 4) for size, trained in blocks)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 7 * sum(length * length for length in lengths) * width * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size * (6 if full else 4)
    return sum(lengths) * per_token + labelled * head + attention


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids_BT, use_cache=False).logits[:, :-1].float()
    targets = batch.labels_BT[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def measure(shape: str, method: str, variant: str, device: torch.device, steps: int) -> dict[str, float]:
    from transformers.utils import is_flash_attn_2_available

    from agentft.model import adapters
    from agentft.model.fused import fuse_layers

    *_, per_step, checkpointing = SHAPES[shape]
    ours, full, cuda = variant != "plain", method == "full", device.type == "cuda"
    adapters.fuse_layers = fuse_layers if ours else lambda *_, **__: 0  # type: ignore[assignment]
    attention = "flash_attention_2" if ours and cuda and is_flash_attn_2_available() else "sdpa"
    model = random_model(shape, device, attention, torch.float32 if full else torch.bfloat16)
    sft = (FullConfig if full else LoraConfig)(name=method, default_learning_rate=1e-5)
    kernels = load_liger() if variant == "liger" else None
    model = prepare_for_training(model, sft, ModelConfig(name=shape), kernels).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not full:
            model.enable_input_require_grads()
    if variant == "compiled":
        from agentft.recipes.components import compile_blocks

        compile_blocks(model)
    objective = LabelledLoss(model, autocast=torch.bfloat16 if full else None, reads_head=ours)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    examples = conversations(per_step * (steps + 2), model.config.vocab_size)
    tokens = labelled = 0
    flops = seconds = 0.0
    for step in range(steps + 2):
        chosen = {k: examples[k] for k in range(step * per_step, (step + 1) * per_step)}
        lengths = {k: len(example) for k, example in chosen.items()}
        groups = step_groups(
            list(chosen), lengths, per_device_batch_size=4, row_tokens=4 * MAX_LENGTH if ours else None
        )
        batches = [
            collate_packed([chosen[k] for k in g]) if ours else collate([chosen[k] for k in g], 0) for g in groups
        ]
        weight = sum(batch.targets for batch in batches)
        synchronize(device)
        started = time.perf_counter()
        for batch in (batch.to(device) for batch in batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=full):
                loss = objective(batch) if ours else plain_loss(model, batch)
            (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        if step >= 2:  # the first two pay for kernels and allocations
            seconds += time.perf_counter() - started
            tokens += sum(batch.tokens for batch in batches)
            labelled += weight
            flops += model_flops(model, list(lengths.values()), weight, full=full)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "tokens": tokens / seconds, "labelled": labelled / seconds, "flops": flops / seconds, "peak": peak / 1e9,
        "loss": float(loss.detach()) / max(batch.targets, 1),
    }  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device) -> float:
    """The device's own bf16 matrix rate, FLOP a second."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize(device)
    started, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        left @ right
    synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 0.5B and 7B on CUDA, else tiny")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    arguments = parser.parse_args()
    import_peft()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    rate = matrix_rate(device)
    variants = ["plain", "agentft"]
    variants += ["liger"] * (cuda and load_liger() is not None) + ["compiled"] * arguments.compile
    print(f"{name}, torch {torch.__version__}: bf16 matrix rate {rate / 1e12:.2f} TFLOP/s", flush=True)
    for shape in arguments.shapes or (["0.5B", "7B"] if cuda else ["tiny"]):
        for method in arguments.methods:
            for variant in variants:
                try:
                    found = measure(shape, method, variant, device, arguments.steps)
                    words = (
                        f"{found['labelled']:9,.0f} labelled tokens/s {found['tokens']:9,.0f} tokens/s "
                        f"{found['flops'] / rate:5.0%} of the matrix rate {found['peak']:6.1f} GB  loss {found['loss']:.3f}"
                    )
                except torch.OutOfMemoryError:
                    words = "out of memory"
                print(f"{shape:<5} {method:<5} {variant:<9} {words}", flush=True)
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
