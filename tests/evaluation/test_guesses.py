"""Drafts of the next tokens: where they come from, how far they reach, what they cost in memory."""

from __future__ import annotations

import pytest

from agentft.evaluation import generate
from agentft.evaluation.generate import PromptLookupDrafter, index_ngrams


def test_what_followed_the_same_tokens_last_is_drafted_up_to_the_limit() -> None:
    drafter = PromptLookupDrafter([1, 2, 3, 9, 1, 2, 3, 4, 5, 6, 7, 8], {}, longest=16)
    for token in (1, 2, 3):
        drafter.add(token)
    assert drafter.draft(room=100) == [4, 5, 6, 7]
    assert drafter.draft(room=2) == [4, 5]
    assert drafter.draft(room=0) == []


def test_the_longest_ngram_that_occurred_decides() -> None:
    drafter = PromptLookupDrafter([5, 1, 2, 7, 6, 1, 2, 8, 5], {}, longest=16)
    drafter.add(1)
    drafter.add(2)
    assert drafter.draft(room=1) == [7], "after 5 1 2 came 7, though 8 came after 1 2 last"


def test_other_completions_are_looked_up_where_the_context_has_nothing() -> None:
    index = {}
    index_ngrams(index, [1, 2, 3, 4, 5])
    drafter = PromptLookupDrafter([9, 9, 1, 2], index, longest=16)
    assert drafter.draft(room=16) == [3, 4, 5]
    assert PromptLookupDrafter([9, 9, 7, 8], index, longest=16).draft(room=16) == []


@pytest.mark.parametrize(("drafted", "accepted", "reach"), [(4, 4, 8), (4, 3, 4), (4, 0, 2), (0, 0, 4)])
def test_an_accepted_draft_makes_the_next_longer_and_a_rejected_one_shorter(
    drafted: int, accepted: int, reach: int
) -> None:
    drafter = PromptLookupDrafter([1, 2] * 20, {}, longest=16)
    drafter.learn(drafted, accepted)
    assert len(drafter.draft(room=100)) == reach


def test_nothing_is_drafted_or_kept_where_speculation_is_off() -> None:
    drafter = PromptLookupDrafter([1, 2] * 20, {}, longest=0)
    drafter.add(1)
    assert drafter.draft(room=10) == []


def test_the_index_of_completions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_MOST_NGRAMS", 10)
    index = {}
    index_ngrams(index, list(range(50)))
    index_ngrams(index, [100, 101, 102])
    assert PromptLookupDrafter([3, 4], index, longest=1).draft(room=1) == []
    assert PromptLookupDrafter([100, 101], index, longest=1).draft(room=1) == [102]
