"""Which kind each token of a chunk is, where the chunk holds several: a call is tokenised as one text.

A token that carries any character of a call's name or parameters is of that kind, its other characters notwithstanding:
`"Husum"}}` ends the parameters, and the braces behind them come along.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from agentft.data.render import Kind, Segment

KindRun = tuple[int, int, Kind]
"""First token, the one after the last, and their kind."""


def kind_runs(chunk: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[KindRun]:
    """The runs of one kind among the tokens of a chunk of frame and call; `offsets` are their places in its text."""
    runs: list[KindRun] = []
    end = done = 0
    for segment in chunk:
        begin, end = end, end + len(segment.text)
        if segment.kind is not Kind.call or begin == end:
            continue
        first, last = max(bisect_right(offsets, begin, key=_stop), done), bisect_left(offsets, end, key=_start)
        if first >= last:
            continue
        if runs and first == done:
            runs[-1] = (runs[-1][0], last, Kind.call)
        else:
            if first > done:
                runs.append((done, first, Kind.frame))
            runs.append((first, last, Kind.call))
        done = last
    if done < len(offsets):
        runs.append((done, len(offsets), Kind.frame))
    return runs


def _start(place: tuple[int, int]) -> int:
    return place[0]


def _stop(place: tuple[int, int]) -> int:
    # A token without width stands for something that the tokenizer trimmed: it is what stands at its place.
    return max(place[1], place[0] + 1)
