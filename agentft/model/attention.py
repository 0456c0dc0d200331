"""Choose how a model attends, and compute it in bf16 on a CPU by matrix products, at twice the speed of torch's kernel there.

Queries are taken in tiles, each against the keys it may see, so every product is a plain batched one. The weights of short
rows are kept for the backward pass; of packed rows only the blocks on the diagonal are computed.

Axes: B batch, H query heads, G key-value heads, N = H / G, T positions, D head width, W tile width, K keys seen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from agentft.errors import ModelError
from agentft.model.config import Attention
from agentft.model.labelled_loss import causal_model
from agentft.runtime import Device

log = logging.getLogger(__name__)

TILED, FLEX = "agentft_tiled", "agentft_flex"
"""What transformers knows the two of ours by."""

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


@contextmanager
def attention_set_to(name: str, hf_config: Any) -> Iterator[None]:
    """Let modules with this config attend by another implementation, whether their class follows its name or not."""
    before = hf_config._attn_implementation
    hf_config._attn_implementation = name
    try:
        yield
    finally:
        hf_config._attn_implementation = before
