"""PiSSA: adapters that begin as the largest singular values of the weights (Meng et al., 2024, arXiv 2404.02948).

The paper takes s B0 A0 out of the frozen weight. Here the weight stays as it is and a second, frozen adapter takes it
out: y = W x + s B A x - s B0 A0 x. That is the same function, W keeps its bits (in bf16 and in 4 bits the difference
would be rounded), and a checkpoint that holds both adapters needs nothing recomputed: singular vectors differ in sign and
last bits from one machine to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentft.errors import ConfigError
from agentft.model.config import LoraConfig
from agentft.model.quantization import dense_weight

if TYPE_CHECKING:
    import torch

START = "start"
"""Name of the frozen adapter, -B0 A0."""

_ITERATIONS = 16
"""Subspace iterations; the paper finds 4 enough to train as well as with exact vectors."""

_SEED = 20240403


def is_start(name: str) -> bool:
    """Whether a parameter of this name belongs to the frozen adapter."""
    return f".{START}." in name


def begin_with_principal_part(model: Any, sft: LoraConfig) -> None:
    """Set the adapters of a peft model to the principal parts of their weights, and add the frozen ones.

    Raises:
        ConfigError: `sft_type.rank` exceeds the rank that a weight can have.
    """
    import torch

    config = model.peft_config["default"]
    model.add_adapter(START, type(config)(**{**config.to_dict(), "lora_dropout": 0.0}))
    model.base_model.set_adapter(["default", START])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(_SEED)
        for name, layer in model.named_modules():
            if START not in getattr(layer, "lora_A", {}):
                continue
            a_RI, b_OR = _principal_part(name, dense_weight(layer.get_base_layer()), sft)
            layer.lora_A["default"].weight.copy_(a_RI)
            layer.lora_B["default"].weight.copy_(b_OR)
            layer.lora_A[START].weight.copy_(a_RI)
            layer.lora_B[START].weight.copy_(-b_OR)
    for name, parameter in model.named_parameters():
        if is_start(name):
            parameter.requires_grad_(False)


def _principal_part(name: str, weight_OI: torch.Tensor, sft: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A `[R, I]` and B `[O, R]` with s B A the best approximation of the weight at that rank."""
    import torch

    if sft.rank > min(weight_OI.shape):
        raise ConfigError(f"sft_type.rank={sft.rank}: {name} has rank {min(weight_OI.shape)} at most")
    columns = min(2 * sft.rank, *weight_OI.shape)
    u_OR, sizes_R, v_IR = torch.svd_lowrank(weight_OI, q=columns, niter=_ITERATIONS)
    roots_R = (sizes_R[: sft.rank] / sft.scaling).sqrt()
    return (v_IR[:, : sft.rank] * roots_R).T.contiguous(), (u_OR[:, : sft.rank] * roots_R).contiguous()


def fold_start(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join each adapter with its frozen one into one of twice the rank: [B, -B0] [A; A0].

    Args:
        state: tensors named `...lora_A.default.weight`, `...lora_A.start.weight` and so on.

    Returns:
        The same names without an adapter's name, as peft saves them. The scaling stays that of the single rank.
    """
    import torch

    folded = {}
    for name, tensor in state.items():
        if ".default." not in name:
            continue
        axis = 0 if ".lora_A." in name else 1
        folded[name.replace(".default.", ".")] = torch.cat(
            [tensor, state[name.replace(".default.", f".{START}.")]], axis
        )
    return folded
