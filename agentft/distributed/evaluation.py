"""Spread evaluation and generation over ranks and gather the results: everything once, in the order asked.

Rank 0 is the main process: it holds the files, the bars and the scores, and runs the same code as a job on one process. When
it asks its generator for completions, the question goes to all ranks, each answers a share with the model it holds, and
rank 0 gets all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from agentft.data.tokens import Example
from agentft.distributed.launch import BROKE_OFF
from agentft.errors import RankError
from agentft.evaluation.generate import Completion, Finish, Generator, OnCompletion
from agentft.evaluation.likelihood import Likelihood, measure_likelihood
from agentft.evaluation.steps import Step
from agentft.world import World, share_out

T = TypeVar("T")


def run_on_main(world: World, generator: Generator, work: Callable[[Generator], T]) -> T | None:
    """Run `work` on rank 0 with a generator that all ranks share; elsewhere generate until it is done.

    Returns the result of `work` on rank 0 and None on the others. Where `work` or somebody's answering fails, all ranks
    leave together: with the error where it was raised, with a `RankError` elsewhere.
    """
    if world.size == 1:
        return work(generator)
    together = _GeneratorOfRanks(world, generator)
    if not world.is_main:
        together.serve_main()
        return None
    try:
        result = work(together)
    except Exception as error:
        together.shutdown(error)
        raise
    together.shutdown()
    return result


_Row = tuple[str, int, Finish]
"""An answer without its step: text, tokens, why it ended."""


@dataclass(frozen=True, slots=True)
class _Round:
    """Tells the other ranks what to answer next, or that it is over."""

    steps: list[Step] | None
    failure: str = ""
    """Why it is over, where that is an error."""


class _GeneratorOfRanks:
    """Answers with the models of all ranks."""

    def __init__(self, world: World, own: Generator) -> None:
        self._world = world
        self._own = own
        self._broken = False
        """All ranks have heard of a failure."""

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with other ranks' at the end."""
        if not steps:
            return []
        self._world.broadcast(_Round(list(steps)))
        return self._round(steps, on_completion)

    def serve_main(self) -> None:
        """Take part in rank 0's rounds until it shuts them down."""
        while (due := self._world.broadcast(_Round(None))).steps is not None:
            self._round(due.steps, None)
        if due.failure:
            raise RankError(f"{BROKE_OFF}: rank 0: {due.failure}")

    def shutdown(self, error: Exception | None = None) -> None:
        """End `serve_main` on the other ranks, with the error that ended the work here if there was one."""
        if not self._broken:
            self._world.broadcast(_Round(None, "" if error is None else f"{type(error).__name__}: {error}"))

    def _round(self, steps: Sequence[Step], on_completion: OnCompletion | None) -> list[Completion]:
        shares = shares_of(steps, self._world.size)
        mine = shares[self._world.rank]

        def heard(answer: Completion) -> None:
            self._world.heartbeat("answering")
            if on_completion is not None:
                on_completion(answer)

        rows_by_rank = self._together(lambda: self._own.generate([steps[order] for order in mine], heard))
        answers: dict[int, Completion] = {}
        for rank, rows in enumerate(rows_by_rank):
            for order, row in zip(shares[rank], rows, strict=True):
                answers[order] = Completion(steps[order], *row)
                if rank != self._world.rank and on_completion is not None:
                    on_completion(answers[order])
        return [answers[order] for order in range(len(steps))]

    def _together(self, work: Callable[[], list[Completion]]) -> list[list[_Row]]:
        """Do every rank's work and return what each of them answered; all ranks leave it in the same way."""
        failure: Exception | None = None
        own: list[_Row] = []
        try:
            own = [(answer.text, answer.tokens, answer.finish) for answer in work()]
        except Exception as error:
            failure = error
        gathered = self._world.gather((own, "" if failure is None else f"{type(failure).__name__}: {failure}"))
        broken = [f"rank {rank}: {words}" for rank, (_, words) in enumerate(gathered) if words]
        self._broken = bool(broken)
        if failure is not None:
            raise failure
        if broken:
            raise RankError(f"{BROKE_OFF}: {'; '.join(broken)}")
        return [rows for rows, _ in gathered]


def shares_of(steps: Sequence[Step], ranks: int) -> list[list[int]]:
    """Return which steps each rank answers: whole conversations, whose steps share one prefill, long ones spread first."""
    by_conversation: dict[str, list[int]] = {}
    for order, step in enumerate(steps):
        by_conversation.setdefault(step.conversation.id, []).append(order)
    groups = list(by_conversation.values())
    shares = share_out([max(len(steps[order].input_ids) for order in group) for group in groups], ranks)
    return [sorted(order for at in share for order in groups[at]) for share in shares]


def likelihood_on_ranks(
    world: World,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch: int,
    pad_id: int,
    autocast: torch.dtype | None = None,
    stock: bool = False,
) -> Likelihood:
    """Measure `examples` as `measure_likelihood` does, each on one rank; every rank gets the whole result."""
    if world.size == 1:
        return measure_likelihood(model, examples, batch=batch, pad_id=pad_id, autocast=autocast, stock=stock)
    shares = share_out([len(example) for example in examples], world.size)
    mine = [examples[at] for at in shares[world.rank]]
    found = None
    if mine:
        found = measure_likelihood(model, mine, batch=batch, pad_id=pad_id, autocast=autocast, stock=stock)
    parts = world.gather(None if found is None else (found.nats_GK, found.tokens_GK))
    filled = [part for part in parts if part is not None]
    orders = [at for share in shares for at in share]
    nats_GK, tokens_GK = (np.concatenate([part[side] for part in filled]) for side in (0, 1))
    back = np.argsort(np.array(orders))
    return Likelihood(tuple(example.id for example in examples), nats_GK[back], tokens_GK[back])
