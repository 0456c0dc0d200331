"""A small Llama with seeded random weights and a byte-level tokenizer, made in milliseconds: for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentft.model.config import RandomShape
from agentft.model.shards import save_model

SEED = 20260101
"""Seed of the weights, fixed so that every machine makes the same model."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<|startofthink|>", "<|endofthink|>", "<|startofexec|>", "<|endofexec|>")


def byte_tokenizer() -> Any:
    """Return a fast tokenizer: one token a byte, and one each for JSON's commonest pairs and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def random_folder(shape: RandomShape, context: int, folder: Path) -> None:
    """Write weights, config and tokenizer of a random model of the given shape into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(shape.heads // 2, 1),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
