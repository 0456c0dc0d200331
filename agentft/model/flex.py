"""torch's flex attention as a choice: whole causal rows by its kernel, everything else by torch's plain ones.

transformers hands a mask of booleans to flex attention as numbers to add, which changes the scores by one instead of hiding
a position. Generation passes such masks, so they go to the plain kernel here.
"""

from __future__ import annotations

from typing import Any

from agentft.errors import ModelError
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
