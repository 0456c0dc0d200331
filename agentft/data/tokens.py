"""Encode renderings into `input_ids` and labels.

The text of a chat template is encoded once, as a server encodes a prompt. Where the tokenizer would write a token across the
beginning of a step, a border is forced there and the step gets an example of its own, since no server puts a border into the
history of a prompt. In the layout `msagent` a byte-level tokenizer takes the context, each text and each call by itself.

A token that carries any character of a call's name or parameters is of that kind: the braces of `"Husum"}}` come along.

The faster tokenizer is compared with `tokenizers`, id by id, on the first texts and on every 128th afterwards.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from agentft.data.chat_template import any_of
from agentft.data.config import SpanWeights
from agentft.data.render import Rendering, Segment, SpanKind
from agentft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")
Ids = npt.NDArray[np.int32]

IGNORE_INDEX = -100
"""Label of a position that is not trained; the default `ignore_index` of torch's cross-entropy."""

_MARKUP = re.compile(r"<\S+>")
"""Names of added tokens that are marks of a layout, `<tool_call>` for example; runs of spaces and the like are not."""

_LEADS = ("\n", "x", ":")
"""What may stand before a text that continues another, so that a tokenizer puts no blank there; it is taken off again."""

Letters = Literal["none", "marks", "all", "named"]
"""Which added tokens a text reads as letters: none, special ones and marks, or all; or the text names one token."""

Places = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """A run of tokens of one trained kind: positions `start` to `stop`, exclusive."""

    start: int
    stop: int
    kind: SpanKind


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised conversation."""

    id: str
    input_ids: Ids
    """Shape [T]."""
    spans: tuple[Span, ...]
    """The trained runs, in order; everything outside them is context."""
    context_rounds: int = 0
    """Rounds at the start that are shown and not trained."""
    span_weights: tuple[float, ...] | None = None
    """What a token of each span counts in the loss; None: 1."""

    @property
    def labels(self) -> Ids:
        """Shape [T]: the id at trained positions, `IGNORE_INDEX` elsewhere; not shifted."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for span in self.spans:
            labels[span.start : span.stop] = self.input_ids[span.start : span.stop]
        return labels

    @property
    def loss_weights(self) -> npt.NDArray[np.float32]:
        """Shape [T]: what each position counts in the loss as a label; 0 where it is none."""
        weights = np.zeros(len(self.input_ids), dtype=np.float32)
        for span, weight in zip(self.spans, self.span_weights or [1.0] * len(self.spans), strict=True):
            weights[span.start : span.stop] = weight
        return weights

    @property
    def trained_tokens(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def steps(self) -> list[tuple[int, int]]:
        """Return where the agent speaks: (first position, position after its stop token) of every step."""
        steps: list[tuple[int, int]] = []
        for span in self.spans:
            if steps and steps[-1][1] == span.start:
                steps[-1] = (steps[-1][0], span.stop)
            else:
                steps.append((span.start, span.stop))
        return steps

    def __len__(self) -> int:
        return len(self.input_ids)


class EncodedRendering(NamedTuple):
    """An example of a rendering, and which steps of the conversation it trains."""

    example: Example
    steps: tuple[int, ...]


class _Unit(NamedTuple):
    """A text that the tokenizer takes in one piece."""

    text: str
    letters: Letters = "none"
    leads: tuple[str, ...] = ()
    """What to encode it behind where the tokenizer puts a blank before a text; empty for the beginning of a rendering."""


KnownIds = dict[_Unit, Ids]
"""Ids of texts that were encoded before."""


class _Job(NamedTuple):
    """An example to be encoded."""

    item: int
    text: _Text
    steps: frozenset[int] | None = None
    """Which of the rendering's steps, by their position in it; None: all that it trains."""
    border: int | None = None
    """Number of the segment before which no token may cross."""


class _Encoded(NamedTuple):
    """Ids of a text, shape [T], and which of them stand around its borders: before each segment, and behind the last."""

    ids: Ids
    begin: list[int]
    """The first token that begins at a border or behind it."""
    reach: list[int]
    """The first token that ends behind it: another one where a token stands across the border."""

    @classmethod
    def of(cls, ids: Ids, starts: Places, ends: Places, borders: Sequence[int]) -> _Encoded:
        """Place tokens, each from `starts` to `ends`, in the unit of the borders."""
        return cls(
            ids, np.searchsorted(starts, borders).tolist(), np.searchsorted(ends, borders, side="right").tolist()
        )


class SegmentEncoder:
    """Encodes renderings; a value reaches no control token, whatever it spells."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the Rust tokenizer out of `tokenizer`, a fast tokenizer of transformers."""
        self._tokenizer = tokenizer
        self._counts_bytes = keeps_every_byte(tokenizer.backend_tokenizer)
        self._cuts_anywhere = all(
            part["type"] == "Metaspace" for part in _parts(tokenizer.backend_tokenizer, "pre_tokenizer")
        )
        """A border between two tokens cuts a text in two with the same ids alone: no pattern looks ahead."""
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.largest_id = max(self._vocabulary.values())
        """The greatest id of the vocabulary, added tokens included."""
        self._copies: dict[Letters, Tokenizer] = {}
        self._lock = Lock()
        self._text_ids: dict[Letters, TextIds] = {}
        self._much: bool | None = None
        """Of one that comes to be faster: whether much text is known to come."""
        self._prompt_ends: dict[tuple[str, bool], list[int]] = {}

    def for_much_text(self, *, much: bool) -> SegmentEncoder:
        """Return one that becomes faster with much text, at once where it is known to come; see `TokenizersDisagree`."""
        other = copy(self)
        other._text_ids, other._much = {}, much
        return other

    def settle(self) -> bool:
        """Between two batches: load the faster tokenizer if that is worth it by now; whether no other will be loaded."""
        settled = [ids.settle() for ids in self._text_ids.values()]
        return all(settled)

    def fingerprint(self) -> str:
        """Digest of everything that decides the ids of a text."""
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def special_id(self, token: str) -> int:
        """Return the id of a special token; raise ConfigError where the vocabulary has none of that name."""
        if token not in self._vocabulary:
            raise ConfigError(
                f"{token!r} is not in the tokenizer's vocabulary; model.stop_token or model.template asks for it"
            )
        if not self._counts_bytes and not self._marks.fullmatch(token):
            raise ConfigError(
                f"{token!r} is a word of the tokenizer's vocabulary; model.stop_token has to be a special token"
            )
        return self._vocabulary[token]

    def encode(
        self, renderings: Sequence[tuple[str, Rendering]], known: KnownIds | None = None
    ) -> list[list[EncodedRendering]]:
        """Return the examples of each (id, rendering): one, or several where a forced border would change a prompt.

        Args:
            known: Ids of texts of the same conversations, which are not encoded again; those of new ones are added.
        """
        found: list[list[EncodedRendering]] = [[] for _ in renderings]
        jobs = [_Job(at, _Text(rendering)) for at, (_, rendering) in enumerate(renderings)]
        again: list[_Job] = []
        for job, encoded in zip(jobs, self._encode(jobs, {} if known is None else known), strict=True):
            steps = [] if self._by_chunks(job.text) else job.text.steps
            crossed = [at for at, step in enumerate(steps) if not self._begins_alone(job.text, step, encoded)]
            if crossed:
                own = set(range(len(steps))) - set(crossed)
                # The steps before the last border have no border in their prompts yet, so they may share its example.
                before = own if own and max(own) < crossed[-1] else set()
                for at in crossed:
                    shared = before if at == crossed[-1] else ()
                    again.append(_Job(job.item, job.text, frozenset({at, *shared}), steps[at].first))
                job = job._replace(steps=frozenset(own - before))
            if job.steps is None or job.steps:
                found[job.item].append(_example(renderings[job.item], job, encoded))
        for job, encoded in zip(again, self._encode(again, {}), strict=True):
            found[job.item].append(_example(renderings[job.item], job, encoded))
        return [sorted(each, key=lambda one: one.steps) for each in found]

    def _encode(self, jobs: Sequence[_Job], known: KnownIds) -> Iterator[_Encoded]:
        """Yield the ids of each job's text and where its tokens begin."""
        units = [self._chunks(job.text) if self._by_chunks(job.text) else self._units(job) for job in jobs]
        if not self._counts_bytes:
            yield from map(self._by_offsets, jobs, units)
            return
        new = dict.fromkeys(unit for own in units for unit in own if unit not in known)
        for letters in {unit.letters for unit in new}:
            members = [unit for unit in new if unit.letters == letters]
            known.update(zip(members, self._ids(letters, [unit.text for unit in members]), strict=True))
        for job, own in zip(jobs, units, strict=True):
            yield self._by_bytes(job, [known[unit] for unit in own]) or self._by_offsets(job, own)

    def _ids(self, letters: Letters, texts: Sequence[str]) -> Sequence[Ids]:
        if letters == "named":
            return [np.array([self.special_id(text)], dtype=np.int32) for text in texts]
        if letters not in self._text_ids:
            much = None if letters == "all" else self._much  # Of those there is never much.
            self._text_ids.setdefault(letters, TextIds(self._copy(letters), much=much))
        return self._text_ids[letters].encode(texts)

    def _copy(self, letters: Letters) -> Tokenizer:
        """Return a copy of the tokenizer that reads control tokens so; the caller's stays as its other users expect it."""
        from tokenizers import Tokenizer

        with self._lock:
            if letters not in self._copies:
                made = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
                # Qwen adds `<tool_call>` and the like as ordinary tokens, which text reaches: a user who types one would
                # type a control token. What is special can be letters.
                added = made.get_added_tokens_decoder().values() if letters != "none" else ()
                letter_tokens = [token for token in added if letters == "all" or _MARKUP.fullmatch(token.content)]
                for token in letter_tokens:
                    token.special = True
                made.add_special_tokens(letter_tokens)
                made.encode_special_tokens = letters != "none"
                made.no_truncation()
                made.no_padding()
                self._copies[letters] = made
            return self._copies[letters]

    def _by_chunks(self, text: _Text) -> bool:
        return text.rendering.by_chunks and self._counts_bytes

    def _chunks(self, text: _Text) -> list[_Unit]:
        """Join neighbours that are encoded together, alike whether they are trained or shown; named tokens stand alone."""
        units: list[_Unit] = []
        joined: list[str] = []
        fate: SpanKind | None = None
        for segment in text.rendering.segments:
            own = segment.encoded_with
            if joined and (segment.special or own is not fate):
                units.append(_Unit("".join(joined), "marks"))
                joined = []
            if segment.special:
                units.append(_Unit(segment.text, "named"))
            else:
                fate = own
                joined.append(segment.text)
        if joined:
            units.append(_Unit("".join(joined), "marks"))
        return units

    def _units(self, job: _Job) -> list[_Unit]:
        """Cut a text where a value spells a control token and at a forced border, nowhere else."""
        text, rendering = job.text, job.text.rendering
        stop = len(text.text) if job.steps is None else text.starts[text.steps[max(job.steps)].last + 1]
        cuts: dict[int, tuple[Letters, tuple[str, ...]]] = {0: ("none", ())}
        control = self._marks if rendering.by_chunks else rendering.as_letters
        if control is not None:
            for segment, start in zip(rendering.segments, text.starts, strict=False):
                for found in () if segment.special else control.finditer(segment.text):
                    cuts[start + found.start()] = ("all", _LEADS[:1])
                    cuts[start + found.end()] = ("none", _LEADS[:1])
        if job.border is not None:
            start = text.starts[job.border]
            cuts[start] = (cuts.get(start, ("none", ()))[0], _LEADS)
        begins = sorted(start for start in cuts if start < stop)
        return [_Unit(text.text[a:b], *cuts[a]) for a, b in zip(begins, [*begins[1:], stop], strict=True)]

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """Matches the added tokens that a value must not reach."""
        added = [
            t.content
            for t in self._tokenizer.added_tokens_decoder.values()
            if t.special or _MARKUP.fullmatch(t.content)
        ]
        return re.compile(any_of(added))

    @cached_property
    def _lengths(self) -> Places:
        """By id, how many bytes it stands for in a byte-level vocabulary, where each character of a token is a byte."""
        lengths = np.zeros(self.largest_id + 1, dtype=np.int64)
        lengths[list(self._vocabulary.values())] = list(map(len, self._vocabulary))
        for index, token in self._tokenizer.added_tokens_decoder.items():
            lengths[index] = len(str(token).encode())
        return lengths

    def _by_bytes(self, job: _Job, parts: Sequence[Ids]) -> _Encoded | None:
        """Place tokens by counting their bytes; None where the tokenizer changed the text."""
        text = job.text
        borders = text.borders()
        size = borders[-1] if job.steps is None else borders[text.steps[max(job.steps)].last + 1]
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        lengths = self._lengths[ids]
        if lengths.sum() != size or not (text.text.isascii() or unicodedata.is_normalized("NFC", text.text)):
            return None
        ends = lengths.cumsum()
        return _Encoded.of(ids, ends - lengths, ends, borders)

    def _by_offsets(self, job: _Job, units: Sequence[_Unit]) -> _Encoded:
        """Place tokens by the offsets that the tokenizer gives, in characters."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        begin = 0
        for unit in units:
            if unit.letters == "named":
                found, offsets = [self.special_id(unit.text)], [(0, len(unit.text))]
            else:
                found, offsets = self._continuing(unit)
            ids += found
            places += [(begin + start, begin + stop) for start, stop in offsets]
            begin += len(unit.text)
        starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
        # A token without width stands for something that the tokenizer trimmed: it is what stands at its place.
        return _Encoded.of(np.array(ids, dtype=np.int32), starts, np.maximum(ends, starts + 1), job.text.starts)

    def _continuing(self, unit: _Unit) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text, one that continues another behind a lead, which is taken off again."""
        tokenizer = self._copy(unit.letters)
        for lead in (*(() if self._counts_bytes else unit.leads), ""):
            encoding = tokenizer.encode(lead + unit.text, add_special_tokens=False)
            before = tokenizer.encode(lead, add_special_tokens=False).ids if lead else []
            if encoding.ids[: len(before)] == before:
                break
        offsets = encoding.offsets[len(before) :]
        return encoding.ids[len(before) :], [(max(a - len(lead), 0), max(b - len(lead), 0)) for a, b in offsets]

    def _begins_alone(self, text: _Text, step: _Step, encoded: _Encoded) -> bool:
        """Return whether the ids before a step are those of its prompt alone."""
        first = encoded.begin[step.first]
        if self._cuts_anywhere:
            return encoded.reach[step.first] == first
        # What decides is the text since the last control token: nothing before it changes the ids behind it.
        section = text.text[text.starts[step.section] : text.starts[step.first]]
        expected = self._prompt_ends.get((section, step.section == 0))
        if expected is None:
            part = text.rendering._replace(segments=text.rendering.segments[step.section : step.first])
            (alone,) = self._encode([_Job(0, _Text(part))], {})
            expected = alone.ids.tolist()
            if len(section) < 100 and not text.rendering.as_letters:
                self._prompt_ends[section, step.section == 0] = expected
        before: list[int] = encoded.ids[max(first - len(expected), 0) : first].tolist()
        return before == expected


class _Step(NamedTuple):
    """A trained step of a text, by the numbers of its segments."""

    section: int
    """The last control token before it."""
    first: int
    last: int


class _Text:
    """The text of a rendering, and where its segments and trained steps stand."""

    def __init__(self, rendering: Rendering) -> None:
        self.rendering = rendering
        texts = [segment.text for segment in rendering.segments]
        self.text = "".join(texts)
        self.starts = [0, *accumulate(map(len, texts))]
        """In characters; and where the last segment ends."""

    @cached_property
    def steps(self) -> list[_Step]:
        """The trained steps, in order."""
        steps: list[_Step] = []
        section = 0
        first: int | None = None
        for at, segment in enumerate(self.rendering.segments):
            if segment.trained:
                first = at if first is None else first
                if segment.kind is SpanKind.stop:
                    steps.append(_Step(section, first, at))
                    first = None
            elif segment.special and first is None:
                section = at
        return steps

    def borders(self) -> list[int]:
        """Return `starts` in bytes."""
        if self.text.isascii():
            return self.starts
        return [0, *accumulate(len(segment.text.encode()) for segment in self.rendering.segments)]

    def spans(self, encoded: _Encoded, steps: Collection[int] | None = None) -> tuple[Span, ...]:
        """Return the labelled runs of tokens, by kind; of some steps alone where they are given."""
        chosen = (
            None if steps is None else {n for at in steps for n in range(self.steps[at].first, self.steps[at].last + 1)}
        )
        spans: list[Span] = []
        for at, segment in enumerate(self.rendering.segments):
            if not segment.trained or (chosen is not None and at not in chosen):
                continue
            first, stop, kind = encoded.begin[at], encoded.begin[at + 1], segment.kind
            before = spans[-1] if spans and spans[-1].stop == first else None
            if kind is SpanKind.call and encoded.reach[at] < first and before and before.kind is SpanKind.call_syntax:
                # The token that carries the last letters of the syntax carries some of the call.
                first -= 1
                spans[-1:] = [before._replace(stop=first)] if before.start < first else []
                before = spans[-1] if spans and spans[-1].stop == first else None
            if before and before.kind is kind:
                spans[-1] = before._replace(stop=stop)
            elif first < stop:
                spans.append(Span(first, stop, kind))
        return tuple(spans)


def _example(named: tuple[str, Rendering], job: _Job, encoded: _Encoded) -> EncodedRendering:
    """Make an example of an encoded text; of some of its steps alone, up to the end of the last."""
    (name, rendering), text = named, job.text
    if job.steps is None:
        return EncodedRendering(Example(name, encoded.ids, text.spans(encoded)), rendering.steps)
    ids = encoded.ids[: encoded.begin[text.steps[max(job.steps)].last + 1]]
    steps = tuple(rendering.steps[at] for at in sorted(job.steps))
    return EncodedRendering(Example(name, ids, text.spans(encoded, job.steps)), steps)


def weigh(example: Example, weights: SpanWeights) -> Example:
    """Return the example with a weight for each span; unchanged where all count alike."""
    by_kind: dict[SpanKind, float] = {SpanKind[each.name]: getattr(weights, each.name) for each in fields(weights)}
    if set(by_kind.values()) == {1.0}:
        return example
    return replace(example, span_weights=tuple(by_kind[span.kind] for span in example.spans))


def encode_fast(encoder: SegmentEncoder, work: Callable[[SegmentEncoder], T], *, much: bool) -> T:
    """Do work with the tokenizer that is faster for much text; all of it again with `tokenizers` alone where they differ."""
    try:
        return work(encoder.for_much_text(much=much))
    except TokenizersDisagree as error:
        log.warning("data: %s; begun again with tokenizers alone", error)
        return work(encoder)


# --- Texts and ids, exactly ---

_SPACE = "▁"
"""How SentencePiece vocabularies write a space."""


def vocabulary_bytes(tokenizer: Any) -> list[bytes]:
    """By id, of a fast tokenizer of transformers: byte-level or SentencePiece."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    alphabet = byte_level_alphabet()
    spelt_in_bytes = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    table = [b""] * (max(vocabulary.values(), default=0) + 1)
    for token, index in vocabulary.items():
        if index in added:
            table[index] = token.encode()
        elif spelt_in_bytes:
            table[index] = bytes([alphabet[c] for c in token if c in alphabet])
        else:
            table[index] = _sentencepiece_bytes(token)
    return table


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in a byte-level vocabulary: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def keeps_every_byte(backend: Tokenizer) -> bool:
    """Return whether the ids of a text in NFC spell its bytes: byte-level BPE, nothing put before, stripped or replaced."""
    from tokenizers.models import BPE

    splitters = _parts(backend, "pre_tokenizer")
    return (
        isinstance(backend.model, BPE)
        and all(part["type"] == "NFC" for part in _parts(backend, "normalizer"))
        and any(part["type"] == "ByteLevel" for part in splitters)
        and not any(part.get("add_prefix_space") for part in splitters)
    )


def _parts(backend: Tokenizer, stage: Literal["normalizer", "pre_tokenizer"]) -> list[dict[str, Any]]:
    """Return the JSON of a stage's parts; of a copy without the vocabulary, whose reading would take most of the time."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    bare = Tokenizer(BPE())
    setattr(bare, stage, getattr(backend, stage))
    parts = [json.loads(bare.to_str())[stage]]
    for part in parts:
        parts += (part or {}).get("normalizers", ()) or (part or {}).get("pretokenizers", ())
    return [part for part in parts if part and part["type"] != "Sequence"]


CHECKED = 128
"""Of so many texts one is encoded by both."""

_WORTH_LOADING = 32
"""Characters an entry of the vocabulary that `tokenizers` encodes on two cores while the other is loaded."""

_LEAST_MUCH = 500_000
"""Characters, whatever the vocabulary: processes are forked then too."""

_PROOF = 100_000
"""Characters at the beginning, up to the end of their batch, that the two are compared on; fewer if it is loaded before."""


class TokenizersDisagree(Exception):  # noqa: N818  # what happened, not whose error it is
    """The two tokenizers gave a text different ids."""

    def __str__(self) -> str:
        return f"fastokens and tokenizers encode {self.args[0]!r} differently"


class TextIds:
    """Encodes texts by `tokenizers`; much text by `fastokens`, if that is found to give the same ids."""

    def __init__(self, tokenizer: Tokenizer, *, much: bool | None = None) -> None:
        """Take a tokenizer that cuts and pads nothing; `much` text repays loading `fastokens`, None never loads it."""
        self.tokenizer = tokenizer
        self._repaid = 0 if much else max(_WORTH_LOADING * tokenizer.get_vocab_size(), _LEAST_MUCH)
        self._fast: _Fastokens | None = None
        self._proof: list[str] | None = None if much is None else []
        """Texts that came first; None: it is settled which of the two encodes."""
        self._characters = self._texts = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, shape [T], on all cores; raise TokenizersDisagree of a text encoded by both."""
        if self._fast is not None:
            ids = self._fast.encode(texts)
            first = -self._texts % CHECKED
            self._texts += len(texts)
            self._require_equal(texts[first::CHECKED], ids[first::CHECKED])
            return ids
        if self._proof is not None:
            if self._characters < _PROOF:
                self._proof += texts
            self._characters += sum(map(len, texts))
        return self.by_tokenizers(texts)

    def by_tokenizers(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text by `tokenizers`."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]

    def settle(self) -> bool:
        """Load the faster one if that is worth it by now, between two batches; return whether it is known what encodes."""
        if self._proof and self._characters >= self._repaid:
            try:
                fast = _Fastokens(self.tokenizer)
                self._require_equal(self._proof, fast.encode(self._proof))
                self._fast = fast
            except (ImportError, ValueError, RuntimeError, TokenizersDisagree) as error:
                log.warning("data: encoded by tokenizers alone, which is slower: %s", error)
            self._proof = None
        return self._proof is None

    def _require_equal(self, texts: Sequence[str], found: Sequence[Ids]) -> None:
        for text, ours, theirs in zip(texts, found, self.by_tokenizers(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise TokenizersDisagree(text[:80])


class _Fastokens:
    def __init__(self, tokenizer: Tokenizer) -> None:
        # Texts are shared out by those who ask for them. Threads of its own would be lost, and maybe missed, in a fork.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        from fastokens import Tokenizer as FastTokenizer

        self._splits = bool(tokenizer.encode_special_tokens)
        self._tokenizer = FastTokenizer.from_json_str(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        ids_in_bytes, ends_in_bytes = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=self._splits)
        ids = np.frombuffer(ids_in_bytes, dtype="<u4").astype(np.int32)
        places = np.frombuffer(ends_in_bytes, dtype="<u8").tolist()
        return [ids[start:end] for start, end in zip(places, places[1:], strict=False)]


class TokenText:
    """The bytes of every id of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Read the vocabulary of `tokenizer`, a fast tokenizer of transformers: byte-level or SentencePiece."""
        self._bytes = vocabulary_bytes(tokenizer)
        self._lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int64)
        self.unknown_id: int | None = tokenizer.unk_token_id
        """Its text is lost: what stands under such a token cannot be traced."""

    def text(self, ids: Ids) -> str:
        """Return the text under a run of tokens."""
        return b"".join([self._bytes[index] for index in ids.tolist()]).decode("utf-8", "replace")

    def pieces(self, ids: Ids) -> Iterator[tuple[str, int]]:
        """(text, number of tokens), a token at a time; tokens that share a character come together."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, count = "", 0
        for index in ids.tolist():
            text, count = text + decoder.decode(self._bytes[index]), count + 1
            if not decoder.getstate()[0]:  # else it waits for the rest of a character
                yield text, count
                text, count = "", 0
        if count:
            yield text + decoder.decode(b"", final=True), count

    def kinds(self, ids: Ids, segments: Sequence[Segment]) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Return the kind of the segment that each token begins in, positions stretched where a tokenizer changes text."""
        sizes = [len(s.text) if s.text.isascii() else len(s.text.encode()) for s in segments]
        ends = np.cumsum(sizes)
        lengths = self._lengths[ids]
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        if len(ends) and total and total != ends[-1]:
            starts = starts * ends[-1] // total
        at = np.minimum(np.searchsorted(ends, starts, side="right"), max(len(segments) - 1, 0))
        return np.array([segment.kind for segment in segments] or [SpanKind.header], dtype=np.int8)[at]
