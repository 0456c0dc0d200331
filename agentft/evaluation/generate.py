"""Greedy answers to every step of many conversations.

Teacher-forced steps of one conversation share their prefix: the context of step k+1 extends that of step k. So each
conversation is prefilled once, whole, and each of its steps starts from a prefix of that one cache. Steps then decode side
by side in slots; a slot whose answer is finished takes the next step at once, so no row waits for the longest answer.

Axes: R active rows, Q new tokens, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from agentft.evaluation.slots import SlotCache
from agentft.evaluation.steps import Step

TEXT_STOPS = ("<|startofexec|>", "<|user|>", "<|system|>")
"""Once one of these is said the agent has left its own part: what follows would be an invented tool result or user."""

_TAIL_TOKENS = 24
"""Tokens decoded to look for a text stop; the longest stop takes fewer in any byte-level vocabulary."""

Finish = Literal["stop", "text_stop", "length"]
Prefix = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said at one step."""

    step: Step
    text: str
    """Decoded with special tokens kept, the final stop token left out."""
    tokens: int
    finish: Finish


@dataclass(slots=True)
class _Row:
    """A step being answered in a slot."""

    order: int
    step: Step
    ids: list[int] = field(default_factory=list)


class GreedyGenerator:
    """Answers steps greedily with a transformers model."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, stop_id: int, slots: int, max_new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_id = stop_id
        self._slots = slots
        self._max_new_tokens = max_new_tokens
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def answer(self, steps: Sequence[Step], on_answer: Callable[[Answer], None] | None = None) -> list[Answer]:
        """Answer all steps and return them in the order given; `on_answer` hears of each as it is finished."""
        if not steps:
            return []
        # Long contexts first: the attended width then only shrinks, and running out of memory happens at once.
        queue = sorted(
            enumerate(steps), key=lambda item: (-len(item[1].input_ids), item[1].conversation.id, item[1].start)
        )
        source = self._prefilled(queue)
        positions = max(step.start for step in steps) + self._max_new_tokens
        cache: SlotCache | None = None
        rows: dict[int, _Row] = {}
        answers: dict[int, Answer] = {}
        exhausted = False
        while not exhausted or rows:
            while not exhausted and len(rows) < self._slots:
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                row, prefix, first_id = item
                cache = cache or SlotCache(len(prefix), self._slots, positions)
                slot = next(index for index in range(self._slots) if index not in rows)
                cache.load(slot, prefix, row.step.start)
                rows[slot] = row
                self._take(rows, slot, first_id, answers, on_answer)
            if rows and cache is not None:
                self._decode(rows, cache, answers, on_answer)
        return [answers[order] for order in range(len(steps))]

    def _prefilled(self, queue: Sequence[tuple[int, Step]]) -> Iterator[tuple[_Row, Prefix, int]]:
        """Yield each queued step with its conversation's cache and its first greedy token."""
        for _, group in groupby(queue, key=lambda item: item[1].conversation.id):
            items = list(group)
            prefix, first_ids = self._prefill(items[0][1], sorted(step.start for _, step in items))
            for order, step in items:
                yield _Row(order, step), prefix, first_ids[step.start]

    def _prefill(self, step: Step, starts: Sequence[int]) -> tuple[Prefix, dict[int, int]]:
        """Run one conversation up to its last step; return the cache and the next token after each of `starts`."""
        ids = torch.from_numpy(step.input_ids[: starts[-1]].astype("int64"))[None].to(self._device)
        keep = torch.tensor([start - 1 for start in starts], device=self._device)
        output = self._model(input_ids=ids, use_cache=True, logits_to_keep=keep)
        prefix = [(layer.keys[0], layer.values[0]) for layer in output.past_key_values.layers]
        next_ids = output.logits[0].argmax(-1).tolist()
        return prefix, dict(zip(starts, next_ids, strict=True))

    def _decode(
        self,
        rows: dict[int, _Row],
        cache: SlotCache,
        answers: dict[int, Answer],
        on_answer: Callable[[Answer], None] | None,
    ) -> None:
        """Run one forward pass: every active row feeds its newest token and gets the next."""
        slots = sorted(rows)
        ids_RQ = torch.tensor([[rows[slot].ids[-1]] for slot in slots], device=self._device)
        columns_RQ = torch.tensor(
            [[rows[slot].step.start + len(rows[slot].ids) - 1] for slot in slots], device=self._device
        )
        cache.aim(torch.tensor(slots, device=self._device), columns_RQ)
        seen_RP = torch.arange(int(columns_RQ.max()) + 1, device=self._device)[None, :] <= columns_RQ
        output = self._model(
            input_ids=ids_RQ,
            position_ids=columns_RQ,
            attention_mask=seen_RP[:, None, None, :],
            past_key_values=cache,
            use_cache=True,
        )
        for slot, next_id in zip(slots, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            self._take(rows, slot, next_id, answers, on_answer)

    def _take(
        self,
        rows: dict[int, _Row],
        slot: int,
        next_id: int,
        answers: dict[int, Answer],
        on_answer: Callable[[Answer], None] | None,
    ) -> None:
        """Add a token to a row; when that ends the answer, free the slot."""
        row = rows[slot]
        finish = self._finish(row, next_id)
        if finish is None:
            return
        del rows[slot]
        ids = row.ids[:-1] if finish == "stop" else row.ids
        answer = Answer(row.step, self._tokenizer.decode(ids, skip_special_tokens=False), len(row.ids), finish)
        answers[row.order] = answer
        if on_answer is not None:
            on_answer(answer)

    def _finish(self, row: _Row, next_id: int) -> Finish | None:
        row.ids.append(next_id)
        if next_id == self._stop_id:
            return "stop"
        tail = self._tokenizer.decode(row.ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        if any(stop in tail for stop in TEXT_STOPS):
            return "text_stop"
        return "length" if len(row.ids) >= self._max_new_tokens else None
