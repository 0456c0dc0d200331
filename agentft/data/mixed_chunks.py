"""Which kind each token of a chunk is, where the chunk holds several: a call is tokenised as one text.

A token that carries any character of a call's name or parameters is of that kind, its other characters notwithstanding:
`"Husum"}}` ends the parameters, and the braces behind them come along.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agentft.data.render import Kind, Segment
from agentft.data.text_ids import Ids
from agentft.data.vocabulary_bytes import byte_level_lengths

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KindRun = tuple[int, int, Kind]
"""First token, the one after the last, and their kind."""

MixedChunk = tuple[str, Sequence[Segment], Ids]
"""The text of a chunk, what it consists of, and its ids."""


class MixedChunks:
    """Tells the kinds of tokens by counting the bytes of their ids or, where ids do not spell bytes, by their offsets."""

    def __init__(self, text_tokenizer: Tokenizer, byte_level: Any | None) -> None:
        """`byte_level`: the tokenizer of transformers, if the ids of a text in NFC spell its very bytes."""
        self._text_tokenizer = text_tokenizer
        self._byte_level = byte_level
        self._lengths: npt.NDArray[np.int64] | None = None

    def kind_runs(self, chunks: Sequence[MixedChunk]) -> list[list[KindRun]]:
        """The runs of one kind among the tokens of each chunk of frame and call."""
        stops = [self._stops(text, ids) for text, _, ids in chunks]
        by_offsets = [text for (text, _, _), found in zip(chunks, stops, strict=True) if found is None]
        encoded = iter(self._text_tokenizer.encode_batch(by_offsets, add_special_tokens=False) if by_offsets else ())
        runs: list[list[KindRun]] = []
        for (text, segments, _), found in zip(chunks, stops, strict=True):
            if found is None:
                offsets = next(encoded).offsets
                # A token without width stands for something that the tokenizer trimmed: it is what stands at its place.
                ends = [max(stop, start + 1) for start, stop in offsets]
                runs.append(_runs(segments, [len(s.text) for s in segments], [start for start, _ in offsets], ends))
            else:
                ascii_only = text.isascii()
                sizes = [len(s.text) if ascii_only else len(s.text.encode()) for s in segments]
                runs.append(_runs(segments, sizes, [0, *found][: len(found)], found))
        return runs

    def _stops(self, text: str, ids: Ids) -> list[int] | None:
        """Where in the bytes of the text each of its tokens ends; None where counting bytes says nothing."""
        if self._byte_level is None or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            return None
        if self._lengths is None:
            self._lengths = byte_level_lengths(self._byte_level)
        stops: list[int] = np.cumsum(self._lengths[ids]).tolist()
        size = len(text) if text.isascii() else len(text.encode())
        return stops if (stops[-1] if stops else 0) == size else None


def _runs(
    segments: Sequence[Segment], sizes: Sequence[int], starts: Sequence[int], stops: Sequence[int]
) -> list[KindRun]:
    """Runs of a chunk of frame and call: `sizes` of its segments and the places of its tokens, in the same unit."""
    runs: list[KindRun] = []
    end = done = 0
    for segment, size in zip(segments, sizes, strict=True):
        begin, end = end, end + size
        if segment.kind is not Kind.call or not size:
            continue
        first, last = max(bisect_right(stops, begin), done), bisect_left(starts, end)
        if first >= last:
            continue
        if runs and first == done:
            runs[-1] = (runs[-1][0], last, Kind.call)
        else:
            if first > done:
                runs.append((done, first, Kind.frame))
            runs.append((first, last, Kind.call))
        done = last
    if done < len(starts):
        runs.append((done, len(starts), Kind.frame))
    return runs
