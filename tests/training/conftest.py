"""A tiny model and tiny conversations for the laws of training."""

from __future__ import annotations

import pytest
import torch

from agentft.data.tokens import tokenize
from agentft.model.random_weights import byte_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def examples(golden_conversations, template, encoder):
    return list(tokenize(golden_conversations.values(), template, encoder))


@pytest.fixture
def tiny_model():
    """Return a maker of tiny Llama models with equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, tied: bool = True, layers: int = 2, seed: int = 7):
        tokenizer = byte_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            use_cache=False,
            eos_token_id=tokenizer.eos_token_id,
        )
        return LlamaForCausalLM(config)

    return make
