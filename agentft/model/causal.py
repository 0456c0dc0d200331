"""A causal language model of transformers, with or without adapters: its decoder, its output head, and its logits.

Axes: B batch, T positions, N chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def causal_model(model: nn.Module) -> Any:
    """Return the transformers model under an adapter wrapper, or `model` itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def last_states(model: nn.Module, input_ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return the decoder's last hidden states, `[B, T, D]`.

    Never with a cache: transformers would drop the borders between packed conversations without a word.
    """
    states: torch.Tensor = (
        causal_model(model).get_decoder()(input_ids=input_ids_BT, use_cache=False, **arguments).last_hidden_state
    )
    return states


def output_head(model: nn.Module) -> nn.Module:
    """Return the layer that makes logits of hidden states."""
    head: nn.Module = causal_model(model).get_output_embeddings()
    return head


def stock_logits(model: nn.Module, input_ids_BT: torch.Tensor, at_N: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return the logits `[N, V]` of the model's own forward pass at positions of the flattened batch.

    Slower than the output head alone, and right where a model scales or caps what its head says. Logits are made of the
    columns that hold a chosen position, where the model can be told so.
    """
    causal, length = causal_model(model), input_ids_BT.shape[1]
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        logits_BTV: torch.Tensor = causal(input_ids=input_ids_BT, use_cache=False, **arguments).logits
        return logits_BTV.flatten(0, 1).index_select(0, at_N)
    columns, column_N = torch.unique(at_N % length, return_inverse=True)
    kept: torch.Tensor = causal(input_ids=input_ids_BT, use_cache=False, logits_to_keep=columns, **arguments).logits
    return kept.flatten(0, 1).index_select(0, at_N // length * len(columns) + column_N)
