"""Which kind each token of a chunk is, where the chunk holds several: a call is tokenised as one text.

A token that carries any character of a call's name or parameters is of that kind, its other characters notwithstanding:
`"Husum"}}` ends the parameters, and the braces behind them come along.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from agentft.data.render import Kind, Segment

KindRun = tuple[int, int, Kind]
"""First token, the one after the last, and their kind."""


def kind_runs(chunk: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[KindRun]:
    """The runs of one kind among the tokens of a chunk of frame and call; `offsets` are their places in its text."""
    bounds = np.cumsum([0] + [len(segment.text) for segment in chunk])
    is_call = np.zeros(int(bounds[-1]) + 1, dtype=np.int32)
    for segment, start, stop in zip(chunk, bounds, bounds[1:], strict=False):
        is_call[start:stop] = segment.kind is Kind.call
    before = np.concatenate([[0], np.cumsum(is_call)])
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    # A token without width stands for something that the tokenizer trimmed: it is what stands at its place.
    stops = np.minimum(np.maximum(places[:, 1], places[:, 0] + 1), len(is_call))
    calls = before[stops] > before[np.minimum(places[:, 0], len(is_call))]
    runs: list[KindRun] = []
    for called, group in groupby(calls.tolist()):
        start = runs[-1][1] if runs else 0
        runs.append((start, start + len(list(group)), Kind.call if called else Kind.frame))
    return runs
