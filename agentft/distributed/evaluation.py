"""Spread evaluation and generation over ranks and gather the results: everything once, in the order asked.

Rank 0 is the main process: it holds the files, the bars and the scores, and runs the same code as a job on one process. When
it asks its generator for completions, all ranks get the steps, each completes a share with the model it holds, and rank 0
gets all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from agentft.data.tokens import Example
from agentft.distributed.launch import BROKE_OFF
from agentft.errors import RankError
from agentft.evaluation.generate import Completion, Finish, Generator, OnCompletion
from agentft.evaluation.likelihood import Likelihood
from agentft.evaluation.steps import Step
from agentft.runtime import World, share_out

T = TypeVar("T")


def run_on_main(world: World, generator: Generator, work: Callable[[Generator], T]) -> T | None:
    """Run `work` on rank 0 with a generator that all ranks share; elsewhere generate until it is done, and return None.

    Where `work` or a rank fails, all leave together: with the error where it was raised, with a `RankError` elsewhere.
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
"""A completion without its step: text, tokens, why it ended."""


class _GeneratorOfRanks:
    """Generates with the models of all ranks, in rounds: rank 0 broadcasts the steps, or None or an error once it is over."""

    def __init__(self, world: World, own: Generator) -> None:
        self._world, self._own = world, own
        self._broken = False
        """All ranks have heard of a failure."""

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with other ranks' at the end."""
        if not steps:
            return []
        return self._round(self._world.broadcast(list(steps)), on_completion)

    def serve_main(self) -> None:
        """Take part in rank 0's rounds until it shuts them down."""
        own: list[Step] | str | None = None
        while isinstance(due := self._world.broadcast(own), list):
            self._round(due, None)
        if due is not None:
            raise RankError(f"{BROKE_OFF}: rank 0: {due}")

    def shutdown(self, error: Exception | None = None) -> None:
        """End `serve_main` on the other ranks, with the error that ended the work here if there was one."""
        if not self._broken:
            self._world.broadcast(None if error is None else _words(error))

    def _round(self, steps: Sequence[Step], on_completion: OnCompletion | None) -> list[Completion]:
        """Complete this rank's share, and return those of all ranks; where one fails, all leave in the same way."""
        shares = shares_of(steps, self._world.size)
        own: list[_Row] = []
        failure: Exception | None = None

        def heard(completion: Completion) -> None:
            self._world.heartbeat("generating")
            if on_completion is not None:
                on_completion(completion)

        try:
            completions = self._own.generate([steps[order] for order in shares[self._world.rank]], heard)
            own = [(each.text, each.tokens, each.finish) for each in completions]
        except Exception as error:
            failure = error
        gathered = self._world.gather((own, _words(failure) if failure is not None else ""))
        broken = [f"rank {rank}: {words}" for rank, (_, words) in enumerate(gathered) if words]
        self._broken = bool(broken)
        if failure is not None:
            raise failure
        if broken:
            raise RankError(f"{BROKE_OFF}: {'; '.join(broken)}")
        found: dict[int, Completion] = {}
        for rank, (rows, _) in enumerate(gathered):
            for order, row in zip(shares[rank], rows, strict=True):
                found[order] = Completion(steps[order], *row)
                if rank != self._world.rank and on_completion is not None:
                    on_completion(found[order])
        return [found[order] for order in range(len(steps))]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def shares_of(steps: Sequence[Step], ranks: int) -> list[list[int]]:
    """Return which steps each rank completes: whole conversations, whose steps share one prefill, long ones spread first."""
    by_conversation: dict[str, list[int]] = {}
    for order, step in enumerate(steps):
        by_conversation.setdefault(step.conversation.id, []).append(order)
    groups = list(by_conversation.values())
    shares = share_out([max(len(steps[order].input_ids) for order in group) for group in groups], ranks)
    return [sorted(order for at in share for order in groups[at]) for share in shares]


def likelihood_on_ranks(
    world: World, examples: Sequence[Example], measure: Callable[[Sequence[Example]], Likelihood]
) -> Likelihood:
    """Return `measure(examples)`, each example measured on one rank; every rank gets the whole result."""
    if world.size == 1:
        return measure(examples)
    shares = share_out([len(example) for example in examples], world.size)
    mine = [examples[at] for at in shares[world.rank]]
    found = measure(mine) if mine else None
    own = None if found is None else (found.nats_GK, found.tokens_GK)
    parts = [part for part in world.gather(own) if part is not None]
    nats_GK, tokens_GK = map(np.concatenate, zip(*parts, strict=True))
    back = np.argsort(np.array([at for share in shares for at in share]))
    return Likelihood(tuple(example.id for example in examples), nats_GK[back], tokens_GK[back])
