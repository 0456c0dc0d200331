"""Evaluation and generation spread over ranks and gathered: everything once, in the order asked, whatever the shares.

Rank 0 leads: it holds the files, the bars and the scores, and runs the same code as a job on one process. When it asks its
answerer for answers, the question goes to all ranks, each answers a share with the model it holds, and rank 0 gets all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from agentft.data.shares import share_out
from agentft.data.tokens import Example
from agentft.evaluation.answer_file import Answerer, OnAnswer
from agentft.evaluation.generate import Answer
from agentft.evaluation.likelihood import Likelihood, measure_likelihood
from agentft.evaluation.steps import Step
from agentft.world import World

T = TypeVar("T")


def lead(world: World, answerer: Answerer, work: Callable[[Answerer], T]) -> T | None:
    """Run `work` on rank 0 with an answerer behind which all ranks stand; elsewhere answer until it is done.

    Returns the result of `work` on rank 0 and None on the others.
    """
    if world.size == 1:
        return work(answerer)
    together = _Together(world, answerer)
    if not world.is_main:
        together.follow()
        return None
    result = work(together)
    together.dismiss()
    return result


class _Together:
    """Answers with the models of all ranks."""

    def __init__(self, world: World, own: Answerer) -> None:
        self._world = world
        self._own = own

    def answer(self, steps: Sequence[Step], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer all steps and return them in the order given; of other ranks' answers `on_answer` hears at the end."""
        if not steps:
            return []
        self._world.broadcast(list(steps))
        return self._round(steps, on_answer)

    def follow(self) -> None:
        """Take part in rank 0's rounds until it dismisses the others."""
        nothing: list[Step] | None = None
        while (steps := self._world.broadcast(nothing)) is not None:
            self._round(steps, None)

    def dismiss(self) -> None:
        """End `follow` on the other ranks."""
        self._world.broadcast(None)

    def _round(self, steps: Sequence[Step], on_answer: OnAnswer | None) -> list[Answer]:
        shares = shares_of(steps, self._world.size)
        mine = shares[self._world.rank]

        def heard(answer: Answer) -> None:
            self._world.mark("answering")
            if on_answer is not None:
                on_answer(answer)

        found = self._own.answer([steps[order] for order in mine], heard)
        plain = [(answer.text, answer.tokens, answer.finish) for answer in found]
        answers: dict[int, Answer] = dict(zip(mine, found, strict=True))
        for rank, rows in enumerate(self._world.gather(plain)):
            for order, row in zip(shares[rank], rows, strict=True):
                if rank != self._world.rank:
                    answers[order] = Answer(steps[order], *row)
                    if on_answer is not None:
                        on_answer(answers[order])
        return [answers[order] for order in range(len(steps))]


def shares_of(steps: Sequence[Step], ranks: int) -> list[list[int]]:
    """Return which steps each rank answers: whole conversations, whose steps share one prefill, long ones spread first."""
    by_conversation: dict[str, list[int]] = {}
    for order, step in enumerate(steps):
        by_conversation.setdefault(step.conversation.id, []).append(order)
    groups = list(by_conversation.values())
    shares = share_out([max(len(steps[order].input_ids) for order in group) for group in groups], ranks)
    return [sorted(order for at in share for order in groups[at]) for share in shares]


def spread_likelihood(
    world: World,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch: int,
    pad_id: int,
    autocast: torch.dtype | None = None,
) -> Likelihood:
    """Measure `examples` as `measure_likelihood` does, each on one rank; every rank gets the whole result."""
    if world.size == 1:
        return measure_likelihood(model, examples, batch=batch, pad_id=pad_id, autocast=autocast)
    shares = share_out([len(example) for example in examples], world.size)
    mine = [examples[at] for at in shares[world.rank]]
    found = measure_likelihood(model, mine, batch=batch, pad_id=pad_id, autocast=autocast) if mine else None
    parts = world.gather(None if found is None else (found.nats_GK, found.tokens_GK))
    filled = [part for part in parts if part is not None]
    orders = [at for share in shares for at in share]
    nats_GK, tokens_GK = (np.concatenate([part[side] for part in filled]) for side in (0, 1))
    back = np.argsort(np.array(orders))
    return Likelihood(tuple(example.id for example in examples), nats_GK[back], tokens_GK[back])
