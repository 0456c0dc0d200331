"""Choose what is faster on CUDA: Liger's kernels for norms, rotary positions and activations, and flex attention.

transformers hands a mask of booleans to flex attention as numbers to add, which changes the scores by one instead of hiding
a position. Generation passes such masks, so they go to the plain kernel here.

For any training method: trained norms get their gradient, too. The loss stays ours (`labelled_loss.py`): Liger's has no
weight for each row, keeps losses in the logits' own bf16, and asks the device for numbers in the middle of a step.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agentft.errors import ModelError
from agentft.model.cpu.attention import attention_of
from agentft.model.cpu.fused import ATTENTIONS, RMS_NORMS, is_gated_silu_mlp
from agentft.runtime import Device

NAME = "agentft_flex"
"""What transformers knows it by."""


def flex_or_plain(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Attention as transformers calls it.

    Returns:
        The attended values, `[B, T, H, D]`, and no weights.
    """
    import torch
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = attention_mask is None or isinstance(attention_mask, torch.Tensor)
    forward = sdpa_attention_forward if plain else flex_attention_forward
    attended, _ = forward(module, query, key, value, attention_mask, **kwargs)
    return attended, None


def register(device: Device) -> str:
    """Make the implementation known to transformers and return its name.

    Raises:
        ModelError: it cannot train on this device.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flex_attention_mask
    from transformers.utils import is_torch_flex_attn_available

    if not device.is_cuda or not is_torch_flex_attn_available():
        raise ModelError(
            f"model.attention=flex needs a CUDA device, elsewhere torch has no backward pass of it; here is {device.name}; "
            "model.attention=auto takes the fastest that is there"
        )
    AttentionInterface.register(NAME, flex_or_plain)
    AttentionMaskInterface.register(NAME, flex_attention_mask)
    return NAME


log = logging.getLogger(__name__)

INSTALL = "pip install liger-kernel"


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
        log.info("%s is not installed: row-wise parts run in torch; %s", error.name, INSTALL)
    except Exception as error:  # Triton looks for drivers and compilers while it is imported
        log.warning("Liger's kernels do not start (%s: %s): row-wise parts run in torch", type(error).__name__, error)
    return None


def take_liger_layers(model: nn.Module, kernels: LigerKernels) -> int:
    """Give the model's RMSNorms, gated MLPs and attention layers a forward pass on Liger's kernels; return how many."""
    taken = 0
    for module in model.modules():
        name = type(module).__name__
        if name in RMS_NORMS:
            module.forward = _norm_forward(module, kernels)
        elif is_gated_silu_mlp(module):
            module.forward = _mlp_forward(module, kernels)
        elif name in ATTENTIONS:
            module.forward = _attention_forward(module, kernels)
        else:
            continue
        taken += 1
    log.info("%d layers run on Liger's kernels", taken)
    return taken


def _norm_forward(module: Any, kernels: LigerKernels) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        # Not in place: what the gradient is written over may be another's as well.
        out: torch.Tensor = kernels.rms_norm.apply(
            hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False
        )
        return out

    return forward


def _mlp_forward(module: Any, kernels: LigerKernels) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module.down_proj(kernels.gated_silu.apply(module.gate_proj(x), module.up_proj(x)))
        return out

    return forward


def _attention_forward(module: Any, kernels: LigerKernels) -> Any:
    """The attention layer of transformers' Llama family with other rotary positions; with a cache the layer's own."""
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
        query, key = kernels.rotate.apply(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
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
