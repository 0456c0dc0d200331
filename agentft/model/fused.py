"""Give layers a leaner forward pass with the same mathematics: ours beside adapters, Liger's kernels on CUDA.

- A linear layer with a LoRA branch keeps its input, a byte an element and the rank-wide product for the backward pass, where
  peft keeps an fp32 copy and a mask for each adapted layer.
- RMSNorm keeps its input and a number a row in place of three fp32 copies, the gated activation two tensors in place of three.

Liger's kernels serve any training method; the loss stays ours (`labelled_loss.py`), since Liger's has no weight for each row.

Axes: M rows (batch x positions), I input width, O output width, R rank.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from agentft.model.attention import attention_of

log = logging.getLogger(__name__)

_ATTENTIONS = frozenset({"LlamaAttention", "Qwen2Attention", "Qwen3Attention"})
"""Attention of transformers that Liger's rotary positions serve, by the names of the classes."""

LIGER_INSTALL = "pip install liger-kernel"

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
    ) -> torch.Tensor:
        """Return y, `[M, O]`: a view made here could not be changed in place, which some models do."""
        x_MI = x.reshape(-1, x.shape[-1])
        threshold, keep_MI = round(dropout * _STEPS), None
        if threshold:
            keep_MI = (random_bytes(x_MI.numel(), x.device) >= threshold).view(x_MI.shape)
        ctx.scale = scale / (1 - threshold / _STEPS)
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        h_MR = _kept(x_MI, keep_MI) @ a.t()
        y_MO = functional.linear(x_MI, weight_OI, bias_O).addmm_(h_MR, b.t(), alpha=ctx.scale)
        ctx.save_for_backward(x, weight_OI, a, b, h_MR, keep_MI)
        return y_MO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, h_MR, keep_MI = ctx.saved_tensors
        g_MO = gradients[0]
        x_MI = x.reshape(-1, x.shape[-1])
        gh_MR = (g_MO @ b_OR).mul_(ctx.scale)
        grad_b = (g_MO.t() @ h_MR).float().mul_(ctx.scale)
        grad_a = (gh_MR.t() @ _kept(x_MI, keep_MI)).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _kept(gh_MR @ a_RI, keep_MI).addmm_(g_MO, weight_OI).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def _kept(x_MI: torch.Tensor, keep_MI: torch.Tensor | None) -> torch.Tensor:
    """Return `x` with 0 where the mask drops, unscaled."""
    if keep_MI is None:
        return x_MI
    if x_MI.dtype is torch.bfloat16 and x_MI.device.type == "cpu":
        # By bits: a product of bf16 and bool is made through copies in a common dtype, at 8 times the time.
        bits = keep_MI.view(torch.int8).to(torch.int16).neg_()
        return bits.bitwise_and_(x_MI.contiguous().view(torch.int16)).view(torch.bfloat16)
    return x_MI * keep_MI


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


@dataclass(frozen=True, slots=True)
class LigerKernels:
    """Liger's steps of autograd."""

    rms_norm: Any
    gated_silu: Any
    rotate: Any


def load_liger() -> LigerKernels | None:
    """Import Liger's kernels; None, with the reason logged, where they are not installed or do not start."""
    try:
        return LigerKernels(
            rms_norm=importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction,
            gated_silu=importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction,
            rotate=importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction,
        )
    except ModuleNotFoundError as error:
        log.info("%s is not installed: norms and activations run in torch; %s", error.name, LIGER_INSTALL)
    except Exception as error:  # Triton looks for drivers and compilers while it is imported
        log.warning("Liger's kernels do not start (%s: %s): torch runs in their place", type(error).__name__, error)
    return None


def fuse_layers(model: nn.Module, liger: LigerKernels | None = None, *, adapted: bool) -> int:
    """Give the layers that are known here their leaner forward pass; return how many.

    Args:
        liger: Serves norms, gated MLPs and rotary positions, frozen or trained.
        adapted: The model is frozen with adapters beside it. Plain LoRA layers, frozen norms and gated MLPs are ours then,
            where Liger does not serve; a layer of another shape (another kind of adapter, a trained norm) keeps its own.
    """
    fused = 0
    for module in model.modules():
        if forward := _leaner_forward(module, liger, adapted):
            module.forward = forward
            fused += 1
    if fused:
        log.info("%d layers run fused%s (see agentft/model/fused.py)", fused, "" if liger is None else " or on Liger's")
    return fused


def is_rms_norm(module: Any) -> bool:
    """Return whether a layer computes what `RmsNormFunction` does: tried once for each class, on numbers of its own."""
    if _epsilon(module) is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    alone = module.weight.ndim == 1 and len(inspect.signature(module.forward).parameters) == 1
    return alone and _tried(module.__class__, _rms_norm_differs, module)


def is_gated_mlp(module: Any) -> bool:
    """Return whether a layer computes down(silu(gate(x)) up(x)): tried once for each class, on matrices of its own."""
    children = {name for name, _ in module.named_children()}
    matrices = {"gate_proj", "up_proj", "down_proj"}
    return (
        children - {"act_fn"} == matrices
        and hasattr(module, "act_fn")
        and _tried(module.__class__, _mlp_differs, module)
    )


_TRIED: dict[type, bool] = {}


def _tried(kind: type, difference: Callable[[Any], Any], module: Any) -> bool:
    if kind not in _TRIED:
        try:
            _TRIED[kind] = float(difference(module)) < 1e-5
        except Exception:  # whatever a layer of another kind makes of it
            _TRIED[kind] = False
    return _TRIED[kind]


def _epsilon(module: Any) -> float | None:
    return next((vars(module)[name] for name in ("variance_epsilon", "eps", "epsilon") if name in vars(module)), None)


def _rms_norm_differs(module: Any) -> Any:
    draw, size = torch.Generator().manual_seed(0), module.weight.shape[0]
    weight_I, x = torch.rand(size, generator=draw), torch.randn(3, size, generator=draw)
    found = torch.func.functional_call(module, {"weight": weight_I}, (x,))
    wanted = RmsNormFunction.apply(x, weight_I, _epsilon(module))  # type: ignore[no-untyped-call]
    return (found - wanted).abs().max()


def _mlp_differs(module: Any) -> Any:
    draw = torch.Generator().manual_seed(0)
    gate, up, down, x = (torch.randn(8, 8, generator=draw) for _ in range(4))
    layer = SimpleNamespace(gate_proj=gate.matmul, up_proj=up.matmul, down_proj=down.matmul, act_fn=module.act_fn)
    found, wanted = module.__class__.forward(layer, x), down @ (functional.silu(gate @ x) * (up @ x))
    return (found - wanted).abs().max() / wanted.abs().max()


def _leaner_forward(module: nn.Module, liger: LigerKernels | None, adapted: bool) -> Callable[..., Any] | None:
    name = type(module).__name__
    if adapted and _is_plain_lora(module):
        return _lora_forward(module)
    if is_rms_norm(module) and (liger or (adapted and not module.weight.requires_grad)):
        return _norm_forward(module, liger)
    if (liger or adapted) and is_gated_mlp(module):
        return _mlp_forward(module, liger)
    if name in _ATTENTIONS and liger:
        return _attention_forward(module, liger)
    return None


def _is_plain_lora(module: Any) -> bool:
    from peft.tuners.lora import Linear

    return (
        isinstance(module, Linear)
        and list(module.lora_A) == ["default"]
        and type(module.base_layer) is nn.Linear
        and not module.base_layer.weight.requires_grad
        and not module.use_dora.get("default", False)
        and module.lora_B["default"].bias is None
        and not getattr(module, "lora_variant", {}).get("default")
    )


def _lora_forward(module: Any) -> Callable[..., torch.Tensor]:
    stock = module.forward
    base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]
    probability = float(getattr(module.lora_dropout["default"], "p", 0.0))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if module.merged or module.disable_adapters or args or kwargs:
            out: torch.Tensor = stock(x, *args, **kwargs)
            return out
        dropout = probability if module.training else 0.0
        inputs = (x, base.weight, base.bias, a.weight, b.weight, module.scaling["default"], dropout)
        result_MO: torch.Tensor = LoraLinearFunction.apply(*inputs)  # type: ignore[no-untyped-call]
        return result_MO.view(*x.shape[:-1], -1)

    return forward


def _norm_forward(module: Any, liger: LigerKernels | None) -> Callable[..., torch.Tensor]:
    function: Any = RmsNormFunction if liger is None else liger.rms_norm
    # Not in place: what the gradient is written over may be another's as well.
    more = () if liger is None else (0.0, "llama", False)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function.apply(hidden_states, module.weight, _epsilon(module), *more)
        return out

    return forward


def _mlp_forward(module: Any, liger: LigerKernels | None) -> Callable[..., torch.Tensor]:
    function: Any = GatedSiluFunction if liger is None else liger.gated_silu

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.down_proj(function.apply(module.gate_proj(x), module.up_proj(x)))
        return out

    return forward


def _attention_forward(module: Any, liger: LigerKernels) -> Callable[..., Any]:
    """Return the forward pass of the Llama family's attention on Liger's rotary positions; with a cache its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = module.forward

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        name = attention_of(module)
        whole = position_embeddings is not None and position_embeddings[0].shape[-1] == module.head_dim
        if past_key_values is not None or name == "eager" or not whole:
            return stock(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        heads = (*hidden_states.shape[:-1], -1, module.head_dim)
        query, key = module.q_proj(hidden_states).view(heads), module.k_proj(hidden_states).view(heads)
        value = module.v_proj(hidden_states).view(heads)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        # Turned in place; neither projections nor norms keep what they return.
        query, key = liger.rotate.apply(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        attended, weights = ALL_ATTENTION_FUNCTIONS[name](
            module,
            query,
            key,
            value.transpose(1, 2),
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            sliding_window=getattr(module, "sliding_window", None),
            **kwargs,
        )
        return module.o_proj(attended.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return forward
