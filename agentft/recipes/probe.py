"""Try agentft's own attention, logits, packed rows and answers on a loaded model; what differs is left to transformers.

- Exact but for the last bits of fp32: changing the last token must not move earlier logits, and changing a neighbour, in a
  packed row or among answers, must not move this text's.
- Near: logits must be those of the model's own forward pass under eager attention, within what rounding explains.

Axes: B batch, T positions, N chosen positions, V vocabulary.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from agentft.data.batches import Batch, collate, collate_packed
from agentft.data.render import SpanKind
from agentft.data.tokens import Example, Span
from agentft.errors import ModelError
from agentft.evaluation.generate import greedy_ids
from agentft.model.attention import KVCache, RaggedModel, RaggedSequence, attention_of, take_attention
from agentft.model.labelled_loss import LabelledLoss, causal_model, last_states, output_head, packed_arguments

log = logging.getLogger(__name__)

LENGTHS = (16, 9)
"""Tokens of the two texts."""

NEW = 3
"""Tokens that are generated after the first of them, in place of as many of its own."""

_NEAR = 2e-3
_NEAR_IN_HALVES = 0.1
"""Largest distance from the stock logits over their spread, in the median of a text's positions, for fp32 and for bf16 or
fp16. A scale left out or a mask not seen is off by about 1; in bf16 two right kernels differ by about 0.01."""

_NOISE = 8
"""Times the rounding that a change of another row brings: 0 unless rows share products, as those of experts do."""

_ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Share of the largest logit that counts as no movement. A leak moves a thousand times as much."""

_FUTURE = 0.02
"""Share of the logits' spread by which a later token may move them in transformers' own code, in bf16 with experts."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a model is computed: by agentft's ways where they say what transformers' own say."""

    attention: str
    """What transformers knows the attention by."""
    stock_logits: bool = False
    """Logits are those of the model's own forward pass, and not of its output head."""
    leak: str | None = None
    """Why conversations are not packed; None: they may be."""
    stock_answers: bool = False
    """Steps are answered by transformers' `generate`."""
    left: tuple[str, ...] = ()
    """What is left to transformers, and why."""


@dataclass(frozen=True, slots=True)
class Stock:
    """What a model says as it was loaded, by transformers' own code."""

    examples: tuple[Example, Example]
    changed: tuple[Example, Example]
    """Other texts of the same lengths."""
    ending: tuple[Example, Example]
    """The texts with another last token."""
    logits: tuple[torch.Tensor, torch.Tensor]
    """Of each text, `[T, V]`, fp32."""
    generated: list[int]
    """What `generate` says after the first text without its last `NEW` tokens; empty where it fails."""
    noise: float
    """How far rounding moves the logits of a text when other tokens lie beside or behind it."""


class _DiffersError(Exception):
    """A way does not say what transformers' own says."""


def ask_stock(model: nn.Module, *, pad_id: int, autocast: torch.dtype | None = None) -> Stock:
    """Let a model speak as it was loaded, under eager attention where its attention can be chosen.

    Raises:
        ModelError: its own code fails on two short texts, or lets a position see later ones.
    """
    causal: Any = causal_model(model)
    before = attention_of(causal)
    with _reading(model, autocast):
        try:
            first, second = (_text(causal, length, seed) for seed, length in enumerate(LENGTHS))
            changed = (_changed(causal, first, 0), _changed(causal, second, 0))
            ending = (_changed(causal, first, LENGTHS[0] - 1), _changed(causal, second, LENGTHS[1] - 1))
            take_attention(model, "eager")
            spoken, other = (_logits(model, collate([first, *more], pad_id)) for more in ([second, ending[0]], changed))
        except Exception as error:
            raise ModelError(f"{_name(model)}: transformers' own forward pass fails ({_words(error)})") from error
        future = _moved(spoken[0, :-1], spoken[2, :-1])
        noise = max(_moved(spoken[0], other[0]), future)
        if not future <= min(_FUTURE, _tolerance(model)) * float(spoken[0].std()):
            raise ModelError(
                f"{_name(model)}: changing the last token moves by {future:.2g} what transformers' own code says before it; "
                "a model that sees what it is to predict cannot be trained so"
            )
        try:
            generated = greedy_ids(model, first.input_ids[:-NEW].tolist(), NEW)
        except Exception as error:
            log.debug("%s: generate fails (%s)", _name(model), _words(error))
            generated = []
        take_attention(model, before)
    logits = (spoken[0], spoken[1, : LENGTHS[1]])
    return Stock((first, second), changed, ending, logits, generated, noise)


@dataclass
class Probe:
    """Tries agentft's ways with the model as it will be trained."""

    stock: Stock
    """What the model said before adapters and leaner layers, which leave it as it was."""
    objective: LabelledLoss
    """The loss over the model, by its output head."""
    pad_id: int
    left: list[str] = field(default_factory=list)
    own: torch.Tensor = field(init=False)
    """The logits of the model's forward pass under the attention that is being tried, `[B, T, V]`."""

    @property
    def model(self) -> nn.Module:
        return self.objective.model

    def run(self, attention: str, *, asked: bool) -> ProbeResult:
        """Say in one line which ways do not hold, and return those to take: of `attention` no other if it was `asked` for.

        Raises:
            ModelError: the model differs from transformers' own whatever is taken, or an attention that was asked for does.
        """
        started, name = time.perf_counter(), _name(self.model)
        with _reading(self.model, self.objective.autocast):
            attention = self._choose_attention(attention, asked)
            head = self._fault("logits by the output head", self._try_head)
            if head is not None:
                self.objective.stock_logits = True
                if (fault := self._fault("logits by the forward pass", self._try_loss)) is not None:
                    raise ModelError(f"{name}: the loss is not that of transformers' own logits ({fault})")
            leak = self._fault("packed rows", self._try_packing)
            rows = self._fault("answers side by side", self._try_rows)
        if rows is not None and not self.stock.generated:
            raise ModelError(f"{name} answers neither side by side ({rows}) nor by transformers' generate")
        held = "all as transformers' own" if not self.left else f"left to transformers: {'; '.join(self.left)}"
        log.info("probe of %s in %.1f s: attention %s, %s", name, time.perf_counter() - started, attention, held)
        leak = None if leak is None else f"{name} cannot be packed: {leak}"
        return ProbeResult(attention, head is not None, leak, rows is not None, tuple(self.left))

    def _fault(self, what: str, trial: Callable[..., None], *arguments: str) -> str | None:
        """Return what is wrong with a way, and note that it is left to transformers; None: it holds."""
        try:
            trial(*arguments)
        except Exception as error:  # whatever a model's own code makes of arguments that it does not know
            fault = str(error) if isinstance(error, _DiffersError) else _words(error)
            self.left.append(f"{what} ({fault})")
            return fault
        return None

    def _choose_attention(self, wanted: str, asked: bool) -> str:
        for name in dict.fromkeys((wanted, "sdpa", "eager")):
            fault = self._fault(f"attention {name}", self._try_attention, name)
            if fault is None:
                return name
            if asked:
                raise ModelError(
                    f"model.attention: with {name} {_name(self.model)} does not say what it says with transformers' eager "
                    f"attention ({fault}); model.attention=auto takes one that does"
                )
            kept = attention_of(causal_model(self.model))
            if kept != name and self._fault(f"attention {kept}", self._try_attention, kept) is None:
                return kept
        raise ModelError(
            f"{_name(self.model)} does not say here what it says in transformers: {'; '.join(self.left)}; "
            "model.kernels=torch computes fewer parts in ways of our own"
        )

    def _try_attention(self, name: str) -> None:
        if (kept := take_attention(self.model, name)) != name:
            raise _DiffersError(f"the model's own code knows {kept} alone")
        examples, ending = self.stock.examples, self.stock.ending
        self.own, ended = (_logits(self.model, collate(each, self.pad_id)) for each in (examples, ending))
        for row, length in enumerate(LENGTHS):
            before, after = (each[row, : length - 1] for each in (self.own, ended))
            self._unmoved("changing the last token moves earlier logits", before, after)
            self._near(self.own[row, :length], row)

    def _try_head(self) -> None:
        by_head = _logits(self.model, collate(self.stock.examples, self.pad_id), by_head=True)
        self._unmoved("the model changes what its head says", self.own, by_head)
        self._try_loss()

    def _try_loss(self) -> None:
        wanted = 0.0
        for example, logits_TV in zip(self.stock.examples, self.stock.logits, strict=True):
            targets_T = torch.from_numpy(example.input_ids[1:].astype(np.int64)).to(logits_TV.device)
            wanted += float(nn.functional.cross_entropy(logits_TV[:-1], targets_T, reduction="sum"))
        batch = collate(self.stock.examples, self.pad_id)
        found = float(self.objective(batch.to(self.stock.logits[0].device)))
        if not abs(found - wanted) <= _tolerance(self.model) * wanted:
            raise _DiffersError(f"a loss of {found / batch.targets:.4f} for {wanted / batch.targets:.4f}")

    def _try_packing(self) -> None:
        (first, second), (another, yet_another) = self.stock.examples, self.stock.changed
        pairs, by_head = ([first, second], [another, second], [first, yet_another]), not self.objective.stock_logits
        packed, left_changed, right_changed = (
            _logits(self.model, collate_packed(pair), by_head=by_head)[0] for pair in pairs
        )
        own, beside = slice(0, len(first)), slice(len(first), None)
        self._unmoved("a packed neighbour moves logits", packed[beside], left_changed[beside])
        self._unmoved("a packed neighbour moves logits", packed[own], right_changed[own])
        self._near(packed[own], 0)
        self._near(packed[beside], 1)

    def _try_rows(self) -> None:
        (first, second), cut = self.stock.examples, LENGTHS[0] - NEW
        ragged = RaggedModel(self.model)
        caches = [ragged.kv_cache(LENGTHS[0]) for _ in range(3)]

        def begin(other: Sequence[int], cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
            # What carries over a border carries forward, so that the first text lies behind the other.
            asked = [
                RaggedSequence(cache, 0, other, range(LENGTHS[1])),
                RaggedSequence(caches[0], 0, begun, range(cut)),
            ]
            logits_NV = ragged.logits(asked).float()
            return logits_NV[: LENGTHS[1]], logits_NV[LENGTHS[1] :]

        begun = first.input_ids[:cut].tolist()
        with ragged.attached():
            _, moved = begin(self.stock.changed[1].input_ids.tolist(), caches[2])
            other, own = begin(second.input_ids.tolist(), caches[1])
            self._unmoved("an answer beside it moves logits", own, moved)
            more = ragged.logits([RaggedSequence(caches[0], cut, first.input_ids[cut:].tolist(), range(NEW))]).float()
            self._near(torch.cat([own, more]), 0)
            self._near(other, 1)
            if self.stock.generated:
                ids = [begun[-1], *self.stock.generated[:-1]]
                said = ragged.logits([RaggedSequence(caches[0], cut - 1, ids, range(len(ids)))]).float()
                taken = said.gather(1, torch.tensor(self.stock.generated, device=said.device)[:, None])[:, 0]
                if not bool((said.max(-1).values - taken <= _tolerance(self.model) * said.std(-1)).all()):
                    raise _DiffersError("another answer than transformers' generate")

    def _near(self, found_TV: torch.Tensor, row: int) -> None:
        wanted_TV = self.stock.logits[row]
        spread_T = (wanted_TV - wanted_TV.mean(-1, keepdim=True)).norm(dim=-1)
        distance = float(((found_TV - wanted_TV).norm(dim=-1) / spread_T).median())
        if not distance <= _tolerance(self.model):  # NaN counts as far
            raise _DiffersError(f"its logits are {distance:.2g} of their spread away")

    def _unmoved(self, words: str, before: torch.Tensor, after: torch.Tensor) -> None:
        moved = _moved(before, after)
        if not moved <= max(_NOISE * self.stock.noise, _ROUNDING * float(before.abs().max())):
            raise _DiffersError(f"{words} by {moved:.2g}")


@contextmanager
def _reading(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Surround what is only looked at: no dropout and no gradient, in the number format of the training."""
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(next(model.parameters()).device.type, dtype=autocast, enabled=autocast is not None),
        ):
            yield
    finally:
        model.train(was_training)


def _text(causal: Any, length: int, seed: int) -> Example:
    """Return a text of random tokens, all of it trained."""
    ids = [_token(causal, random.Random(f"{seed} {at}")) for at in range(length)]
    return Example(f"text {seed}", np.array(ids, dtype=np.int32), (Span(0, length, SpanKind.text),))


def _changed(causal: Any, example: Example, start: int) -> Example:
    """Return the text with other tokens from position `start` on."""
    ids = example.input_ids.copy()
    for at in range(start, len(ids)):
        draw = random.Random(f"{example.id} changed {at}")
        while ids[at] == example.input_ids[at]:
            ids[at] = _token(causal, draw)
    return replace(example, input_ids=ids)


def _token(causal: Any, draw: random.Random) -> int:
    """Draw a token that no setting of the model gives a meaning of its own."""
    special: set[int] = set()
    for name, value in causal.config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            special.update(value if isinstance(value, list) else [value])
    count = causal.get_input_embeddings().weight.shape[0]
    while (token := draw.randrange(count)) in special:
        pass
    return token


def _logits(model: nn.Module, batch: Batch, *, by_head: bool = False) -> torch.Tensor:
    """Return the logits of the model's own forward pass, or of its head over the last states, `[B, T, V]`, fp32."""
    batch = batch.to(next(model.parameters()).device)
    arguments = packed_arguments(batch)
    if by_head:
        return output_head(model)(last_states(model, batch.input_ids_BT, **arguments)).float()  # type: ignore[no-any-return]
    causal = causal_model(model)
    return causal(input_ids=batch.input_ids_BT, use_cache=False, **arguments).logits.float()  # type: ignore[no-any-return]


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).abs().max())


def _tolerance(model: nn.Module) -> float:
    weight = next(model.parameters())
    halves = weight.element_size() < 4 or torch.is_autocast_enabled(weight.device.type)
    return _NEAR_IN_HALVES if halves else _NEAR


def _name(model: nn.Module) -> str:
    return type(causal_model(model)).__name__


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"
