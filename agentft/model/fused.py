"""Leaner layers for training adapters on a frozen model: the same mathematics with fewer passes over memory.

What is replaced, and what the stock layer does instead:

- a linear layer with a LoRA branch: peft casts the input to fp32 once per adapted layer, draws a dropout mask per element
  from the generator, and keeps all of these for the backward pass. Here the branch runs in the model's dtype from fp32
  master weights, the mask is drawn four elements to a random number, and what is kept is the input (which neighbouring
  layers share), one byte an element for the mask, and the rank-wide product.
- RMSNorm: transformers keeps three fp32 copies of its input. Here the input and one number a row are kept.
- the gated activation: two tensors are kept instead of three.

Axes: M rows (batch x positions), I input width, O output width, R rank.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional

log = logging.getLogger(__name__)

_STEPS = 256
"""Dropout probabilities are rounded to this many steps, since a mask is drawn from bytes."""


def rounded_dropout(probability: float) -> float:
    """Return the probability that `fuse_layers` realises: the nearest multiple of 1/256."""
    return round(probability * _STEPS) / _STEPS


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
    ) -> torch.Tensor:
        """Return y in the shape of x with its last axis O."""
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = functional.linear(x_MI, weight_OI, bias_O)
        keep_MI = None
        dropped_MI = x_MI
        if dropout:
            threshold = round(dropout * _STEPS)
            keep_MI = (random_bytes(x_MI.numel(), x.device) >= threshold).view(x_MI.shape)
            dropped_MI = x_MI * keep_MI
            scale = scale / (1 - threshold / _STEPS)
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        h_MR = dropped_MI @ a.t()
        y_MO.addmm_(h_MR, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight_OI, a, b, h_MR, keep_MI)
        ctx.scale = scale
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, h_MR, keep_MI = ctx.saved_tensors
        g_MO = gradients[0].reshape(-1, gradients[0].shape[-1])
        x_MI = x.reshape(-1, x.shape[-1])
        gh_MR = (g_MO @ b_OR).mul_(ctx.scale)
        grad_b = (g_MO.t() @ h_MR).float().mul_(ctx.scale)
        dropped_MI = x_MI if keep_MI is None else x_MI * keep_MI
        grad_a = (gh_MR.t() @ dropped_MI).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            if keep_MI is None:
                grad_x = torch.addmm(g_MO @ weight_OI, gh_MR, a_RI)
            else:
                grad_x = (gh_MR @ a_RI).mul_(keep_MI).addmm_(g_MO, weight_OI)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


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


def fuse_layers(model: nn.Module) -> int:
    """Give the model's LoRA layers, frozen RMSNorms and frozen gated MLPs their leaner forward; return how many.

    A layer of any other shape (another adapter kind, trained norms, a bias in the adapter) keeps its own.
    """
    from peft.tuners.lora import Linear as PeftLinear

    fused = 0
    for module in model.modules():
        if isinstance(module, PeftLinear) and _is_plain_lora(module):
            module.forward = _lora_forward(module)
        elif _is_frozen_rms_norm(module):
            module.forward = _norm_forward(module)
        elif _is_frozen_gated_mlp(module):
            module.forward = _mlp_forward(module)
        else:
            continue
        fused += 1
    log.info("%d layers run fused (see agentft/model/fused.py)", fused)
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


def _lora_forward(module: Any) -> Any:
    stock = module.forward
    base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    probability = float(getattr(module.lora_dropout["default"], "p", 0.0))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if module.merged or module.disable_adapters or args or kwargs:
            out: torch.Tensor = stock(x, *args, **kwargs)
            return out
        dropout = probability if module.training else 0.0
        scale = module.scaling["default"]
        inputs = (x, base.weight, base.bias, a.weight, b.weight, scale, dropout)
        result: torch.Tensor = LoraLinearFunction.apply(*inputs)  # type: ignore[no-untyped-call]
        return result

    return forward


def _is_frozen_rms_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return name in _RMS_NORMS and weight is not None and not weight.requires_grad


_RMS_NORMS = frozenset({"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_GATED_MLPS = frozenset({"LlamaMLP", "Qwen2MLP", "Qwen3MLP"})


def _norm_forward(module: Any) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        norm: Any = RmsNormFunction.apply
        result: torch.Tensor = norm(hidden_states, module.weight, module.variance_epsilon)
        return result

    return forward


def _is_frozen_gated_mlp(module: nn.Module) -> bool:
    if type(module).__name__ not in _GATED_MLPS:
        return False
    return type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _mlp_forward(module: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product = GatedSiluFunction.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
        result: torch.Tensor = module.down_proj(product)
        return result

    return forward
