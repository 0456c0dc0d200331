"""Guesses at how an answer goes on: where they come from, how far they reach, what they cost in memory."""

from __future__ import annotations

import pytest

from agentft.evaluation import generate
from agentft.evaluation.generate import PromptLookupDrafter, SaidBefore


def test_what_followed_the_same_words_last_is_guessed_up_to_the_limit() -> None:
    guesser = PromptLookupDrafter([1, 2, 3, 9, 1, 2, 3, 4, 5, 6, 7, 8], SaidBefore(), longest=16)
    for token in (1, 2, 3):
        guesser.add(token)
    assert guesser.guess(room=100) == [4, 5, 6, 7]
    assert guesser.guess(room=2) == [4, 5]
    assert guesser.guess(room=0) == []


def test_the_longest_ending_that_was_said_before_decides() -> None:
    guesser = PromptLookupDrafter([5, 1, 2, 7, 6, 1, 2, 8, 5], SaidBefore(), longest=16)
    guesser.add(1)
    guesser.add(2)
    assert guesser.guess(room=1) == [7], "after 5 1 2 came 7, though 8 came after 1 2 last"


def test_other_answers_are_asked_where_the_context_has_nothing() -> None:
    said = SaidBefore()
    said.add([1, 2, 3, 4, 5])
    guesser = PromptLookupDrafter([9, 9, 1, 2], said, longest=16)
    assert guesser.guess(room=16) == [3, 4, 5]
    assert PromptLookupDrafter([9, 9, 7, 8], said, longest=16).guess(room=16) == []


@pytest.mark.parametrize(("guessed", "right", "reach"), [(4, 4, 8), (4, 3, 4), (4, 0, 2), (0, 0, 4)])
def test_a_right_guess_reaches_further_and_a_wrong_one_less_far(guessed: int, right: int, reach: int) -> None:
    guesser = PromptLookupDrafter([1, 2] * 20, SaidBefore(), longest=16)
    guesser.learn(guessed, right)
    assert len(guesser.guess(room=100)) == reach


def test_nothing_is_guessed_or_kept_where_guessing_is_off() -> None:
    guesser = PromptLookupDrafter([1, 2] * 20, SaidBefore(), longest=0)
    guesser.add(1)
    assert guesser.guess(room=10) == []


def test_the_memory_of_answers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_MOST_ENDINGS", 10)
    said = SaidBefore()
    said.add(list(range(50)))
    said.add([100, 101, 102])
    assert said.after((3, 4), 1) == []
    assert said.after((100, 101), 1) == [102]
