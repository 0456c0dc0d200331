"""Choose how a model attends, and compute it in two ways of our own, for training and for generation.

Training in bf16 on a CPU takes matrix products, at twice the speed of torch's kernel there: queries go in tiles, each against
the keys it may see. The weights of short rows are kept for the backward pass; of packed rows only the blocks on the diagonal
are computed.

Generation decodes a ragged batch: sequences of any length in one forward pass, their tokens end to end, each with its own KV
cache. Nothing is padded to the longest and no mask of a whole batch is built; a sequence may bring one token (decoding), a
few (drafts to be checked) or a whole prompt. What a sequence says does not depend on which others share its pass. CPU kernels
round a matrix product of few or of oddly many rows otherwise than the same rows of a larger one, so these numbers are rounded
up (`FEWEST`, `MULTIPLE`, `_BLOCK`): where the kernels allow it, completions are the same to the last bit, in bf16 too.

Axes: L layers, B batch, H query heads, G key-value heads, N = H / G, T positions, M tokens of all sequences, Q tokens of one
sequence, P positions of one sequence, D head width, W tile width, K keys seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional

from agentft.errors import EvaluationError, ModelError
from agentft.model.config import Attention
from agentft.model.labelled_loss import causal_model
from agentft.runtime import Device

log = logging.getLogger(__name__)

TILED, FLEX, RAGGED = "agentft_tiled", "agentft_flex", "agentft_ragged"
"""What transformers knows ours by."""

TILE = 128
KEEP_UP_TO = 1024
"""Longest row whose attention weights are kept for the backward pass: 9 MB a layer for 9 heads."""


class TiledCausalAttention(torch.autograd.Function):
    """softmax(scale Q K' + causal mask) V with grouped key-value heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        scale: float,
        boundaries: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the attended values, `[B, H, T, D]`; with `boundaries`, conversations start at them and see themselves."""
        batch, heads, length, width = query_BHTD.shape
        groups = key_BGTD.shape[1]
        query = (query_BHTD * scale).reshape(batch * groups, heads // groups, length, width).contiguous()
        key, value = (x.reshape(batch * groups, length, width) for x in (key_BGTD, value_BGTD))
        out = torch.empty_like(query)
        kept: list[torch.Tensor] = []
        ctx.tiles = list(tiles(boundaries or (0, length)))
        keep = max(stop - first for first, _, stop in ctx.tiles) <= KEEP_UP_TO
        for first, start, stop in ctx.tiles:
            weights = _weights(query, key, first, start, stop)
            rows = torch.bmm(weights.flatten(1, 2), value[:, first:stop])
            out[:, :, start:stop] = rows.view(*query.shape[:2], stop - start, width)
            if keep:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out.view(batch, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_BHTD = gradients[0]
        grad = grad_BHTD.reshape(query.shape)
        length, width = query.shape[2:]
        grad_query = torch.empty_like(query)
        # Tiles add up in fp32: in bf16 the sums of many tiles would lose what each of them says.
        grad_key, grad_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        for number, (first, start, stop) in enumerate(ctx.tiles):
            weights = kept[number] if kept else _weights(query, key, first, start, stop)
            rows = grad[:, :, start:stop].flatten(1, 2)
            grad_value[:, first:stop] += torch.bmm(weights.flatten(1, 2).transpose(1, 2), rows)
            grad_weights = torch.bmm(rows, value[:, first:stop].transpose(1, 2)).view_as(weights)
            # The softmax that autograd would differentiate publicly was computed without it.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).flatten(1, 2)
            tile = torch.bmm(grad_scores, key[:, first:stop])
            grad_query[:, :, start:stop] = tile.view(*query.shape[:2], stop - start, width)
            grad_key[:, first:stop] += torch.bmm(grad_scores.transpose(1, 2), query[:, :, start:stop].flatten(1, 2))
        shape_BGTD = (grad_BHTD.shape[0], -1, length, width)
        return (
            grad_query.mul_(ctx.scale).view(grad_BHTD.shape),
            grad_key.to(query.dtype).view(shape_BGTD),
            grad_value.to(query.dtype).view(shape_BGTD),
            None,
            None,
        )


def tiles(boundaries: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the first key that a tile of queries sees, its first query, and the position after its last one."""
    for first, end in pairwise(boundaries):
        for start in range(first, end, TILE):
            yield first, start, min(start + TILE, end)


def _weights(query: torch.Tensor, key: torch.Tensor, first: int, start: int, stop: int) -> torch.Tensor:
    """Return the attention weights of one tile of queries: `[B G, N, W, K]` with K = stop - first."""
    tile = query[:, :, start:stop]
    scores = torch.bmm(tile.flatten(1, 2), key[:, first:stop].transpose(1, 2)).view(*tile.shape[:3], stop - first)
    future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
    scores[..., start - first :].masked_fill_(future, -math.inf)
    return torch.softmax(scores, dim=-1)


_NOT_TILED = ("sliding_window", "softcap", "position_bias", "cache")
"""Arguments of transformers that change the mathematics."""


def tiled_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attended values, `[B, T, H, D]`, and no weights: tiled for whole causal rows in bf16, else by torch's kernels.

    Packed rows come with their boundaries (`cu_seq_lens_q`) and with the block-diagonal mask that says the same.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    boundaries = kwargs.get("cu_seq_lens_q")
    whole_rows = (
        (attention_mask is None or boundaries is not None) and query.shape[2] == key.shape[2] > 1 and not dropout
    )
    plain = all(kwargs.get(name) is None for name in _NOT_TILED) and kwargs.get("is_causal") is not False
    if not (whole_rows and plain and query.dtype == torch.bfloat16 and query.device.type == "cpu"):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    out_BHTD: torch.Tensor = TiledCausalAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, scale, None if boundaries is None else boundaries.tolist()
    )
    return out_BHTD.transpose(1, 2).contiguous(), None


def flex_or_plain(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the attended values, `[B, T, H, D]`, and no weights, as transformers calls it; masks of booleans go to SDPA.

    transformers hands such masks, which generation passes, to flex attention as numbers to add: scores would change by one.
    """
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = attention_mask is None or isinstance(attention_mask, torch.Tensor)
    forward = sdpa_attention_forward if plain else flex_attention_forward
    attended, _ = forward(module, query, key, value, attention_mask, **kwargs)
    return attended, None


def register() -> None:
    """Make both of ours known to transformers, each with the masks that torch's kernel of its kind takes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flex_attention_mask, sdpa_mask

    AttentionInterface.register(TILED, tiled_attention_forward)
    AttentionMaskInterface.register(TILED, sdpa_mask)
    AttentionInterface.register(FLEX, flex_or_plain)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


def choose_attention(requested: Attention, device: Device, dtype: torch.dtype) -> str:
    """Resolve the attention setting to a name that transformers knows, and say which `auto` took.

    Raises:
        ModelError: `flash` or `flex` was asked for and cannot run here.
    """
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    flash_fits = device.is_cuda and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available()
    taken = requested
    if requested is Attention.auto:
        on_cpu = Attention.tiled if dtype is torch.bfloat16 else Attention.sdpa
        taken = on_cpu if not device.is_cuda else Attention.flash if flash_fits else Attention.sdpa
        log.info("model.attention=auto: %s", taken)
    if taken is Attention.flash and not flash_fits:
        raise ModelError(
            "model.attention=flash needs a CUDA device, bf16 or fp16, and the package: "
            "pip install --no-build-isolation flash-attn; model.attention=auto takes the fastest that is there"
        )
    if taken is Attention.flex and not (device.is_cuda and is_torch_flex_attn_available()):
        raise ModelError(
            f"model.attention=flex needs a CUDA device, elsewhere torch has no backward pass of it; here is {device.name}; "
            "model.attention=auto takes the fastest that is there"
        )
    if taken in (Attention.tiled, Attention.flex):
        register()
    names = {Attention.flash: "flash_attention_2", Attention.tiled: TILED, Attention.flex: FLEX}
    return names.get(taken, taken.value)


def take_attention(model: torch.nn.Module, name: str) -> str:
    """Let the model compute attention as transformers knows it by `name`, and return what it takes.

    Raises:
        ValueError: transformers knows that the model cannot.
    """
    from transformers.utils import logging as transformers_logging

    causal = causal_model(model)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of what it does not set, which the caller sees
    try:
        if name in (TILED, FLEX):
            # Ours compute what torch's kernels do: not for models whose attention these cannot, with sinks or capped scores.
            causal.set_attn_implementation("sdpa")
        causal.set_attn_implementation(name)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return attention_of(causal)


def attention_of(module: Any) -> str:
    """Return the name of the implementation that a module of transformers is set to, which no public name tells."""
    return str(module.config._attn_implementation)


# --- Ragged batches of generation ---

FEWEST = 8
"""Tokens a pass has at least; what fills it up counts nothing."""

MULTIPLE = 4
"""Tokens of a pass are a multiple of this."""

_BLOCK = 32
"""Keys that a query is laid beside are a multiple of this; those after it get no weight."""


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
        from transformers import AttentionInterface

        # Without a mask function of this name transformers builds no mask.
        AttentionInterface.register(RAGGED, _ragged_attention)
        self._model = model
        self._config = model.config  # of a model with adapters that of its base
        self._layers = int(self._config.num_hidden_layers)
        self._device = next(model.parameters()).device

    def kv_cache(self, positions: int) -> KVCache:
        """Return an empty cache with room for so many tokens."""
        return KVCache(self._layers, positions)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model's layers attend to KV caches, whether their class follows the name or not; then as before."""
        before = self._config._attn_implementation
        self._config._attn_implementation = RAGGED
        try:
            yield
        finally:
            self._config._attn_implementation = before

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
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
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
