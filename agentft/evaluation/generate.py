"""Generate the completion of every step greedily, and keep completions on the disk as they come.

Teacher-forced steps of one conversation share their prefix: the context of step k+1 extends that of step k. So each
conversation is computed once, whole, and each of its steps starts from a prefix of that KV cache; conversations that begin
alike share their beginning too. Steps are then decoded side by side as a ragged batch; a sequence that is finished makes
room for the next step at once.

Calls copy names, keys and values from their context, and all calls share their syntax. So tokens are drafted from earlier
text and checked several at a time; greedy completions are the same with and without (prompt look-up: Saxena, 2023;
speculative decoding: Leviathan et al., 2023, arXiv 2211.17192).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, Self

import torch
from torch import nn

from agentft.errors import EvaluationError
from agentft.evaluation.config import EvaluationConfig
from agentft.evaluation.steps import Step
from agentft.model.attention import KVCache, RaggedModel, RaggedSequence
from agentft.model.labelled_loss import causal_model
from agentft.secrets import redact_text

log = logging.getLogger(__name__)

TEXT_STOPS = ("<|startofexec|>", "<|user|>", "<|system|>")
"""A completion ends here: what follows would be an invented tool result or user."""

_TAIL_TOKENS = 24
"""Tokens decoded to look for a text stop; the longest stop takes fewer in any byte-level vocabulary."""

_SHARED_BEGINNING = 256
"""Conversations whose first tokens, so many, are equal are computed one after the other, to share what is equal."""

Finish = Literal["stop", "text_stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated at one step."""

    step: Step
    text: str
    """Decoded with special tokens kept, the final stop token left out."""
    tokens: int
    finish: Finish


OnCompletion = Callable[[Completion], None]


class Generator(Protocol):
    """Anything that completes steps: a model here, or one behind an endpoint."""

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with each as it is finished."""


class PredictionCache:
    """A generator that keeps its completions in a file and takes from it those that are there: a context manager.

    The first line of the file holds the identity of the model, every further one a completion; those of another identity
    are not used. Lines are handed to the system whole, so SIGKILL costs at most the completions under way.
    """

    def __init__(
        self,
        path: Path,
        generator: Generator,
        identity: Mapping[str, Any],
        *,
        others: Sequence[Path] = (),
        known: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """`identity` is everything beside the context that decides a completion; `others` are further files of the same
        model's completions, which are only read, and `known` rows of such completions."""
        self.path = path
        self._others = others
        self._generator = generator
        self._header = {"identity": json.loads(json.dumps(identity))}
        self._known = {_key(row): row for row in known}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = self._read(content)
        for other in self._others:
            self._read(other.read_bytes())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(kept)
            if not kept:
                self._write(self._header)
        except OSError as error:
            raise EvaluationError(f"{self.path}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete the steps that the file does not hold, and return all in the order given."""
        found = [self._known.get(step.key) for step in steps]
        completions = {
            order: Completion(step, row["text"], row["tokens"], row["finish"])
            for order, (step, row) in enumerate(zip(steps, found, strict=True))
            if row is not None
        }
        if completions:
            log.info("%d of %d completions were kept by this run", len(completions), len(steps))
        if on_completion is not None:
            for completion in completions.values():
                on_completion(completion)
        missing = [order for order in range(len(steps)) if order not in completions]

        def keep(completion: Completion) -> None:
            about = {"text": completion.text, "tokens": completion.tokens, "finish": completion.finish}
            self._write(dict(zip(_KEY, completion.step.key, strict=True)) | about)
            if on_completion is not None:
                on_completion(completion)

        if missing:
            fresh = self._generator.generate([steps[order] for order in missing], keep)
            completions |= dict(zip(missing, fresh, strict=True))
        return [completions[order] for order in range(len(steps))]

    def _read(self, content: bytes) -> int:
        """Take over the whole lines of this identity; return the length of that part of the file."""
        kept = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                break  # cut short in writing
            if number == 0 and row != self._header:
                log.warning("%s: completions of another model or other settings are not used", self.path)
                return 0
            if number:
                self._known[_key(row)] = row
            kept += len(line)
        return kept

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "used outside of `with`"
        # ASCII, so that a lone surrogate of a served model survives and no other letter counts as the end of a line.
        self._file.write((redact_text(json.dumps(row)) + "\n").encode())
        self._file.flush()


def deciding_settings(config: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that affect a completion, without those that are null."""
    deciding = [each.name for each in fields(config) if each.metadata.get("affects") == "answers"]
    return {name: value for name in deciding if (value := getattr(config, name)) is not None}


_KEY = ("conversation_id", "step", "context_hash")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


_NGRAM_LENGTHS = (6, 4, 3, 2)
"""Lengths of the last tokens that are looked up, longest first."""

_MOST_NGRAMS = 200_000
"""Of finished completions, about 40 MB; then the index begins anew."""

_FIRST_LIMIT = 4
_SMALLEST_LIMIT = 2

NgramIndex = dict[tuple[int, ...], tuple[list[int], int]]
"""N-gram -> the text in which it occurred last, and the position after it."""


def index_ngrams(index: NgramIndex, ids: list[int], start: int = 0) -> None:
    """Add the n-grams of `ids` that something follows, from position `start` on; a whole text empties a full index."""
    if start == 0 and len(index) > _MOST_NGRAMS:
        index.clear()
    for at in range(start, len(ids)):
        for length in _NGRAM_LENGTHS:
            if at >= length:
                index[tuple(ids[at - length : at])] = ids, at


class PromptLookupDrafter:
    """Drafts tokens of one completion, from its own context first and then from other completions."""

    def __init__(self, context: Sequence[int], others: NgramIndex, longest: int) -> None:
        """`others` is the index of finished completions; at most `longest` tokens are drafted, none if 0."""
        self._ids = list(context)
        self._own: NgramIndex = {}
        self._others = others
        self._longest = longest
        self._limit = min(_FIRST_LIMIT, longest)
        if longest:
            index_ngrams(self._own, self._ids)

    def add(self, token: int) -> None:
        """Take in a token of the completion."""
        self._ids.append(token)
        if self._longest:
            index_ngrams(self._own, self._ids, len(self._ids) - 1)

    def draft(self, room: int) -> list[int]:
        """Return the next tokens as far as earlier text suggests them, at most `room`."""
        limit = min(self._limit, room)
        for length in _NGRAM_LENGTHS if limit > 0 else ():
            ngram = tuple(self._ids[-length:])
            if (place := self._own.get(ngram) or self._others.get(ngram)) is None:
                continue
            ids, at = place
            found = ids[at : at + limit]
            while ids is self._ids and len(found) < limit:  # it reaches the newest token: a repetition goes on
                found.append(found[at + len(found) - len(ids)])
            return found
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """Draft further after a draft that was accepted whole, less far after one that was not."""
        if drafted:
            further = 2 * self._limit if accepted == drafted else max(_SMALLEST_LIMIT, accepted + 1)
            self._limit = min(self._longest, further)


@dataclass(slots=True)
class _Decoding:
    """A completion that is being generated."""

    order: int
    step: Step
    cache: KVCache
    drafter: PromptLookupDrafter
    ids: list[int] = field(default_factory=list)
    """Of the completion; no forward pass has seen the newest yet."""
    finish: Finish | None = None


class GreedyGenerator:
    """Completes steps greedily with a transformers model."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        batch: int,
        max_new_tokens: int,
        speculation: int = 16,
    ) -> None:
        """`batch` sequences are decoded at once; at most `speculation` tokens are drafted ahead, none if 0."""
        self._model = model
        self._ragged = RaggedModel(model)
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._batch = batch
        self._max_new_tokens = max_new_tokens
        self._speculation = speculation
        self.counts: Counter[str] = Counter()
        """Work done: `prompt_tokens` computed, `passes`, tokens `drafted`, and of these `accepted`."""

    @torch.inference_mode()
    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with each as it is finished."""
        completions: dict[int, Completion] = {}
        index: NgramIndex = {}
        running: list[_Decoding] = []
        with eval_mode(self._model), self._ragged.attached():
            source = self._prefilled(steps, index)
            while len(completions) < len(steps):
                running += islice(source, self._batch - len(running))
                self._decode([decoding for decoding in running if decoding.finish is None])
                for decoding in running:
                    if decoding.finish is not None:
                        index_ngrams(index, decoding.ids)
                        completion = _completion(decoding.step, decoding.ids, decoding.finish, self._tokenizer)
                        completions[decoding.order] = completion
                        if on_completion is not None:
                            on_completion(completion)
                running = [decoding for decoding in running if decoding.finish is None]
        return [completions[order] for order in range(len(steps))]

    def _prefilled(self, steps: Sequence[Step], index: NgramIndex) -> Iterator[_Decoding]:
        """Yield each step with its context computed and its first token; what conversations share is computed once."""
        last_ids: list[int] = []
        last = self._ragged.kv_cache(0)
        for group in _in_order(steps):
            starts = sorted(step.start for _, step in group)
            ids = group[0][1].input_ids[: starts[-1]].tolist()
            # The token before the first step is asked for its next one, so it is computed in any case.
            shared = min(_common(ids, last_ids), starts[0] - 1)
            cache = self._ragged.kv_cache(len(ids))
            cache.copy(last, shared)
            wanted = [start - 1 - shared for start in starts]
            (next_ids,) = self._ragged.next_ids([RaggedSequence(cache, shared, ids[shared:], wanted)])
            first_ids = dict(zip(starts, next_ids, strict=True))
            self.counts["prompt_tokens"] += len(ids) - shared
            for order, step in group:
                # A pass writes its drafts before it knows whether they are right.
                own = self._ragged.kv_cache(step.start + self._max_new_tokens + self._speculation)
                own.copy(cache, step.start)
                drafter = PromptLookupDrafter(ids[: step.start], index, self._speculation)
                decoding = _Decoding(order, step, own, drafter)
                self._take(decoding, first_ids[step.start])
                yield decoding
            last_ids, last = ids, cache

    def _decode(self, running: Sequence[_Decoding]) -> None:
        """Run one pass; each sequence takes the model's tokens as long as the draft that they come from is right."""
        if not running:
            return
        drafts = [each.drafter.draft(self._max_new_tokens - len(each.ids) - 1) for each in running]
        sequences = [
            RaggedSequence(
                each.cache, each.step.start + len(each.ids) - 1, [each.ids[-1], *draft], range(len(draft) + 1)
            )
            for each, draft in zip(running, drafts, strict=True)
        ]
        found = self._ragged.next_ids(sequences)
        self.counts["passes"] += 1
        for decoding, draft, next_ids in zip(running, drafts, found, strict=True):
            accepted = _common(draft, next_ids)
            decoding.drafter.learn(len(draft), accepted)
            self.counts.update(drafted=len(draft), accepted=accepted)
            for token in next_ids[: accepted + 1]:
                if decoding.finish is None:
                    self._take(decoding, token)

    def _take(self, decoding: _Decoding, token: int) -> None:
        decoding.ids.append(token)
        decoding.drafter.add(token)
        decoding.finish = _end(decoding.step, decoding.ids, self._tokenizer, self._stop_ids)
        if decoding.finish is None and len(decoding.ids) >= self._max_new_tokens:
            decoding.finish = "length"


class StockGenerator:
    """Completes steps one by one by transformers' `generate`, for models whose layers keep more than keys and values."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given; `on_completion` is called with each as it is finished."""
        completions = []
        with eval_mode(self._model):
            for step in steps:
                context = step.input_ids[: step.start].tolist()
                ids = greedy_ids(self._model, context, self._max_new_tokens, partial(self._ends, step))
                completions.append(read_completion(step, ids, self._tokenizer, self._stop_ids))
                if on_completion is not None:
                    on_completion(completions[-1])
        return completions

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


def read_completion(step: Step, ids: Sequence[int], tokenizer: Any, stop_ids: Sequence[int]) -> Completion:
    """Return the completion in the tokens that another engine generated, cut where `GreedyGenerator` would have stopped."""
    for length in range(1, len(ids) + 1):
        if (how := _end(step, ids[:length], tokenizer, stop_ids)) is not None:
            return _completion(step, ids[:length], how, tokenizer)
    return _completion(step, ids, "length", tokenizer)


def _completion(step: Step, ids: Sequence[int], how: Finish, tokenizer: Any) -> Completion:
    kept = ids[:-1] if how == "stop" else ids
    text = tokenizer.decode(kept, skip_special_tokens=False) if step.reader is None else step.reader.decode(kept)
    return Completion(step, text, len(ids), how)


def _end(step: Step, ids: Sequence[int], tokenizer: Any, stop_ids: Sequence[int]) -> Finish | None:
    """Return how the newest token ends a completion, None if it does not."""
    if ids[-1] in stop_ids:
        return "stop"
    if step.reader is not None:  # a chat template's turns end with tokens: such texts are letters there
        return None
    tail = tokenizer.decode(ids[-_TAIL_TOKENS:], skip_special_tokens=False)
    return "text_stop" if any(stop in tail for stop in TEXT_STOPS) else None


def _in_order(steps: Sequence[Step]) -> list[list[tuple[int, Step]]]:
    """Return the steps by conversation, each with its place: long ones first, those that begin alike together."""
    ordered = sorted(enumerate(steps), key=lambda item: (item[1].conversation.id, item[1].start))
    groups = [list(group) for _, group in groupby(ordered, key=lambda item: item[1].conversation.id)]
    longest: dict[bytes, int] = {}

    def beginning(group: list[tuple[int, Step]]) -> bytes:
        return group[0][1].input_ids[:_SHARED_BEGINNING].tobytes()

    for group in groups:  # the longest first, so that running out of memory happens at once
        longest[beginning(group)] = max(longest.get(beginning(group), 0), group[-1][1].start)
    return sorted(groups, key=lambda g: (-longest[beginning(g)], beginning(g), g[-1][1].input_ids.tolist()))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
