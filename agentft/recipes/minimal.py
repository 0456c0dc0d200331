"""Fine-tune on one device, all in sight: conversations -> labelled tokens -> model -> training loop.

    python -m agentft.recipes.minimal model=tiny training.max_steps=10

Made of the parts that `recipes/train.py` is made of, without checkpoints, evaluation, several devices and guards against bad
numbers. A test holds its losses equal to those of `train.py`.

Axes: B conversations, T positions, N labelled positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from torch.nn import functional

from agentft import runtime
from agentft.data.batches import Batch, StepPlan, collate, micro_batches
from agentft.data.prepare import prepare_data
from agentft.data.tokens import IGNORE_INDEX
from agentft.model.adapters import count_parameters, prepare_for_training, rate_factors, save_final
from agentft.model.config import FullConfig, trains_weights
from agentft.model.labelled_loss import last_states, output_head
from agentft.model.load import choose_compute, load_chat_tokenizer, load_model
from agentft.recipes.config import TrainConfig
from agentft.training.engine import build_optimizer, build_schedule
from agentft.training.loop import seed_micro_batch

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> list[float]:
    """Fine-tune as `config` says, save the result, and return each step's loss per labelled token."""
    device = runtime.set_up(config.threads)
    compute = choose_compute(config.model, config.sft_type, device)
    training = config.training

    # Data: conversations become token ids. What the agent says is labelled, all else is context.
    chat = load_chat_tokenizer(config.model)
    data = prepare_data(config.dataset, chat.template, chat.encoder)
    plan = StepPlan(
        examples=len(data.train),
        examples_per_step=training.per_device_batch_size * training.gradient_accumulation_steps,
        epochs=training.epochs,
        max_steps=training.max_steps,
        seed=config.seed,
    )

    # Model: frozen with trained adapters beside its layers, or trained itself, by `sft_type`.
    stored = torch.float32 if isinstance(config.sft_type, FullConfig) else compute.dtype
    autocast = trains_weights(config.sft_type) and compute.dtype is not torch.float32
    model = load_model(
        chat.files,
        config.model,
        device=device,
        dtype=stored,
        attention=compute.attention,
        quantization=compute.quantization,
    )
    runtime.seed_everything(config.seed)
    model = prepare_for_training(model, config.sft_type, config.model, compute.liger)
    optimizer = build_optimizer(model, training, rate_factors(config.sft_type))
    schedule = build_schedule(optimizer, plan.total_steps, training)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    log.info("%d steps on %d conversations; %s", plan.total_steps, len(data.train), count_parameters(model))

    # Loop: a step's loss is the sum over its labelled tokens, divided by their number, however it is cut into batches.
    model.train()
    losses = []
    for step in range(plan.total_steps):
        indices = plan.step(step)
        lengths = {index: len(data.train[index]) for index in indices}
        groups = micro_batches(indices, lengths, training.per_device_batch_size)
        batches = [collate([data.train[index] for index in group], chat.pad_id) for group in groups]
        weight = sum(batch.weight for batch in batches)
        total = 0.0
        for batch in batches:
            seed_micro_batch(config.seed, step, batch.ids)
            with torch.autocast(device.kind, dtype=compute.dtype, enabled=autocast):
                loss = summed_loss(model, batch.to(torch.device(device.kind)))
            torch.autograd.backward(loss / weight)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total / weight)
        log.info("step %d of %d: loss %.4f", step + 1, plan.total_steps, losses[-1])

    save_final(model, config.sft_type, chat.tokenizer, Path(config.run_dir) / "final")
    return losses


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of a batch, summed over its labelled positions: a scalar, fp32.

    Hidden states are gathered where a label follows, so that of the `[B, T, V]` logits only N rows are computed.
    """
    hidden_BTD = last_states(model, batch.input_ids_BT)
    follows_BT = functional.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    chosen_BT = follows_BT != IGNORE_INDEX
    logits_NV = output_head(model)(hidden_BTD[chosen_BT])
    losses_N = functional.cross_entropy(logits_NV.float(), follows_BT[chosen_BT], reduction="none")
    if batch.weights_BT is not None:
        losses_N = losses_N * functional.pad(batch.weights_BT[:, 1:], (0, 1))[chosen_BT]
    return losses_N.sum()


if __name__ == "__main__":
    from agentft.config import compose_and_run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    compose_and_run("train", TrainConfig, lambda config: train(config)[-1])
