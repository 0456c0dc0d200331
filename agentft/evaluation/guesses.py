"""Guesses at how an answer goes on: what followed when the same few tokens were said before.

Calls copy names, keys and values from their context, and all calls share their frame. A guess costs nothing but a wider
forward pass that checks it; under greedy decoding the answer is the same with and without (prompt look-up: Saxena, 2023;
speculative decoding: Leviathan et al., 2023, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Guesser:
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
