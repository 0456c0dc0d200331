"""A task that a small model learns to solve in seconds, tool calls and all: for measuring searches, not models.

Four tools of a house and three levels are asked for in made-up words, a few common and many rare ones. A base model learns
the form of a call and the common words once, in full, from random weights; what a search then trains is the rest of the
vocabulary. Scores lie between chance and all right, and rise with data, steps and a fitting learning rate.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from agentft.config import compose, to_train_config
from agentft.recipes.train import train

TOOLS = ("light", "heat", "music", "door")
LEVELS = ("more", "less", "none")
COMMON = 4
"""Words of each tool and level that the base model knows."""
RARE = {"tool": 30, "level": 15}
"""Words of each that it does not."""
FORMS = ("{0} the {1}.", "Please {0} the {1}.", "Could you {0} the {1}?", "{0} that {1} now!", "I would {0} the {1}.")
OFFERED = 3
"""Tools in a system text."""
ANSWER = (
    '<|startofthink|>```JSON\n{}\n```<|endofthink|>\n\n<|startofexec|>```JSON\n{{"ok": 1}}\n```<|endofexec|>\nDone.'
)
SETTINGS = [
    *("model=auto", "model.source=local", "model.dtype=fp32", "tracking=disabled", "dataset=local", "threads=1"),
    *(
        "dataset.max_length=512",
        "training.gradient_accumulation_steps=1",
        "training.save_steps=0",
        "evaluation.before=false",
    ),
    *(
        "evaluation.best_metric=loss",
        "evaluation.eval_steps=100000",
        "evaluation.batch=64",
        "evaluation.max_new_tokens=60",
    ),
    *("evaluation.bootstrap_samples=10", "evaluation.examples=0", "sft_type=full"),
]


def vocabulary() -> dict[str, list[str]]:
    """Tool or level -> its words, the common ones first; no word has two meanings."""
    rng = random.Random("vocabulary")
    drawn: set[str] = set()
    words = {}
    for name in (*TOOLS, *LEVELS):
        own: list[str] = []
        while len(own) < COMMON + RARE["tool" if name in TOOLS else "level"]:
            word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
            if word not in drawn:
                drawn.add(word)
                own.append(word)
        words[name] = own
    return words


def conversation(rng: random.Random, *, rare: bool) -> list[dict[str, str]]:
    """One request and its call, in common words or in rare ones, of which few are frequent, as in any language."""
    offered = rng.sample(TOOLS, OFFERED)
    tool, level = rng.choice(offered), rng.choice(LEVELS)
    noun, verb = (_word(rng, WORDS[name], rare=rare) for name in (tool, level))
    request = rng.choice(FORMS).format(verb, noun)
    schemas = " ".join(json.dumps({"name": name, "parameters": [{"name": "to"}]}) for name in offered)
    call = json.dumps({"api_name": tool, "parameters": {"to": level}})
    return [
        {"from": "system", "value": f"Plugins: {schemas}"},
        {"from": "user", "value": request[0].upper() + request[1:]},
        {"from": "assistant", "value": ANSWER.format(call)},
    ]


def _word(rng: random.Random, words: list[str], *, rare: bool) -> str:
    if not rare:
        return rng.choice(words[:COMMON])
    return rng.choices(words[COMMON:], [(k + 1) ** -1.3 for k in range(len(words) - COMMON)])[0]


WORDS = vocabulary()


def write_data(folder: Path, name: str, counts: tuple[int, int], *, rare: bool) -> tuple[Path, Path]:
    """Write `<name>.jsonl` and `<name>-heldout.jsonl` with so many conversations, all different; return their paths."""
    rng = random.Random(name)
    drawn: dict[str, list[dict[str, str]]] = {}
    while len(drawn) < sum(counts):
        turns = conversation(rng, rare=rare)
        drawn.setdefault(json.dumps(turns), turns)
    records = [
        json.dumps({"id": f"{name}-{i}", "conversations": turns}) + "\n" for i, turns in enumerate(drawn.values())
    ]
    paths = (folder / f"{name}.jsonl", folder / f"{name}-heldout.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (records[: counts[0]], records[counts[0] :]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def base_model(folder: Path) -> Path:
    """A Llama of 0.4 million parameters that knows the common words; made once, in about half a minute."""
    run = folder / "base"
    if not (run / "final" / "config.json").exists():
        random_model(folder / "random")
        data, heldout = write_data(folder, "base-words", (600, 60), rare=False)
        settings = [f"model.id={folder / 'random'}", f"dataset.path={data}", f"dataset.test_path={heldout}"]
        steps = [
            "training.per_device_batch_size=4",
            "training.epochs=6",
            "training.learning_rate=2e-3",
            f"run_dir={run}",
        ]
        with contextlib.redirect_stderr(io.StringIO()):  # the table of the exam
            result = train(
                to_train_config(compose("train", [*SETTINGS, *settings, *steps, "dataset.span_weights.call=4"]))
            )
        print(f"base model: arg_f1 {result.objective:.3f} on the words it was taught", flush=True)
    return run / "final"


def random_model(folder: Path) -> None:
    """Random weights, and a tokenizer made for these conversations: about a hundred tokens each."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = random.Random("tokenizer")
    texts = [turn["value"] for i in range(4000) for turn in conversation(rng, rare=i % 2 == 0)]
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [*texts, *(f" {word}" for words in WORDS.values() for word in words * 20)],
        trainers.BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
