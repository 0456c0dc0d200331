"""Answer every step of many conversations greedily.

Calls copy names, keys and values from their context, and all calls share their frame. A guess costs nothing but a wider
forward pass that checks it; under greedy decoding the answer is the same with and without (prompt look-up: Saxena, 2023;
speculative decoding: Leviathan et al., 2023, arXiv 2211.17192).

Teacher-forced steps of one conversation share their prefix: the context of step k+1 extends that of step k. So each
conversation is computed once, whole, and each of its steps starts from a prefix of that one history; conversations that
begin alike share their beginning too. Steps are then answered side by side; a place whose answer is finished takes the next
step at once, so no answer waits for the longest. What an answer is likely to copy is guessed and checked several tokens at
a time, see `agentft.evaluation.generate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from agentft.evaluation.ragged_decoding import KVCache, Row, RowModel
from agentft.evaluation.steps import Step
from agentft.model.labelled_loss import causal_model

_LONGEST_FIRST = (6, 4, 3, 2)
"""Lengths of the endings that are looked up."""

_MOST_ENDINGS = 200_000
"""Of finished answers, about 40 MB; then the memory begins anew."""

_FIRST_LIMIT = 4
_SMALLEST_LIMIT = 2

_Ending = tuple[int, ...]


class SaidBefore:
    """Endings of all finished answers of an exam, and where they stand."""

    def __init__(self) -> None:
        self._places: dict[_Ending, tuple[list[int], int]] = {}

    def add(self, ids: list[int]) -> None:
        """Remember an answer."""
        if len(self._places) > _MOST_ENDINGS:
            self._places.clear()
        for at in range(len(ids)):
            for length in _LONGEST_FIRST:
                if at >= length:
                    self._places[tuple(ids[at - length : at])] = (ids, at)

    def after(self, ending: _Ending, limit: int) -> list[int]:
        """Return up to `limit` tokens that followed `ending` last; none if it was never said."""
        ids, at = self._places.get(ending, ((), 0))
        return list(ids[at : at + limit])


class PromptLookupDrafter:
    """Guesses for one answer, from its own context first and then from the answers to other steps."""

    def __init__(self, context: Sequence[int], said_before: SaidBefore, longest: int) -> None:
        self._ids: list[int] = []
        self._places: dict[_Ending, int] = {}
        self._said_before = said_before
        self._longest = longest
        self._limit = min(_FIRST_LIMIT, longest)
        if longest:
            for token in context:
                self.add(token)

    def add(self, token: int) -> None:
        """Take in a token of the context or of the answer."""
        if not self._longest:
            return
        at = len(self._ids)
        for length in _LONGEST_FIRST:
            if at >= length:
                self._places[tuple(self._ids[at - length : at])] = at
        self._ids.append(token)

    def guess(self, room: int) -> list[int]:
        """Return the next tokens as far as earlier text suggests them, at most `room`."""
        limit = min(self._limit, room)
        if limit <= 0:
            return []
        for length in _LONGEST_FIRST:
            if len(self._ids) < length:
                continue
            ending = tuple(self._ids[-length:])
            at = self._places.get(ending)
            found = self._said_before.after(ending, limit) if at is None else self._going_round(at, limit)
            if found:
                return found
        return []

    def _going_round(self, at: int, limit: int) -> list[int]:
        """Return what stands from `at` on; where that reaches the newest token, a repetition goes on repeating."""
        found = self._ids[at : at + limit]
        while len(found) < limit:
            found.append(found[at + len(found) - len(self._ids)])
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Guess further after a guess that was right to its end, less far after one that was not."""
        if guessed:
            further = 2 * self._limit if right == guessed else max(_SMALLEST_LIMIT, right + 1)
            self._limit = min(self._longest, further)


TEXT_STOPS = ("<|startofexec|>", "<|user|>", "<|system|>")
"""Once one of these is said the agent has left its own part: what follows would be an invented tool result or user."""

_TAIL_TOKENS = 24
"""Tokens decoded to look for a text stop; the longest stop takes fewer in any byte-level vocabulary."""

_ALIKE = 256
"""Conversations whose first tokens are these many and equal are computed one after the other, to share what is equal."""

Finish = Literal["stop", "text_stop", "length"]
OnCompletion = Callable[["Completion"], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model said at one step."""

    step: Step
    text: str
    """Decoded with special tokens kept, the final stop token left out."""
    tokens: int
    finish: Finish


@dataclass(slots=True)
class _Reply:
    """An answer under way."""

    order: int
    step: Step
    history: KVCache
    guesser: PromptLookupDrafter
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where its newest token stands, which no forward pass has seen yet."""
        return self.step.start + len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A conversation computed up to its last step."""

    ids: list[int]
    history: KVCache


class GreedyGenerator:
    """Answers steps greedily with a transformers model."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        slots: int,
        max_new_tokens: int,
        speculation: int = 16,
    ) -> None:
        """`slots` answers are under way at once; at most `speculation` tokens are guessed ahead, none if 0."""
        self._model = RowModel(model)
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._slots = slots
        self._max_new_tokens = max_new_tokens
        self._speculation = speculation
        self.counts: Counter[str] = Counter()
        """Work done: `prompt_tokens` computed, `passes`, tokens `guessed`, and of these `right`."""

    @torch.inference_mode()
    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        """Answer all steps and return them in the order given; `on_answer` hears of each as it is finished."""
        answers: dict[int, Completion] = {}
        said_before = SaidBefore()

        def finish(reply: _Reply, how: Finish) -> None:
            said_before.add(reply.ids)
            answers[reply.order] = _answer(reply.step, reply.ids, how, self._tokenizer)
            if on_answer is not None:
                on_answer(answers[reply.order])

        with self._model.attached():
            source = self._begun(steps, said_before)
            under_way: list[_Reply] = []
            while True:
                while len(under_way) < self._slots and (begun := next(source, None)) is not None:
                    reply, first_id = begun
                    how = self._take(reply, first_id)
                    if how is None:
                        under_way.append(reply)
                    else:
                        finish(reply, how)
                if not under_way:
                    return [answers[order] for order in range(len(steps))]
                ends = self._go_on(under_way)
                for reply, how in zip(under_way, ends, strict=True):
                    if how is not None:
                        finish(reply, how)
                under_way = [reply for reply, how in zip(under_way, ends, strict=True) if how is None]

    def _begun(self, steps: Sequence[Step], said_before: SaidBefore) -> Iterator[tuple[_Reply, int]]:
        """Yield each step with its context computed, and its first greedy token."""
        prefix = _Prefix([], self._model.history(0))
        for group in _in_order(steps):
            starts = sorted(step.start for _, step in group)
            prefix, first_ids = self._compute(group[0][1].input_ids[: starts[-1]].tolist(), starts, prefix)
            for order, step in group:
                # A pass writes its guesses before it knows whether they are right.
                history = self._model.history(step.start + self._max_new_tokens + self._speculation)
                history.copy(prefix.history, step.start)
                guesser = PromptLookupDrafter(prefix.ids[: step.start], said_before, self._speculation)
                yield _Reply(order, step, history, guesser), first_ids[step.start]

    def _compute(self, ids: list[int], starts: Sequence[int], last: _Prefix) -> tuple[_Prefix, dict[int, int]]:
        """Compute a conversation up to its last step, on top of what it shares with the `last` one.

        Returns:
            The conversation, and the next token after each of `starts`.
        """
        # The token before the first step is asked for its next one, so it is computed in any case.
        shared = min(_common(ids, last.ids), starts[0] - 1)
        history = self._model.history(len(ids))
        history.copy(last.history, shared)
        row = Row(history, shared, ids[shared:], [start - 1 - shared for start in starts])
        (next_ids,) = self._model.next_ids([row])
        self.counts["prompt_tokens"] += len(row.ids)
        return _Prefix(ids, history), dict(zip(starts, next_ids, strict=True))

    def _go_on(self, under_way: Sequence[_Reply]) -> list[Finish | None]:
        """Run one pass over all answers under way; say of each how it ended, None if it did not."""
        rows = []
        for reply in under_way:
            guess = reply.guesser.guess(self._max_new_tokens - len(reply.ids) - 1)
            ids = [reply.ids[-1], *guess]
            rows.append(Row(reply.history, reply.position, ids, range(len(ids))))
        self.counts["passes"] += 1
        found = self._model.next_ids(rows)
        return [self._check(reply, row.ids[1:], said) for reply, row, said in zip(under_way, rows, found, strict=True)]

    def _check(self, reply: _Reply, guess: Sequence[int], said: Sequence[int]) -> Finish | None:
        """Take the tokens that the model says, as long as what they were computed from is what it said."""
        right = next((i for i, (a, b) in enumerate(zip(guess, said, strict=False)) if a != b), len(guess))
        reply.guesser.learn(len(guess), right)
        self.counts["guessed"] += len(guess)
        self.counts["right"] += right
        for token in said[: right + 1]:
            how = self._take(reply, token)
            if how is not None:
                return how
        return None

    def _take(self, reply: _Reply, token: int) -> Finish | None:
        """Add a token to an answer; say whether that ends it."""
        reply.ids.append(token)
        reply.guesser.add(token)
        how = _end(reply.step, reply.ids, self._tokenizer, self._stop_ids)
        return "length" if how is None and len(reply.ids) >= self._max_new_tokens else how


class StockGenerator:
    """Answers steps one by one by transformers' `generate`, for models whose layers remember more than keys and values."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        """Answer all steps and return them in the order given; `on_answer` hears of each as it is finished."""
        answers = []
        for step in steps:
            context = step.input_ids[: step.start].tolist()
            ids = greedy_ids(self._model, context, self._max_new_tokens, partial(self._ends, step))
            answers.append(read_answer(step, ids, self._tokenizer, self._stop_ids))
            if on_answer is not None:
                on_answer(answers[-1])
        return answers

    def _ends(self, step: Step, ids: list[int]) -> bool:
        return _end(step, ids, self._tokenizer, self._stop_ids) is not None


def greedy_ids(
    model: nn.Module, context: Sequence[int], count: int, ends: Callable[[list[int]], bool] = lambda ids: False
) -> list[int]:
    """Return up to `count` tokens by transformers' `generate`, the likeliest at each place; `ends` is asked after each."""
    from transformers import GenerationConfig

    causal = causal_model(model)
    prompt = torch.tensor([list(context)], device=next(model.parameters()).device)

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([ends(ids[0, len(context) :].tolist())], device=ids.device)

    own = causal.generation_config
    # In its place, since transformers takes from it whatever is not given: other ends, penalties, sampling.
    causal.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0)
    try:
        out = causal.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[stop])
    finally:
        causal.generation_config = own
    new: list[int] = out[0, len(context) :].tolist()
    return new


def read_answer(step: Step, ids: Sequence[int], tokenizer: Any, stop_ids: Sequence[int]) -> Completion:
    """Return the answer in the tokens that another engine generated, cut where this one would have stopped."""
    for length in range(1, len(ids) + 1):
        if (how := _end(step, ids[:length], tokenizer, stop_ids)) is not None:
            return _answer(step, ids[:length], how, tokenizer)
    return _answer(step, ids, "length", tokenizer)


def _answer(step: Step, ids: Sequence[int], how: Finish, tokenizer: Any) -> Completion:
    said = ids[:-1] if how == "stop" else ids
    text = tokenizer.decode(said, skip_special_tokens=False) if step.reader is None else step.reader.decode(said)
    return Completion(step, text, len(ids), how)


def _end(step: Step, ids: Sequence[int], tokenizer: Any, stop_ids: Sequence[int]) -> Finish | None:
    """Say whether the newest token ends an answer."""
    if ids[-1] in stop_ids:
        return "stop"
    if step.reader is not None:  # a chat template's turns end with tokens: such texts are letters there
        return None
    tail = tokenizer.decode(ids[-_TAIL_TOKENS:], skip_special_tokens=False)
    return "text_stop" if any(stop in tail for stop in TEXT_STOPS) else None


def _in_order(steps: Sequence[Step]) -> list[list[tuple[int, Step]]]:
    """Return the steps by conversation, each with its place in `steps`.

    Long conversations come first, so that running out of memory happens at once; those that begin alike stand together.
    """
    by_length = sorted(enumerate(steps), key=lambda item: (item[1].conversation.id, item[1].start))
    groups = [list(group) for _, group in groupby(by_length, key=lambda item: item[1].conversation.id)]
    beginnings = [group[0][1].input_ids[:_ALIKE].tobytes() for group in groups]
    longest: dict[bytes, int] = {}
    for group, beginning in zip(groups, beginnings, strict=True):
        longest[beginning] = max(longest.get(beginning, 0), group[-1][1].start)
    keys = [(-longest[b], b, g[-1][1].input_ids.tolist()) for g, b in zip(groups, beginnings, strict=True)]
    return [groups[i] for i in sorted(range(len(groups)), key=keys.__getitem__)]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
