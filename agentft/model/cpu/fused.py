"""Train adapters on a frozen model with leaner layers: the same mathematics with fewer passes over memory.

What is replaced, and what the stock layer does instead:

- a linear layer with a LoRA branch: peft casts the input to fp32 once per adapted layer, draws a dropout mask per element
  from the generator, and keeps all of these for the backward pass. Here the branch runs in the model's dtype from fp32
  master weights, the mask is drawn four elements to a random number, and what is kept is the input (which neighbouring
  layers share), one byte an element for the mask, and the rank-wide product.
- RMSNorm: transformers keeps three fp32 copies of its input. Here the input and one number a row are kept.
- the gated activation: two tensors are kept instead of three.

In bf16 on a CPU the row-wise parts run in compiled code where `kernels` are given (see `native.py`), and a frozen MLP or an
attention layer is one step of autograd that keeps only what its gradient needs.

Axes: M rows (batch x positions), I input width, O output width, R rank; in attention B batch, T positions, G key-value heads,
N query heads in each, D head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from agentft.model.cpu import attention
from agentft.model.cpu.attention import KEEP_UP_TO, tiles
from agentft.model.cpu.native import Kernels

log = logging.getLogger(__name__)

_STEPS = 256
"""Dropout probabilities are rounded to this many steps, since a mask is drawn from bytes."""


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    """Return `count` uniform bytes from torch's generator, shape `[count]`, four of them from each draw."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(0, 1 << 32)
    return words.view(torch.uint8).view(-1, 8)[:, :4].reshape(-1)[:count]


class LoraLinearFunction(torch.autograd.Function):
    """y = x W' + b + s (drop(x) A') B', with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
        dropout: float,
        kernels: Kernels | None = None,
    ) -> torch.Tensor:
        """Return y in the shape of x with its last axis O."""
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = functional.linear(x_MI, weight_OI, bias_O)
        mask = _Mask.draw(x_MI, dropout, kernels)
        scale = scale / (1 - mask.probability)
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        h_MR = mask.apply(x_MI) @ a.t()
        y_MO.addmm_(h_MR, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight_OI, a, b, h_MR, mask.keep_MI)
        ctx.scale, ctx.mask = scale, mask.without_tensor()
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, h_MR, keep_MI = ctx.saved_tensors
        mask: _Mask = replace(ctx.mask, keep_MI=keep_MI)
        g_MO = gradients[0].reshape(-1, gradients[0].shape[-1])
        x_MI = x.reshape(-1, x.shape[-1])
        gh_MR = (g_MO @ b_OR).mul_(ctx.scale)
        grad_b = (g_MO.t() @ h_MR).float().mul_(ctx.scale)
        grad_a = (gh_MR.t() @ mask.apply(x_MI)).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = mask.apply_(gh_MR @ a_RI).addmm_(g_MO, weight_OI).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


@dataclass(frozen=True, slots=True)
class _Mask:
    """Which elements of a matrix dropout keeps: written down as one byte each, or as the seed that compiled code draws by."""

    probability: float = 0.0
    keep_MI: torch.Tensor | None = None
    seed: tuple[int, int] = (0, 0)
    kernels: Kernels | None = None

    @staticmethod
    def draw(x_MI: torch.Tensor, probability: float, kernels: Kernels | None) -> _Mask:
        if not probability:
            return _Mask()
        if kernels is not None:
            low, high = torch.randint(0, 1 << 32, (2,)).tolist()
            return _Mask(probability, None, (low, high), kernels)
        threshold = round(probability * _STEPS)
        keep_MI = (random_bytes(x_MI.numel(), x_MI.device) >= threshold).view(x_MI.shape)
        return _Mask(threshold / _STEPS, keep_MI)

    def apply(self, x_MI: torch.Tensor) -> torch.Tensor:
        """Return `x` with 0 where the mask drops, unscaled."""
        if self.kernels is not None:
            return self.kernels.dropout(x_MI.contiguous(), self.probability, self.seed)
        if self.keep_MI is None:
            return x_MI
        if x_MI.dtype is torch.bfloat16 and x_MI.device.type == "cpu":
            # By bits: a product of bf16 and bool is made through copies in a common dtype, at 8 times the time.
            bits = self.keep_MI.view(torch.int8).to(torch.int16).neg_()
            return bits.bitwise_and_(x_MI.contiguous().view(torch.int16)).view(torch.bfloat16)
        return x_MI * self.keep_MI

    def apply_(self, x_MI: torch.Tensor) -> torch.Tensor:
        """As `apply`, in place where that saves memory."""
        if self.kernels is None:
            return self.apply(x_MI)
        return self.kernels.dropout(x_MI, self.probability, self.seed, x_MI)

    def without_tensor(self) -> _Mask:
        """Return what autograd may keep beside its saved tensors."""
        return replace(self, keep_MI=None)


class RmsNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w with w frozen (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_I: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return y in the shape and dtype of x; sums run in fp32."""
        wide = x.float()
        rate = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_I, rate)
        normed = wide * rate if wide is x else wide.mul_(rate).to(x.dtype)
        return weight_I * normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_I, rate = ctx.saved_tensors
        gw = (gradients[0] * weight_I).float()
        normed = x.float() * rate
        shared = (gw * normed).mean(-1, keepdim=True)
        return gw.sub_(normed.mul_(shared)).mul_(rate).to(x.dtype), None, None


class GatedSiluFunction(torch.autograd.Function):
    """y = silu(gate) * up (Shazeer, 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return y in the shape of both."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad = gradients[0]
        grad_up = functional.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


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


def fuse_layers(model: nn.Module, kernels: Kernels | None = None) -> int:
    """Give the model's LoRA layers, frozen RMSNorms, gated MLPs and attention layers their leaner forward; return how many.

    A layer of any other shape (another adapter kind, trained norms, a bias in the adapter) keeps its own. Without `kernels`
    attention keeps its own as well.
    """
    from peft.tuners.lora import Linear as PeftLinear

    fused = 0
    for module in model.modules():
        if isinstance(module, PeftLinear) and _is_plain_lora(module):
            module.forward = _lora_forward(module, kernels)
        elif _is_frozen_rms_norm(module):
            module.forward = _norm_forward(module, kernels)
        elif is_gated_silu_mlp(module):
            module.forward = _mlp_forward(module, kernels)
        elif kernels is not None and type(module).__name__ in ATTENTIONS:
            module.forward = _attention_forward(module, kernels)
        else:
            continue
        fused += 1
    log.info(
        "%d layers run fused%s (see agentft/model/cpu/fused.py)", fused, "" if kernels is None else " and compiled"
    )
    return fused


def _is_plain_lora(module: Any) -> bool:
    return (
        list(module.lora_A) == ["default"]
        and type(module.base_layer) is nn.Linear
        and not module.base_layer.weight.requires_grad
        and not module.use_dora.get("default", False)
        and module.lora_B["default"].bias is None
        and not getattr(module, "lora_variant", {}).get("default")
    )


def _lora_forward(module: Any, kernels: Kernels | None) -> Any:
    stock = module.forward
    base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    probability = float(getattr(module.lora_dropout["default"], "p", 0.0))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if module.merged or module.disable_adapters or args or kwargs:
            out: torch.Tensor = stock(x, *args, **kwargs)
            return out
        dropout = probability if module.training else 0.0
        scale = module.scaling["default"]
        inputs = (x, base.weight, base.bias, a.weight, b.weight, scale, dropout, _for(x, kernels))
        result: torch.Tensor = LoraLinearFunction.apply(*inputs)  # type: ignore[no-untyped-call]
        return result

    return forward


def _is_frozen_rms_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return name in RMS_NORMS and weight is not None and not weight.requires_grad


RMS_NORMS = frozenset({"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_GATED_MLPS = frozenset({"LlamaMLP", "Qwen2MLP", "Qwen3MLP"})
ATTENTIONS = frozenset({"LlamaAttention", "Qwen2Attention", "Qwen3Attention"})
"""Layers of transformers whose mathematics is known here, by the names of their classes."""


def _for(x: torch.Tensor, kernels: Kernels | None) -> Kernels | None:
    """The compiled functions where they fit `x`."""
    return kernels if x.dtype is torch.bfloat16 and x.device.type == "cpu" else None


def _norm_forward(module: Any, kernels: Kernels | None) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = (hidden_states, module.weight, module.variance_epsilon)
        compiled = _for(hidden_states, kernels)
        if compiled is not None and module.weight.dtype is torch.bfloat16:
            done: torch.Tensor = CompiledRmsNorm.apply(*inputs, compiled)  # type: ignore[no-untyped-call]
            return done
        result: torch.Tensor = RmsNormFunction.apply(*inputs)  # type: ignore[no-untyped-call]
        return result

    return forward


def is_gated_silu_mlp(module: nn.Module) -> bool:
    """Return whether the layer is `down(silu(gate(x)) * up(x))`."""
    if type(module).__name__ not in _GATED_MLPS:
        return False
    return type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _mlp_forward(module: Any, kernels: Kernels | None) -> Any:
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    whole = all(type(layer) is nn.Linear and layer.bias is None for layer in layers)

    def forward(x: torch.Tensor) -> torch.Tensor:
        compiled = _for(x, kernels)
        weights = [layer.weight for layer in layers] if whole else []
        if compiled is not None and whole and not any(weight.requires_grad for weight in weights):
            done: torch.Tensor = CompiledGatedMlp.apply(x, *weights, compiled)  # type: ignore[no-untyped-call]
            return done
        product = GatedSiluFunction.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
        result: torch.Tensor = module.down_proj(product)
        return result

    return forward


def _attention_forward(module: Any, kernels: Kernels) -> Any:
    stock = module.forward

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        boundaries = kwargs.get("cu_seq_lens_q")
        plain = (
            _for(hidden_states, kernels) is not None
            and attention.attention_of(module) == attention.NAME
            and past_key_values is None
            and (attention_mask is None or boundaries is not None)
            and getattr(module, "sliding_window", None) is None
            and not (module.training and module.attention_dropout)
            and position_embeddings[0].shape[-1] == module.head_dim
        )
        if plain:
            return attend(module, hidden_states, position_embeddings, boundaries, kernels), None
        return stock(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    return forward
