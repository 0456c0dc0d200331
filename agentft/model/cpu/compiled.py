"""Run parts of a decoder on a frozen model, forward and backward, by the compiled functions of `native.py`.

Each is one step of autograd that keeps only what its gradient needs. `fused.py` decides which layers take them.

Axes: B batch, T positions, G key-value heads, N query heads in each, D head width, I input width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from agentft.model.cpu.attention import KEEP_UP_TO, tiles
from agentft.model.cpu.native import Kernels


class CompiledRmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w with w frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_I: torch.Tensor, epsilon: float, kernels: Kernels) -> torch.Tensor:
        """Return y in the shape of x."""
        x = x.contiguous()
        y, rate = kernels.rms_norm(x, weight_I, epsilon)
        ctx.save_for_backward(x, weight_I, rate)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_I, rate = ctx.saved_tensors
        return ctx.kernels.rms_norm_back(gradients[0].contiguous(), x, weight_I, rate), None, None, None


class CompiledGatedMlp(torch.autograd.Function):
    """y = (silu(x G') * (x U')) D' with G, U and D frozen; kept are gate and up."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, kernels: Kernels
    ) -> torch.Tensor:
        """Return y in the shape of x."""
        rows = x.reshape(-1, x.shape[-1])
        opened, lifted = functional.linear(rows, gate), functional.linear(rows, up)
        y = functional.linear(kernels.gated_silu(opened, lifted), down)
        ctx.save_for_backward(opened, lifted, gate, up, down)
        ctx.kernels = kernels
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        opened, lifted, gate, up, down = ctx.saved_tensors
        grad = gradients[0]
        grad_product = grad.reshape(-1, grad.shape[-1]) @ down
        grad_opened, grad_lifted = ctx.kernels.gated_silu_back(grad_product, opened, lifted)
        grad_x = (grad_opened @ gate).addmm_(grad_lifted, up)
        return grad_x.view(*grad.shape[:-1], -1), None, None, None, None


class CompiledAttention(torch.autograd.Function):
    """Rotary positions and causal attention over projected queries, keys and values, in tiles of plain matrix products.

    Queries of the heads that share a key lie side by side, so that a tile of them is one matrix, and nothing is copied to
    make it so. As in `attention.TiledCausalAttention`, weights of long rows are computed again for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BTGND: torch.Tensor,
        key_BTGD: torch.Tensor,
        value_BTGD: torch.Tensor,
        cos_BTD: torch.Tensor,
        sin_BTD: torch.Tensor,
        scale: float,
        boundaries: Sequence[int] | None,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Return the attended values, `[B, T, G, N, D]`; with `boundaries`, conversations start at them."""
        batch, length, groups, heads, width = query_BTGND.shape
        query = kernels.rotate_in(query_BTGND, cos_BTD, sin_BTD, scale).view(batch * groups, length, heads, width)
        key = kernels.rotate_in(key_BTGD[..., None, :], cos_BTD, sin_BTD, 1.0).view(batch * groups, length, width)
        value = value_BTGD.transpose(1, 2).reshape(batch * groups, length, width).contiguous()
        out = torch.empty_like(query)
        ctx.tiles = list(tiles(boundaries or (0, length)))
        keep = max(stop - first for first, _, stop in ctx.tiles) <= KEEP_UP_TO
        kept = []
        for first, start, stop in ctx.tiles:
            weights = _tile_weights(query, key, first, start, stop, kernels)
            torch.bmm(weights, value[:, first:stop], out=out[:, start:stop].view(batch * groups, -1, width))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, cos_BTD, sin_BTD, *kept)
        ctx.scale, ctx.kernels = scale, kernels
        return out.view(batch, groups, length, heads, width).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, cos_BTD, sin_BTD, *kept = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        _, length, _, width = query.shape
        batch, _, groups = gradients[0].shape[:3]
        grad = gradients[0].transpose(1, 2).reshape(query.shape).contiguous()
        grad_query = torch.empty_like(query)
        # Tiles add up in fp32: in bf16 the sums of many tiles would lose what each of them says.
        grad_key, grad_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        for number, (first, start, stop) in enumerate(ctx.tiles):
            seen = slice(first, stop)
            weights = kept[number] if kept else _tile_weights(query, key, first, start, stop, kernels)
            rows = grad[:, start:stop].view(batch * groups, -1, width)
            kernels.accumulate_(grad_value, first, torch.bmm(weights.transpose(1, 2), rows))
            grad_scores = kernels.softmax_back_(torch.bmm(rows, value[:, seen].transpose(1, 2)), weights)
            torch.bmm(grad_scores, key[:, seen], out=grad_query[:, start:stop].view(batch * groups, -1, width))
            tile = query[:, start:stop].view(batch * groups, -1, width)
            kernels.accumulate_(grad_key, first, torch.bmm(grad_scores.transpose(1, 2), tile))
        shape_BGTND = (batch, groups, length, -1, width)
        grad_key_in = kernels.rotate_out(grad_key.to(key.dtype).view(shape_BGTND), cos_BTD, sin_BTD, 1.0)
        return (
            kernels.rotate_out(grad_query.view(shape_BGTND), cos_BTD, sin_BTD, ctx.scale),
            grad_key_in.view(batch, length, groups, width),
            grad_value.to(value.dtype).view(batch, groups, length, width).transpose(1, 2),
            *(None,) * 5,
        )


def _tile_weights(
    query: torch.Tensor, key: torch.Tensor, first: int, start: int, stop: int, kernels: Kernels
) -> torch.Tensor:
    """Attention weights of one tile of queries, `[B G, tile x N, keys]`."""
    _, _, heads, width = query.shape
    tile = query[:, start:stop].view(len(query), -1, width)
    return kernels.causal_softmax_(torch.bmm(tile, key[:, first:stop].transpose(1, 2)), heads)


def attend(
    module: Any, hidden_BTI: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], boundaries: Any, kernels: Kernels
) -> torch.Tensor:
    """Run an attention layer of transformers' Llama family: projections, norms of heads where it has them, attention."""
    batch, length, _ = hidden_BTI.shape
    width, heads = module.head_dim, module.num_key_value_groups
    query = module.q_proj(hidden_BTI).view(batch, length, -1, width)
    key = module.k_proj(hidden_BTI).view(batch, length, -1, width)
    value = module.v_proj(hidden_BTI).view(batch, length, -1, width)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query = query.view(batch, length, -1, heads, width)
    cos, sin = (angle.to(query.dtype).contiguous() for angle in angles)
    bounds = None if boundaries is None else boundaries.tolist()
    inputs = (query, key, value, cos, sin, module.scaling, bounds, kernels)
    out: torch.Tensor = CompiledAttention.apply(*inputs)  # type: ignore[no-untyped-call]
    result: torch.Tensor = module.o_proj(out.view(batch, length, -1))
    return result
