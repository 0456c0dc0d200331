"""Compute the summed cross-entropy of a causal language model at labelled positions only.

Hidden states are gathered where a label follows before they meet the output head, so of the `[B, T, V]` logits only the
labelled rows ever exist, a chunk at a time. Two thirds of an agent conversation are context.

Axes: B batch, T positions, N chosen positions, labelled in the loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from agentft.data.batches import Batch
from agentft.data.tokens import IGNORE_INDEX

CHUNK = 1024
"""Labelled positions whose logits exist at once; of several chunks each is recomputed in the backward pass."""


def causal_model(model: nn.Module) -> Any:
    """Return the transformers model under an adapter wrapper, or `model` itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def last_states(model: nn.Module, input_ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return the decoder's last hidden states, `[B, T, D]`.

    Never with a cache: transformers would drop the borders between packed conversations without a word.
    """
    states: torch.Tensor = (
        causal_model(model).get_decoder()(input_ids=input_ids_BT, use_cache=False, **arguments).last_hidden_state
    )
    return states


def output_head(model: nn.Module) -> nn.Module:
    """Return the layer that makes logits of hidden states."""
    head: nn.Module = causal_model(model).get_output_embeddings()
    return head


def stock_output(
    model: nn.Module, input_ids_BT: torch.Tensor, at_N: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, Any]:
    """Return the output of the model's own forward pass, and its logits `[N, V]` at positions of the flat batch.

    It may scale or cap logits. They are made of the columns that hold a chosen position, where the model can be told so.
    """
    causal, length = causal_model(model), input_ids_BT.shape[1]
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        output: Any = causal(input_ids=input_ids_BT, use_cache=False, **arguments)
        return output.logits.flatten(0, 1).index_select(0, at_N), output
    columns, column_N = torch.unique(at_N % length, return_inverse=True)
    output = causal(input_ids=input_ids_BT, use_cache=False, logits_to_keep=columns, **arguments)
    kept: torch.Tensor = output.logits
    return kept.flatten(0, 1).index_select(0, at_N // length * len(columns) + column_N), output


def stock_logits(model: nn.Module, input_ids_BT: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
    """Return the logits `[N, V]` of the model's own forward pass at positions of the flat batch."""
    return stock_output(model, input_ids_BT, at_N)[0]


class LabelledLoss(nn.Module):
    """A causal language model and its loss as one module, so that a wrapper for many ranks sees one forward pass."""

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        rate_factors: Mapping[str, float] | None = None,
        reads_head: bool = False,
        stock_logits: bool = False,
    ) -> None:
        """Wrap `model`.

        Args:
            autocast: Matrix products of fp32 weights run in this dtype.
            rate_factors: For the optimiser: part of a parameter's name -> its learning rate over the others'.
            reads_head: A frozen head's weight can be read outside its own forward pass: the gradient is then made in the
                forward pass, and no logits are computed twice.
            stock_logits: Logits come from the model's own forward pass, which does more to them than its head.

        Where the model's config says `output_router_logits`, training adds its loss for evenly used experts, by its factor.
        """
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.reads_head = reads_head
        self.stock_logits = stock_logits
        self.rate_factors = dict(rate_factors or {})
        settings = causal_model(model).config.get_text_config(decoder=True)
        routed = getattr(settings, "output_router_logits", False)
        self.router_factor: float = getattr(settings, "router_aux_loss_coef", 0.0) if routed else 0.0

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy summed over the batch's labelled positions, each by its weight: a scalar, fp32."""
        device_type = batch.input_ids_BT.device.type
        with torch.autocast(device_type, dtype=self.autocast, enabled=self.autocast is not None):
            balances = bool(self.router_factor) and self.model.training
            if self.stock_logits or balances:
                at_N, targets_N, weights_N = _labelled(batch)
                logits_NV, output = stock_output(self.model, batch.input_ids_BT, at_N, **packed_arguments(batch))
                loss = _summed(logits_NV, targets_N, weights_N)
                # Of the whole batch, as transformers adds it to a mean over labels.
                return loss + self.router_factor * batch.weight * output.aux_loss if balances else loss
            return self.of_hidden(last_states(self.model, batch.input_ids_BT, **packed_arguments(batch)), batch)

    def of_hidden(self, hidden_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch whose last hidden states are known; on CUDA the host does not wait for the device."""
        at_N, targets_N, weights_N = _labelled(batch)
        loss: torch.Tensor = chunked_cross_entropy(
            hidden_BTD.flatten(0, 1).index_select(0, at_N),
            targets_N,
            output_head(self.model),
            weights_N,
            at_once=self.reads_head and torch.is_grad_enabled(),
        )
        return loss


def _labelled(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the positions of the flattened batch that a label follows, these labels, and what each counts."""
    at_N = predicting_positions(batch.labels_BT) if batch.predicting_N is None else batch.predicting_N
    targets_N = batch.labels_BT.flatten().index_select(0, at_N + 1)
    weights_BT = batch.weights_BT
    return at_N, targets_N, None if weights_BT is None else weights_BT.flatten().index_select(0, at_N + 1)


def predicting_positions(labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the positions of the flattened batch whose successor in the row has a label, `[N]`, in order."""
    predicting_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    predicting_BT[:, :-1] = labels_BT[:, 1:] != IGNORE_INDEX
    return predicting_BT.flatten().nonzero().squeeze(-1)


def packed_arguments(batch: Batch) -> dict[str, Any]:
    """Return what tells a transformers model where the conversations of a packed row begin; nothing for a padded batch.

    Of positions that start again torch's kernels make a mask; flash attention and our own tiles read the boundaries.
    """
    if batch.boundaries is None:
        return {}
    return {
        "position_ids": batch.position_ids_BT,
        "cu_seq_lens_q": batch.boundaries,
        "cu_seq_lens_k": batch.boundaries,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    head: nn.Module,
    weights_N: torch.Tensor | None = None,
    *,
    at_once: bool = False,
) -> torch.Tensor:
    """Sum the cross-entropy of `head(hidden)` against `targets` over N positions, `CHUNK` of them at a time.

    With `at_once`, behind a frozen head, the gradient is made in the same pass.
    """
    if at_once and _is_frozen_linear(head):
        loss: torch.Tensor = FrozenHeadLoss.apply(hidden_ND, head.weight, targets_N, weights_N)  # type: ignore[no-untyped-call]
        return loss

    def summed(hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
        return _summed(head(hidden_ND), targets_N, weights_N)

    if len(targets_N) <= CHUNK:
        return summed(hidden_ND, targets_N, weights_N)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for at in range(0, len(targets_N), CHUNK):
        piece = slice(at, at + CHUNK)
        weights = None if weights_N is None else weights_N[piece]
        total = total + checkpoint(summed, hidden_ND[piece], targets_N[piece], weights, use_reentrant=False)
    return total


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head, whose gradient is made in the forward pass: no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the loss, fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradients = []
        for at in range(0, len(targets_N), CHUNK):
            piece = slice(at, at + CHUNK)
            logits_NV = functional.linear(hidden_ND[piece], weight_VD)
            weights = None if weights_N is None else weights_N[piece]
            total += _cross_entropy_(logits_NV, targets_N[piece], weights).sum()
            gradients.append((logits_NV @ weight_VD).to(hidden_ND.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden_ND))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0], None, None, None


def _cross_entropy_(logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    """Return each row's weighted loss, fp32, and leave its gradient in place of the logits."""
    wide_NV = logits_NV.float()
    log_sums_N = wide_NV.logsumexp(-1)
    losses_N = log_sums_N - wide_NV.gather(1, targets_N[:, None]).squeeze(1)
    gradient_NV = torch.exp(wide_NV - log_sums_N[:, None])
    gradient_NV.scatter_add_(1, targets_N[:, None], gradient_NV.new_full((len(targets_N), 1), -1.0))
    if weights_N is not None:
        gradient_NV.mul_(weights_N[:, None])
        losses_N = losses_N * weights_N
    logits_NV.copy_(gradient_NV)
    return losses_N


def _is_frozen_linear(head: Any) -> bool:
    is_linear = bool(type(head) is nn.Linear)
    bias: Any = getattr(head, "bias", None)
    return is_linear and bias is None and not head.weight.requires_grad and bool(head.weight.is_contiguous())


def _summed(logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    if weights_N is None:
        return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    return (functional.cross_entropy(logits_NV.float(), targets_N, reduction="none") * weights_N).sum()
