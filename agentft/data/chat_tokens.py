"""Renderings of a chat template -> `input_ids` and labels.

The text is encoded once, as a server encodes a prompt. The one border that is forced is where a step begins, and only where
the tokenizer would write a token across it; the steps behind such a border are then trained by an example of their own,
since no server puts a border into the history of their prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agentft.data.chat_layout import Rendering
from agentft.data.render import SpanKind
from agentft.data.text_ids import FastIds, Ids, ReferenceIds, TextIds, TokenizerJson, byte_level_lengths
from agentft.data.tokens import Example, Span

_LEADS = ("\n", "x", ":")
"""What may stand before a text that continues another, so that a tokenizer puts no blank there; it is taken off again."""

Starts = npt.NDArray[np.int64]
"""Shape [T]: the character that each token begins at."""


class EncodedRendering(NamedTuple):
    """An example of a rendering, and which steps of the conversation it trains."""

    example: Example
    steps: tuple[int, ...]


class _Unit(NamedTuple):
    """A text that the tokenizer takes in one piece."""

    start: int
    """Where it stands in the rendering."""
    text: str
    letters: bool
    """It spells a control token and is to be letters."""
    leads: tuple[str, ...]
    """What to encode it behind; empty for the beginning of a rendering."""


class _Job(NamedTuple):
    """An example to be encoded."""

    item: int
    layout: _Layout
    trained: frozenset[int]
    """Which of the rendering's steps, by their position in it."""
    border: int | None = None
    """A position where no token may cross."""


class _Step(NamedTuple):
    section: int
    """Where the last control token before the step begins."""
    begin: int
    end: int


class RenderingEncoder:
    """Encodes renderings to the ids that `apply_chat_template` gives, control tokens in values as letters."""

    def __init__(self, tokenizer: Any, control: re.Pattern[str]) -> None:
        """Copy the Rust tokenizer out of `tokenizer`, a fast tokenizer of transformers.

        Args:
            control: matches one control token, in a group.
        """
        from tokenizers import Tokenizer

        own = TokenizerJson.of(tokenizer.backend_tokenizer)
        self._plain = Tokenizer.from_str(str(own))
        # Added tokens that are not special would still be found in text that is to be letters.
        self._letters = Tokenizer.from_str(str(own.with_special(lambda _: True)))
        self._letters.encode_special_tokens = True
        for each in (self._plain, self._letters):
            each.no_truncation()
            each.no_padding()
        self._lengths = byte_level_lengths(tokenizer) if own.keeps_every_byte else None
        self._text_ids: TextIds = ReferenceIds(self._plain)
        self._control = control
        self._sections: dict[tuple[str, bool], list[int]] = {}
        self._lead_ids = {lead: self._ids(lead) for lead in _LEADS}

    def for_much_text(self, *, much: bool) -> RenderingEncoder:
        """Return one that gives the same ids and comes to be faster, as `SegmentEncoder.for_much_text` does."""
        other = copy(self)
        if self._lengths is not None:
            other._text_ids = FastIds(ReferenceIds(self._plain), much=much)
        return other

    def settle(self) -> bool:
        """Load the faster tokenizer between two batches if that is worth it; say whether no other will be loaded."""
        return not isinstance(self._text_ids, FastIds) or self._text_ids.settle()

    def encode(self, renderings: Sequence[tuple[str, Rendering]]) -> list[list[EncodedRendering]]:
        """Return the examples of each (id, rendering): one, or several where a forced border would change a prompt."""
        layouts = [_Layout(rendering) for _, rendering in renderings]
        found: list[list[EncodedRendering]] = [[] for _ in renderings]
        jobs = [_Job(at, layout, frozenset(range(len(layout.steps)))) for at, layout in enumerate(layouts)]
        again: list[_Job] = []
        for job, (ids, starts) in zip(jobs, self._encode(jobs), strict=True):
            crossed = [at for at in sorted(job.trained) if not self._begins_alone(job.layout, at, ids, starts)]
            own = job.trained - set(crossed)
            if crossed:
                # The steps before the last border have no border in their prompts yet, so they may share its example.
                before = {at for at in own if at < crossed[-1]} if own and max(own) < crossed[-1] else set()
                own -= before
                for at in crossed:
                    trained = frozenset({at, *(before if at == crossed[-1] else ())})
                    again.append(_Job(job.item, job.layout, trained, job.layout.steps[at].begin))
            if own:
                found[job.item].append(self._example(renderings[job.item], job._replace(trained=own), ids, starts))
        for job, (ids, starts) in zip(again, self._encode(again), strict=True):
            found[job.item].append(self._example(renderings[job.item], job, ids, starts))
        return [sorted(each, key=lambda encoded: encoded.steps) for each in found]

    def _encode(self, jobs: Sequence[_Job]) -> Iterator[tuple[Ids, Starts]]:
        """Yield the ids of each job's text and where its tokens begin."""
        units = [self._units(job) for job in jobs]
        encoded = iter(self._encode_units(list(chain.from_iterable(units))))
        for own in units:
            parts = [next(encoded) for _ in own]
            if len(parts) == 1:
                yield parts[0]
            else:
                yield np.concatenate([ids for ids, _ in parts]), np.concatenate([starts for _, starts in parts])

    def _units(self, job: _Job) -> list[_Unit]:
        layout = job.layout
        stop = layout.steps[max(job.trained)].end
        cuts: list[tuple[int, bool, tuple[str, ...]]] = [(0, False, ())]
        if layout.rendering.spelt:
            for start, end in layout.letters(self._control):
                cuts += [(start, True, _LEADS[:1]), (end, False, _LEADS[:1])]
        if job.border is not None:
            cuts.append((job.border, False, _LEADS))
        cuts = [cut for cut in sorted(cuts, key=lambda cut: cut[0]) if cut[0] < stop]
        ends = [start for start, _, _ in cuts[1:]] + [stop]
        return [
            _Unit(start, layout.text[start:end], letters, leads)
            for (start, letters, leads), end in zip(cuts, ends, strict=True)
            if end > start
        ]

    def _encode_units(self, units: Sequence[_Unit]) -> Iterator[tuple[Ids, Starts]]:
        whole = [unit for unit in units if not unit.leads]
        texts = [unit.text for unit in whole]
        if self._lengths is None:
            offsets = iter(self._plain.encode_batch(texts, add_special_tokens=False))
            for unit in units:
                yield self._continuing(unit) if unit.leads else _placed(unit, next(offsets))
            return
        found = iter(self._text_ids.encode(texts))
        for unit in units:
            if unit.leads:
                yield self._continuing(unit)
                continue
            ids = next(found)
            starts = self._starts_by_bytes(unit.text, ids)
            if starts is None:
                yield _placed(unit, self._plain.encode(unit.text, add_special_tokens=False))
            else:
                yield ids, starts + unit.start

    def _starts_by_bytes(self, text: str, ids: Ids) -> Starts | None:
        """Count the bytes of byte-level tokens; None where the tokenizer changed the text."""
        assert self._lengths is not None
        lengths = self._lengths[ids]
        starts: Starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        if text.isascii():
            return starts if total == len(text) else None
        data = text.encode()
        if total != len(data):
            return None
        # A byte that continues a character belongs to the character that began before it.
        character = np.cumsum((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80) - 1
        return character[starts].astype(np.int64)

    def _continuing(self, unit: _Unit) -> tuple[Ids, Starts]:
        """Encode a text that continues another: behind a lead, which is taken off again."""
        tokenizer = self._letters if unit.letters else self._plain
        for lead in (*unit.leads, ""):
            encoding = tokenizer.encode(lead + unit.text, add_special_tokens=False)
            before = self._lead_ids[lead] if lead else []
            if encoding.ids[: len(before)] == before:
                break
        offsets = [start for start, _ in encoding.offsets[len(before) :]]
        starts = np.maximum(np.array(offsets, dtype=np.int64) - len(lead), 0) + unit.start
        return np.asarray(encoding.ids[len(before) :], dtype=np.int32), starts

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _begins_alone(self, layout: _Layout, at: int, ids: Ids, starts: Starts) -> bool:
        """Say whether the ids before a step are those of its prompt alone."""
        step = layout.steps[at]
        first = int(np.searchsorted(starts, step.begin))
        section = layout.text[step.section : step.begin]
        expected = self._sections.get((section, step.section == 0))
        if expected is None:
            expected = self._ids(section)
            if len(section) < 100:
                self._sections[section, step.section == 0] = expected
        before: list[int] = ids[max(first - len(expected), 0) : first].tolist()
        return before == expected

    def _example(self, rendering: tuple[str, Rendering], job: _Job, ids: Ids, starts: Starts) -> EncodedRendering:
        name, rendered = rendering
        count = int(np.searchsorted(starts, job.layout.steps[max(job.trained)].end))
        ids, starts = ids[:count], starts[:count]
        spans = job.layout.spans(starts, job.trained)
        steps = tuple(rendered.steps[at] for at in sorted(job.trained))
        return EncodedRendering(Example(name, ids, spans), steps)


def _placed(unit: _Unit, encoding: Any) -> tuple[Ids, Starts]:
    starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    return np.asarray(encoding.ids, dtype=np.int32), starts + unit.start


class _Layout:
    """Where the segments and the steps of a rendering stand in its text."""

    def __init__(self, rendering: Rendering) -> None:
        self.rendering = rendering
        segments = rendering.segments
        self.text = "".join([segment.text for segment in segments])
        self._ends = np.cumsum([len(segment.text) for segment in segments])
        self._starts = self._ends - [len(segment.text) for segment in segments]
        self.steps: list[_Step] = []
        step_of = np.full(len(segments), -1, dtype=np.int64)
        section = 0
        begin = -1
        for at, segment in enumerate(segments):
            if segment.trained:
                if begin < 0:
                    begin = int(self._starts[at])
                step_of[at] = len(self.steps)
                if segment.kind is SpanKind.stop:
                    self.steps.append(_Step(section, begin, int(self._ends[at])))
                    begin = -1
            if segment.special and begin < 0:
                section = int(self._starts[at])
        self._step_of = step_of
        self._kinds = np.array([segment.kind for segment in segments], dtype=np.int8)
        self._calls = np.concatenate([[0], np.cumsum(self._kinds == SpanKind.call)])

    def letters(self, control: re.Pattern[str]) -> Iterator[tuple[int, int]]:
        """Yield where values spell control tokens."""
        for segment, start in zip(self.rendering.segments, self._starts.tolist(), strict=True):
            if not segment.special:
                for found in control.finditer(segment.text):
                    yield start + found.start(), start + found.end()

    def spans(self, starts: Starts, trained: Iterable[int]) -> tuple[Span, ...]:
        """Return the labelled runs of tokens, by kind; a token that carries any part of a call's parameters is `call`."""
        first = np.searchsorted(self._ends, starts, side="right")
        wanted = np.zeros(len(self.steps) + 1, dtype=bool)  # The last is that of segments in no step.
        wanted[list(trained)] = True
        kinds = np.where(wanted[self._step_of], self._kinds, -1)[first]
        frames = np.flatnonzero(kinds == SpanKind.frame)
        if len(frames):
            ends = np.maximum(np.append(starts[1:], starts[-1:] + 1), starts + 1)[frames]
            last = np.searchsorted(self._starts, ends) - 1
            kinds[frames[self._calls[last + 1] > self._calls[first[frames]]]] = SpanKind.call
        changed = np.empty(len(kinds) + 1, dtype=bool)
        changed[0], changed[-1] = kinds[0] >= 0, kinds[-1] >= 0
        np.not_equal(kinds[1:], kinds[:-1], out=changed[1:-1])
        borders = np.flatnonzero(changed).tolist()
        return tuple(
            Span(start, stop, SpanKind(int(kinds[start])))
            for start, stop in zip(borders, borders[1:], strict=False)
            if kinds[start] >= 0
        )
