"""Decode a ragged batch: sequences of any length in one forward pass, their tokens end to end, each with its own KV cache.

Nothing is padded to the longest sequence and no mask of a whole batch is built; a sequence may bring one token (decoding),
a few (drafts to be checked) or a whole prompt. What a sequence says does not depend on which others share its pass. CPU
kernels round a matrix product of few or of oddly many rows otherwise than the same rows of a larger one, so these numbers
are rounded up (`FEWEST`, `MULTIPLE`, `_BLOCK`): where the kernels allow it, completions are the same to the last bit, in
bf16 too.

Axes: L layers, H query heads, G key-value heads, N = H / G, M tokens of all sequences, Q tokens of one sequence, P positions
of one sequence, D head width, W tile width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from agentft.errors import EvaluationError
from agentft.model.attention import attention_set_to

NAME = "agentft_ragged"
"""The name of the attention in transformers."""

FEWEST = 8
"""Tokens a pass has at least; what fills it up counts nothing."""

MULTIPLE = 4
"""Tokens of a pass are a multiple of this."""

_BLOCK = 32
"""Keys that a query is laid beside are a multiple of this; those after it get no weight."""

_TILE = 128


class KVCache:
    """Keys and values of one sequence, `[L, G, P, D]` each; room for `positions` is taken at the first use."""

    def __init__(self, layers: int, positions: int) -> None:
        self._layers = layers
        self._positions = _up(positions, _BLOCK)
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor

    def copy(self, other: KVCache, length: int) -> None:
        """Begin with the first `length` positions of another cache."""
        if length == 0 or other.keys is None:
            return
        self._allocate(other.keys[0])
        assert self.keys is not None
        self.keys[:, :, :length] = other.keys[:, :, :length]
        self.values[:, :, :length] = other.values[:, :, :length]

    def put(self, layer: int, start: int, keys_GQD: torch.Tensor, values_GQD: torch.Tensor) -> None:
        """Write what new tokens from position `start` on bring to a layer."""
        if self.keys is None:
            self._allocate(keys_GQD)
        assert self.keys is not None
        stop = start + keys_GQD.shape[1]
        self.keys[layer, :, start:stop] = keys_GQD
        self.values[layer, :, start:stop] = values_GQD

    def _allocate(self, like_GPD: torch.Tensor) -> None:
        heads, _, width = like_GPD.shape
        # Zeros: positions not yet written get no weight, and no weight times anything finite is nothing.
        self.keys = like_GPD.new_zeros(self._layers, heads, self._positions, width)
        self.values = torch.zeros_like(self.keys)


@dataclass(frozen=True, slots=True)
class RaggedSequence:
    """New tokens of one sequence of the batch."""

    cache: KVCache
    position: int
    """Of the first new token; the cache is whole before it."""
    ids: Sequence[int]
    wanted: Sequence[int]
    """New tokens whose next token is predicted, as indices into `ids`."""


@dataclass(slots=True)
class _Pass:
    """What the attention of every layer reads; handed through the model as a keyword."""

    sequences: Sequence[RaggedSequence]
    layers: set[int] = field(default_factory=set)
    """Layers whose attention came here."""


class RaggedModel:
    """A causal language model of transformers that predicts the next token of every sequence of a ragged batch."""

    def __init__(self, model: Any) -> None:
        _register()
        self._model = model
        self._config = model.config  # of a model with adapters that of its base
        self._layers = int(self._config.num_hidden_layers)
        self._device = next(model.parameters()).device

    def kv_cache(self, positions: int) -> KVCache:
        """Return an empty cache with room for so many tokens."""
        return KVCache(self._layers, positions)

    def attached(self) -> AbstractContextManager[None]:
        """Let the model's layers attend to KV caches; afterwards they attend as before."""
        return attention_set_to(NAME, self._config)

    def next_ids(self, sequences: Sequence[RaggedSequence]) -> list[list[int]]:
        """Run one forward pass and return the likeliest next token after each wanted one, by sequence; see `logits`."""
        flat = iter(self.logits(sequences).argmax(-1).tolist())
        return [[next(flat) for _ in sequence.wanted] for sequence in sequences]

    def logits(self, sequences: Sequence[RaggedSequence]) -> torch.Tensor:
        """Run one forward pass and return the logits after each wanted token, one sequence after the other, `[N, V]`.

        Raises:
            EvaluationError: the model does not compute its attention through transformers' interface.
        """
        ids = [token for sequence in sequences for token in sequence.ids]
        positions = [each.position + offset for each in sequences for offset in range(len(each.ids))]
        starts = _starts(sequences)
        keep = [start + offset for start, each in zip(starts, sequences, strict=True) for offset in each.wanted]
        filling = _filling(len(ids))
        at = _Pass(sequences)
        output = self._model(
            input_ids=torch.tensor([ids + [0] * filling], device=self._device),
            position_ids=torch.tensor([positions + [0] * filling], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep + keep[-1:] * _filling(len(keep)), device=self._device),
            agentft_pass=at,
        )
        if len(at.layers) != self._layers:
            raise EvaluationError(
                f"{type(self._model).__name__} computes attention in a way of its own in "
                f"{self._layers - len(at.layers)} of {self._layers} layers, so agentft cannot generate with it; "
                "serve it and evaluate with evaluation.engine=openai"
            )
        logits: torch.Tensor = output.logits[0, : len(keep)]
        return logits


def _attend_fused(
    query_HQD: torch.Tensor,
    keys_GPD: torch.Tensor,
    values_GPD: torch.Tensor,
    position: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Return the attended values `[H, Q, D]` of new tokens from `position` on, by torch's own kernels.

    Keys and values are those of all positions, theirs included; what stands after them may be anything finite. A token
    sees `window` positions up to its own; None: all.
    """
    length = query_HQD.shape[1]
    stop = position + length
    sees_all = length == 1 and window is None
    out_1HQD = functional.scaled_dot_product_attention(
        query_HQD[None],
        keys_GPD[None, :, :stop],
        values_GPD[None, :, :stop],
        attn_mask=None if sees_all else _seen(position, stop, stop, window, query_HQD.device),
        scale=scale,
        enable_gqa=query_HQD.shape[0] != keys_GPD.shape[0],
    )
    return out_1HQD[0]


def _attend_by_products(
    query_HQD: torch.Tensor,
    keys_GPD: torch.Tensor,
    values_GPD: torch.Tensor,
    position: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Return the same by plain products: torch's CPU kernel copies keys for every query head, and is slow in bf16."""
    heads, length, width = query_HQD.shape
    groups = keys_GPD.shape[0]
    query = (query_HQD * scale).view(groups, heads // groups, length, width)
    out = torch.empty_like(query)
    for start in range(0, length, _TILE):
        stop = min(start + _TILE, length)
        shape = (groups, heads // groups, stop - start, -1)
        rows = heads // groups * (stop - start)
        last = min(_up(position + stop, _BLOCK), keys_GPD.shape[1])
        tile = functional.pad(query[:, :, start:stop].flatten(1, 2), (0, 0, 0, _filling(rows)))
        scores = torch.bmm(tile, keys_GPD[:, :last].transpose(1, 2))
        if length == 1 and window is None:
            scores[..., position + 1 :] = -math.inf
        else:
            hidden = ~_seen(position + start, position + stop, last, window)
            scores[:, :rows].view(shape).masked_fill_(hidden, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        out[:, :, start:stop] = torch.bmm(weights, values_GPD[:, :last])[:, :rows].view(shape)
    return out.view(heads, length, width)


def _seen(
    start: int, stop: int, positions: int, window: int | None, device: torch.device | None = None
) -> torch.Tensor:
    """Return which of `positions` the tokens at `start` to `stop` see, `[stop - start, positions]`."""
    own = torch.arange(start, stop, device=device)[:, None]
    other = torch.arange(positions, device=device)[None, :]
    seen = other <= own
    return seen if window is None else seen & (other > own - window)


def _filling(rows: int) -> int:
    """Return how many rows a product of `rows` rows is filled up with."""
    return _up(max(rows, FEWEST), MULTIPLE) - rows


def _up(number: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


def _starts(sequences: Sequence[RaggedSequence]) -> list[int]:
    return [0, *accumulate(len(sequence.ids) for sequence in sequences)][:-1]


_REFUSED = ("softcap", "position_bias", "s_aux", "sinks")
"""Arguments of transformers that change the mathematics in ways that are not computed here."""


def _ragged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    agentft_pass: _Pass | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, `[1, H, M, D]` -> `[1, M, H, D]`: every sequence beside its own KV cache."""
    odd = [name for name in _REFUSED if kwargs.get(name) is not None]
    if agentft_pass is None or odd:
        raise EvaluationError(
            f"{type(module).__name__}: agentft cannot generate with this attention ({', '.join(odd)})"
        )
    layer = int(module.layer_idx)
    agentft_pass.layers.add(layer)
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    attend = _attend_by_products if query.device.type == "cpu" else _attend_fused
    out_HMD = torch.zeros_like(query[0])
    for sequence, start in zip(agentft_pass.sequences, _starts(agentft_pass.sequences), strict=True):
        new = slice(start, start + len(sequence.ids))
        sequence.cache.put(layer, sequence.position, key[0, :, new], value[0, :, new])
        assert sequence.cache.keys is not None
        out_HMD[:, new] = attend(
            # Where the last blocks alone are trained those are fp32, and a cache is of one dtype.
            query[0, :, new].to(sequence.cache.keys.dtype),
            sequence.cache.keys[layer],
            sequence.cache.values[layer],
            sequence.position,
            scale,
            sliding_window,
        )
    return out_HMD.transpose(0, 1)[None].contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface

    # Without a mask function of this name transformers builds no mask.
    AttentionInterface.register(NAME, _ragged_attention)
