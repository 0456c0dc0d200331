"""Measure how likely a model finds the references, by kind of token; nothing is generated.

It is cheap enough for each evaluation during training. Whether a model calls well is told by completions only.

Axes: B batch, T positions, N labelled positions, D hidden width, G conversations, K kinds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from agentft.data.batches import collate
from agentft.data.render import TRAINED_KINDS
from agentft.data.tokens import Example
from agentft.errors import DataError
from agentft.evaluation.generate import eval_mode
from agentft.evaluation.metrics import SCORING_VERSION, Floats, Metric, bootstrap_facts, interval_metrics
from agentft.model.labelled_loss import last_states, output_head, stock_logits

KINDS = tuple(sorted(TRAINED_KINDS))
"""Columns of `Likelihood`: what the agent says in words, its calls, the token that ends a step, and the syntax of calls."""

_CHUNK = 1024
"""Labelled positions whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Losses of the references, in nats, by conversation and kind."""

    ids: tuple[str, ...]
    nats_GK: Floats
    tokens_GK: Floats

    @property
    def loss(self) -> float:
        """Mean cross-entropy of all labelled tokens."""
        return float(self.nats_GK.sum() / self.tokens_GK.sum())

    def losses(self) -> dict[str, float]:
        """Return `loss` and the loss of each kind that occurs: `loss_text`, `loss_call`, `loss_call_syntax`, `loss_stop` ..."""
        nats_K, tokens_K = self.nats_GK.sum(0), self.tokens_GK.sum(0)
        by_kind = {
            f"loss_{kind.name}": float(nats / tokens)
            for kind, nats, tokens in zip(KINDS, nats_K, tokens_K, strict=True)
            if tokens
        }
        return {"loss": self.loss} | by_kind

    def to_json(
        self, *, bootstrap_samples: int, seed: int, piece_of: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return losses and perplexities with 95 % intervals by bootstrap over conversations.

        `piece_of` maps the id of a piece of a long conversation to that of the whole; its pieces are drawn together.
        """
        names = ["loss", *(f"loss_{kind.name}" for kind in KINDS)]
        wholes = [(piece_of or {}).get(name, name) for name in self.ids]
        nats, tokens = (np.column_stack([part.sum(1), part]) for part in (self.nats_GK, self.tokens_GK))
        losses = interval_metrics(names, nats, tokens, bootstrap_samples=bootstrap_samples, seed=seed, wholes=wholes)
        perplexities = {name.replace("loss", "perplexity"): _perplexity(loss) for name, loss in losses.items()}
        return {
            "signature": f"agentft-eval|{SCORING_VERSION}|likelihood|nats:token|n:{len(set(wholes))}",
            "metrics": {name: metric.to_json() for name, metric in (losses | perplexities).items()},
            "counts": {"conversations": len(set(wholes)), "labelled_tokens": int(self.tokens_GK.sum())},
            "bootstrap": bootstrap_facts(bootstrap_samples, seed),
        }


def _perplexity(loss: Metric) -> Metric:
    value, low, high = (
        None if nats is None else math.exp(min(nats, 700.0)) for nats in (loss.value, loss.low, loss.high)
    )
    return dataclasses.replace(loss, value=value, low=low, high=high, se=None, se_cr0=None)


def measure_likelihood(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch: int,
    pad_id: int,
    autocast: torch.dtype | None = None,
    stock: bool = False,
) -> Likelihood:
    """Measure `examples` without dropout, `batch` in a forward pass, fp32 weights multiplied in `autocast`.

    `stock` takes the logits of the model's own forward pass, which does more to them than its head. `pad_id` may be any id.

    Raises:
        DataError: the examples hold no label.
    """
    if not any(example.spans for example in examples):
        raise DataError("the held-out conversations have no labelled token")
    by_length = sorted(range(len(examples)), key=lambda order: -len(examples[order]))
    nats_GK = np.zeros((len(examples), len(KINDS)))
    tokens_GK = np.zeros_like(nats_GK)
    with eval_mode(model), torch.inference_mode():
        for at in range(0, len(by_length), batch):
            orders = by_length[at : at + batch]
            nats, tokens = _measure([examples[order] for order in orders], model, pad_id, autocast, stock)
            nats_GK[orders], tokens_GK[orders] = nats, tokens
    return Likelihood(tuple(example.id for example in examples), nats_GK, tokens_GK)


def _measure(
    examples: Sequence[Example], model: nn.Module, pad_id: int, autocast: torch.dtype | None, stock: bool
) -> tuple[Floats, Floats]:
    device = next(model.parameters()).device
    # The first token of a text has nothing before it that tells it.
    labelled = [
        (row, position, KINDS.index(span.kind))
        for row, example in enumerate(examples)
        for span in example.spans
        for position in range(max(span.start, 1), span.stop)
    ]
    rows, positions, kinds = np.array(labelled, dtype=np.int64).reshape(-1, 3).T
    piece = collate(examples, pad_id).to(device)
    rows_N, positions_N = torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)
    targets_N = piece.input_ids_BT[rows_N, positions_N]
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        if stock:
            at_N = rows_N * piece.input_ids_BT.shape[1] + positions_N - 1
            logits_NV = stock_logits(model, piece.input_ids_BT, at_N)
            nats = [functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")]
        else:
            # Gathered before the head meets them: the logits of whole conversations would not fit beside a large vocabulary.
            hidden_ND = last_states(model, piece.input_ids_BT)[rows_N, positions_N - 1]
            chunks = zip(torch.split(hidden_ND, _CHUNK), torch.split(targets_N, _CHUNK), strict=True)
            head = output_head(model)
            nats = [functional.cross_entropy(head(h).float(), targets, reduction="none") for h, targets in chunks]
    sums_BK, tokens_BK = np.zeros((2, len(examples), len(KINDS)))
    np.add.at(sums_BK, (rows, kinds), torch.cat(nats).double().cpu().numpy())
    np.add.at(tokens_BK, (rows, kinds), 1)
    return sums_BK, tokens_BK
